"""``nd-jax prune importance`` and ``nd-jax prune apply``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, progress_bar, say
from nd_jax.commands.generate import read_prompts
from nd_jax.errors import UserError
from nd_jax.outputs import check_new, check_new_file, new_file

Mode = Literal["monolithic", "hybrid"]


def calibration_prompts(path: Path | None, count: int, *, seed: int, plain: bool) -> list[str]:
    """The first ``count`` prompts of a file, or captions of the shapes world."""
    from nd_jax.data.source import prompts as world_prompts
    from nd_jax.data.world import world_named

    if path is not None:
        return read_prompts((), path)[:count]
    return world_prompts(world_named("64x64"), "train", count, seed=seed, plain=plain)[0]


def _measure(system: Any, measures: tuple[str, ...], options: Any) -> Any:
    """Block influence, and of the remove-one scores those in ``measures``."""
    from nd_jax.data.world import world_named
    from nd_jax.importance_report import Importance
    from nd_jax.influence import block_influence, generator_of
    from nd_jax.remove_one import judged_accuracy, output_error

    world, seed = world_named("64x64"), options["seed"]
    captions = calibration_prompts(options["prompt_file"], options["prompts"], seed=seed, plain=options["plain"])
    sampled = {"seed": seed, "samples": options["samples"], "batch": options["batch"]}
    generator = generator_of(system)
    if "judge" in measures and (generator.height, generator.width) != (world.height, world.width):
        raise UserError(
            f"prune: videos of {generator.height}x{generator.width}, the judge reads {world.height}x{world.width}; "
            "score by influence or error"
        )
    total = len(captions) * options["samples"]
    with progress_bar("block influence", total) as progress:
        importance = Importance(block_influence(system, captions, generator=generator, progress=progress, **sampled))
    if "error" in measures:
        with progress_bar("velocity error without each block", total) as progress:
            error = output_error(system, captions, generator=generator, progress=progress, **sampled)
        importance = dataclasses.replace(importance, error=error)
    if "judge" in measures:
        judged = {"seed": seed, "count": options["prompts"], "plain": options["plain"], "batch": options["batch"]}
        with progress_bar("judged accuracy without each block", len(importance.influence.image)) as progress:
            accuracy = judged_accuracy(system, world, generator=generator, progress=progress, **judged)
        importance = dataclasses.replace(importance, accuracy=accuracy)
    return importance


def prune_importance(
    checkpoint: Positional[Path],
    mode: Mode | None = None,
    prompts: int = 16,
    samples: int = 1,
    prompt_file: Path | None = None,
    plain: bool = False,
    error: bool = False,
    judge: bool = False,
    seed: int = 0,
    batch: int = 8,
    out: Path | None = None,
    report: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Importance of the blocks of a checkpoint's denoiser.

    Block influence over prompts, samples, denoising steps and both guidance branches, whole and by stage; with --error
    and --judge also what leaving each block out costs. The paper takes 100 prompts and 5 samples.

    Args:
        checkpoint: official-layout folder.
        mode: which denoiser, where the folder has both.
        prompts: how many prompts to average over.
        samples: videos of every prompt.
        prompt_file: text file with one prompt per line; default: prompts of the shapes world.
        plain: word the shapes world's prompts all alike, for systems that were trained on plain captions only.
        error: also the velocity's squared error without each block.
        judge: also the judged accuracy of shapes videos without each block.
        seed: of the prompts and their noise.
        batch: videos at a time.
        out: also write the numbers to this JSON file, which prune apply --scores reads.
        report: also draw them in this HTML file.
        overwrite: replace these files.
    """
    check_at_least(1, prompts=prompts, samples=samples, batch=batch)
    check_at_least(0, seed=seed)
    for path in (out, report):
        if path is not None:
            check_new_file(path, overwrite=overwrite)
    from nd_jax.importance_report import write_importance
    from nd_jax.system import load_system

    system = load_system(checkpoint, mode=mode, dtype=None)
    measures = tuple(name for name, wanted in (("error", error), ("judge", judge)) if wanted)
    settings = {"prompts": prompts, "samples": samples, "plain": plain, "seed": seed}
    importance = _measure(system, measures, settings | {"prompt_file": prompt_file, "batch": batch})
    names, rows = importance.table()
    print("block" + "".join(f"  {name:>9}" for name in names))
    for block, row in enumerate(rows):
        print(f"{block:5d}" + "".join(f"  {value:9.4f}" for value in row))
    if out is not None:
        with new_file(out, overwrite=overwrite) as part:
            part.write_text(json.dumps({**importance.figures(), "settings": settings}, indent=2))
    if report is not None:
        write_importance(report, importance, str(checkpoint))


def prune_apply(
    checkpoint: Positional[Path],
    out: Path,
    drop: tuple[int, ...] = (),
    count: int | None = None,
    threshold: float | None = None,
    protect: tuple[int, ...] = (),
    by: Literal["influence", "error", "judge", "random"] = "influence",
    scores: Path | None = None,
    fresh: bool = False,
    mode: Mode | None = None,
    prompts: int = 16,
    samples: int = 1,
    prompt_file: Path | None = None,
    plain: bool = False,
    seed: int = 0,
    batch: int = 8,
    overwrite: bool = False,
) -> None:
    """Remove blocks from a checkpoint's denoiser: those named, or the least important ones.

    The folder's pruning.json says which blocks stayed; the second stage of recovery reads it.

    Args:
        checkpoint: official-layout folder.
        out: folder for the smaller system.
        drop: indices of the blocks to remove.
        count: how many of the least important blocks to remove, instead.
        threshold: remove the blocks whose score is below this, instead.
        protect: indices of blocks to keep whatever their score.
        by: what makes a block important: its influence, the velocity's error or the judged accuracy lost without it;
            or chance, the baseline of these.
        scores: file of prune importance --out, instead of measuring again.
        fresh: draw the smaller denoiser's weights anew: the baseline of a small network trained from scratch.
        mode: which denoiser, where the folder has both.
        prompts: how many prompts to average over.
        samples: videos of every prompt.
        prompt_file: text file with one prompt per line; default: prompts of the shapes world.
        plain: word the shapes world's prompts all alike.
        seed: of the prompts and their noise, of chance, and of fresh weights.
        batch: videos at a time.
        overwrite: replace an existing folder.
    """
    if [bool(drop), count is not None, threshold is not None].count(True) != 1:
        raise UserError("prune apply: expected one of --drop INDEX ..., --count N and --threshold SCORE")
    if drop and (protect or scores):
        raise UserError("prune apply: --drop names the blocks; leave --protect and --scores out")
    check_at_least(1, prompts=prompts, samples=samples, batch=batch)
    check_at_least(0, seed=seed)
    check_new(out, overwrite=overwrite)
    from nd_jax.converters.folders import load_folder
    from nd_jax.importance_report import read_score
    from nd_jax.recipes.pruning import choose_below, choose_blocks, random_score
    from nd_jax.recovery_workflow import with_fresh_denoiser
    from nd_jax.system import load_system, save_system
    from nd_jax.workflow import without_blocks

    system = load_system(checkpoint, mode=mode, dtype=None)
    if not drop:
        blocks = system.config.diffusion_transformer.num_layers - 1
        if by == "random":
            score = random_score(blocks, seed)
        elif scores is not None:
            score = read_score(scores, by, blocks)
        else:
            settings = {"prompts": prompts, "samples": samples, "plain": plain, "seed": seed, "batch": batch}
            score = _measure(system, (by,), settings | {"prompt_file": prompt_file}).scores[by]
        drop = choose_below(score, threshold, protect) if count is None else choose_blocks(score, count, protect)
    smaller, kept = without_blocks(system, drop)
    if fresh:
        smaller = with_fresh_denoiser(smaller, seed)
    save_system(out, smaller, load_folder(system.folder).tokenizers, dtype=None, overwrite=overwrite)
    say(f"removed {', '.join(map(str, drop)) or 'none'}; kept {', '.join(map(str, kept))}")
    print(out)
