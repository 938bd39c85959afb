"""``nd-jax prune sweep``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, progress_bar, say
from nd_jax.commands.prune import Mode, calibration_prompts


def prune_sweep(
    checkpoint: Positional[Path],
    out: Path,
    budget: int | None = None,
    budget_parameters: int | None = None,
    budget_macs: float | None = None,
    budget_bytes: int | None = None,
    budget_ms: float | None = None,
    target: str = "sm8750",
    units: Literal["blocks", "streams", "heads", "mlp"] = "blocks",
    slices: int = 8,
    candidates: int = 512,
    mode: Mode | None = None,
    prompts: int = 16,
    samples: int = 1,
    steps: int | None = 2,
    prompt_file: Path | None = None,
    plain: bool = False,
    evolve: bool = True,
    seed: int = 0,
    batch: int = 8,
    chunk: int = 32,
    dtype: Literal["float32", "bfloat16"] = "float32",
    probes: int = 4,
    gate_steps: int = 100,
    judge: int = 0,
    judge_prompts: int = 16,
    videos: int = 0,
) -> None:
    """Search which blocks of a checkpoint's denoiser can go, or which streams, heads or MLP slices of its blocks.

    Scores thousands of candidates by their velocity's distance from the whole denoiser's, all in the same compiled
    programs, over all devices. Ctrl-C or SIGTERM stops it with its table whole; the same command goes on.

    Args:
        checkpoint: official-layout folder, or the name of shipped weights.
        out: folder for sweep.parquet (all candidates) and report.html.
        budget: layers that stay; the last block, which always does, counts. Or how many of the units stay.
        budget_parameters: parameters that the denoiser may have, instead.
        budget_macs: multiply-adds that a video's denoiser calls may take, instead, in 10^9.
        budget_bytes: bytes that the phone's weights (8 bits) may take, instead.
        budget_ms: milliseconds that a video's denoiser calls are estimated to take on the target, instead.
        target: the chip that budget-ms is about.
        units: what goes.
        slices: pieces that every MLP is cut into, where these are the units.
        candidates: how many to score at most.
        mode: which denoiser, where the folder has both.
        prompts: how many prompts to calibrate on; times samples a multiple of batch.
        samples: videos of every prompt.
        steps: noise levels of every stage, evenly spread over its steps.
        prompt_file: text file with one prompt per line; default: prompts of the shapes world.
        plain: word the shapes world's prompts all alike.
        evolve: go on by evolution after the systematic searches (the sweep extra).
        seed: of prompts, noise and search.
        batch: videos at a time.
        chunk: candidates of a device in one call of a program.
        dtype: what the denoiser computes in.
        probes: random directions for Taylor scores; 0: none.
        gate_steps: training steps of gates under the budget; 0: none.
        judge: so many of the best candidates, the choices of other scores and the whole denoiser make videos, which the
            judge reads (shapes videos only); 0: none.
        judge_prompts: prompts of these videos, samples of each.
        videos: prompts whose videos the report shows, beside the whole denoiser's; without judge of the three best.
    """
    check_at_least(1, prompts=prompts, samples=samples, batch=batch, chunk=chunk, candidates=candidates)
    check_at_least(0, seed=seed, probes=probes, gate_steps=gate_steps, judge=judge, videos=videos)
    check_at_least(1, judge_prompts=judge_prompts)
    import jax.numpy as jnp

    from nd_jax.converters.bundle.targets import chosen
    from nd_jax.data.source import prompts as world_prompts
    from nd_jax.data.world import world_named
    from nd_jax.errors import UserError
    from nd_jax.influence import generator_of
    from nd_jax.sweep.costs import cost_model
    from nd_jax.sweep.finalists import accuracies, final_sections, finalists
    from nd_jax.sweep.report import write_sweep
    from nd_jax.sweep.units import Units
    from nd_jax.sweep.workflow import SweepOptions, sweep, units_to_drop
    from nd_jax.system import load_system

    if out.exists() and not out.is_dir():
        raise UserError(f"output {out} is a file, expected a folder")
    (chip,) = chosen((target,))
    system = dataclasses.replace(load_system(checkpoint, mode=mode, dtype=None), compute=jnp.dtype(dtype))
    pieces, generator = Units(system.config.diffusion_transformer, units, slices), generator_of(system)
    costs = cost_model(generator, pieces)
    world = world_named("64x64")
    if judge and (generator.height, generator.width) != (world.height, world.width):
        raise UserError(
            f"sweep: videos of {generator.height}x{generator.width}, the judge reads {world.height}x{world.width}; "
            "leave --judge out"
        )
    count = units_to_drop(
        costs,
        pieces,
        budget,
        parameters=budget_parameters,
        macs=None if budget_macs is None else budget_macs * 1e9,
        bytes=budget_bytes,
        **{f"ms_{chip.name}": budget_ms},
    )
    captions = calibration_prompts(prompt_file, prompts, seed=seed, plain=plain)
    options = SweepOptions(
        count, candidates, seed, samples, steps, batch, chunk, evolve, units, slices, probes, gate_steps
    )
    best: Any = None
    with progress_bar("candidates", candidates) as bar:

        def progress(table: Any) -> None:
            nonlocal best
            found = table.best(count)
            now = "candidates" if found is None else f"best {table.errors[found]:.4g} without {_told(found)}"
            bar(len(table.rows), candidates, now)
            if found != best:
                best = found
                say(f"{len(table.rows)} candidates: {now}")

        told = {"told": say, "progress": progress}
        outcome = sweep(system, captions, out, options, generator=generator, costs=costs, **told)
    speed = outcome.scored / max(outcome.seconds, 1e-9)
    say(f"{outcome.ended}: {outcome.scored} candidates scored, {speed:.1f} a second, {len(outcome.table.rows)} known")
    more = []
    if (judge or videos) and outcome.table.rows and outcome.ended in ("complete", "candidates"):
        drops = outcome.finalists(count, judge or 3)
        given, labels = captions[:judge_prompts], None
        if judge or prompt_file is None:
            given, labels = world_prompts(world, "train", judge_prompts, seed=seed + 1, plain=plain)
        with progress_bar("videos of candidates", len(drops)) as bar:
            seeds = {"seed": seed, "samples": samples if judge else 1, "batch": batch}
            judged = labels if judge else None
            made = finalists(generator, pieces, list(drops), given, judged, world, progress=bar, **seeds)
        more = final_sections(made, drops, given, out / "videos", videos)
        for drop, (mine, _) in accuracies(made, len(given)).items():
            say(f"judged accuracy {mine.error:.1%} ({mine.low:.1%} to {mine.high:.1%}): {drops[drop]}")
    if outcome.table.rows:
        say(f"report: {write_sweep(out / 'report.html', outcome, count, str(checkpoint), more)}")
    found = outcome.table.best(count)
    if found is not None:
        left = outcome.table.costs(found)
        say(
            f"left: {left.parameters} parameters, {left.macs / 1e9:.4g} x 10^9 multiply-adds a video, {left.bytes} "
            f"bytes of weights, {left.milliseconds[chip.name]:.4g} ms on {chip.name} (an estimate)"
        )
        if units == "blocks":
            say(f"next: nd-jax prune apply {checkpoint} --out PRUNED --drop {_told(found)}")
        print(_told(found))


def _told(drop: tuple[int, ...]) -> str:
    return " ".join(map(str, drop))
