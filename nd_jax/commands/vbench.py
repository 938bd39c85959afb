"""``nd-jax evaluate vbench-videos``, ``vbench-run`` and ``vbench-table``: the published benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, console, progress_bar, say, warn
from nd_jax.errors import UserError
from nd_jax.outputs import check_new_file, new_file
from nd_jax.prompt_suffix import with_suffix


def vbench_videos(
    checkpoint: Positional[Path],
    info: Path,
    out: Path,
    mode: str | None = None,
    samples: int = 5,
    share: str = "1/1",
    suffix: str = "",
    negative_prompt: str = "",
    seed: int = 0,
    batch: int = 4,
    safety_check: bool = True,
) -> None:
    """Make the videos that VBench scores: five of every prompt, OUT/PROMPT-NUMBER.mp4.

    Run it again to go on; run it several times at once with --share 1/4, 2/4, ... A video depends on its prompt, its
    number and the seed alone.

    Args:
        checkpoint: official-layout folder. With first-frame networks in a hybrid folder, these make the first frames.
        info: VBench_full_info.json of the vbench package.
        out: folder for the videos.
        mode: which denoiser, where the folder has both: hybrid or monolithic.
        samples: videos of every prompt; VBench wants 5.
        share: K/N, the K-th of N parts of the work.
        suffix: appended to every prompt: any text, or quality or cinematic. File names are without it.
        negative_prompt: what guidance steers away from.
        seed: of the noise.
        batch: videos at a time.
        safety_check: withhold what the folder's safety checker objects to, if it has one.
    """
    check_at_least(1, samples=samples, batch=batch)
    check_at_least(0, seed=seed)
    from nd_jax.vbench_videos import missing_videos, parse_share, read_prompts, wanted_videos, write_index

    wanted = wanted_videos(read_prompts(info), samples)
    todo = missing_videos(out, wanted, parse_share(share))
    out.mkdir(parents=True, exist_ok=True)
    write_index(out, wanted)
    for prompt in dict.fromkeys(each.prompt for each in wanted if not each.official):
        warn(f"no safe file name: {prompt!r}; VBench's runner will not find its videos")
    say(f"{len(todo)} of {len(wanted)} videos to make")
    maker = _maker(checkpoint, mode, seed, batch, negative_prompt, safety_check)
    remaining, done = iter(todo), 0
    with progress_bar("videos", len(todo)) as progress:
        while some := list(islice(remaining, batch)):
            prompts = with_suffix([each.prompt for each in some], suffix)
            files = [out / each.file for each in some]
            for file, made in zip(files, maker(prompts, files, [each.sample for each in some]), strict=True):
                if not made:
                    warn(f"withheld by the safety checker: {file.name!r}")
                done += 1
                progress(done, len(todo))
    print(out)


def _maker(checkpoint: Path, mode: str | None, seed: int, batch: int, negative: str, safety: bool) -> Any:
    """Function (prompts, files, names of their noise) -> for each file whether it was written."""
    from nd_jax.converters.folders import load_folder
    from nd_jax.first_frame import UNET
    from nd_jax.weights import shipped_folder

    folder = load_folder(shipped_folder(checkpoint))
    if mode != "monolithic" and UNET in folder.components and folder.has("diffusion_transformer", "hybrid"):
        return _hybrid_maker(folder, seed, safety)
    from nd_jax.data.video_out import write_video
    from nd_jax.generate import Generator, generate_batches
    from nd_jax.system import load_system

    system = load_system(checkpoint, mode=mode)
    video = system.video
    generator = Generator(system, height=video.height, width=video.width, frames=video.frames)

    def make(prompts: Sequence[str], files: Sequence[Path], samples: Sequence[str]) -> Iterator[bool]:
        rest = batch - len(prompts)  # the last batch keeps its shape
        videos = generate_batches(
            system,
            [*prompts, *[""] * rest],
            seed=seed,
            samples=[*samples, *(f"padding-{n}" for n in range(rest))],
            negative_prompt=negative,
            batch=batch,
            generator=generator,
            warn=warn,
        )
        clips = (clip for made in videos for clip in made)
        for file, clip in zip(files, clips, strict=False):
            write_video(file, clip, fps=video.fps, overwrite=True)
            yield True

    return make


def _hybrid_maker(folder: Any, seed: int, safety: bool) -> Any:
    from nd_jax.hybrid import HybridPipeline
    from nd_jax.parts import FolderParts
    from nd_jax.system import folder_defaults

    video, plan, schedule = folder_defaults(folder, "hybrid")
    pipeline = HybridPipeline(FolderParts(folder), video, plan=plan, schedule=schedule, safety=safety)

    def make(prompts: Sequence[str], files: Sequence[Path], samples: Sequence[str]) -> Iterator[bool]:
        for made in pipeline.generate(prompts, files, seed=seed, samples=samples, overwrite=True):
            yield made.file is not None

    return make


def vbench_run(
    videos: Positional[Path],
    info: Path,
    out: Path,
    vbench_python: Path,
    dimensions: tuple[str, ...] = (),
    hours: float = 6,
) -> None:
    """Score a folder of videos with VBench's official runner. Run it again to go on.

    Args:
        videos: folder of `nd-jax evaluate vbench-videos`.
        info: VBench_full_info.json of the vbench package.
        out: folder for the result files.
        vbench_python: Python interpreter of an environment where the vbench package is installed.
        dimensions: only these; default: all sixteen.
        hours: most that one dimension may take.
    """
    from nd_jax.vbench_run import run_dimensions
    from nd_jax.vbench_scores import DIMENSIONS

    if hours <= 0:
        raise UserError(f"--hours is {hours}, expected more than 0")
    if not videos.is_dir():
        raise UserError(f"{videos} is not a folder; expected one of nd-jax evaluate vbench-videos")
    chosen = dimensions or tuple(DIMENSIONS)
    for path in run_dimensions(vbench_python, videos, info, out, chosen, seconds=3600 * hours, tell=say):
        print(path)


def vbench_table(results: Positional[tuple[Path, ...]], out: Path | None = None, overwrite: bool = False) -> None:
    """Total, Quality and Semantic of result folders, beside the published ones.

    Args:
        results: folders with VBench's *_eval_results.json, one for each system.
        out: also write the figures to this JSON file.
        overwrite: replace an existing file.
    """
    from rich.table import Table

    from nd_jax.vbench_scores import aggregate, read_results, scores_table

    if not results or len(set(results)) < len(results):
        raise UserError("evaluate vbench-table: expected one or more result folders, each once")
    if out is not None:
        check_new_file(out, overwrite=overwrite)
    systems = {str(path): aggregate(read_results(path)) for path in results}
    for name, scores in systems.items():
        if "total" not in scores:
            warn(f"{name}: not all dimensions are there, so there is no total")
    table = scores_table(systems)
    # One line for each figure: nineteen columns do not fit a terminal.
    drawn = Table("%", *(row[0] for row in table.rows), title=table.title)
    for place, column in enumerate(table.columns[1:], 1):
        drawn.add_row(column, *(row[place] for row in table.rows))
    console.print(drawn, markup=False)
    if out is not None:
        with new_file(out, overwrite=overwrite) as part:
            part.write_text(json.dumps(systems, indent=2) + "\n")
        print(out)
