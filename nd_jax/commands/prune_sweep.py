"""``nd-jax prune sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from nd_jax.commands.console import check_at_least, progress_bar, say
from nd_jax.commands.generate import read_prompts
from nd_jax.commands.prune import Mode


def prune_sweep(
    checkpoint: Positional[Path],
    out: Path,
    budget: int | None = None,
    budget_parameters: int | None = None,
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
) -> None:
    """Search which blocks of a checkpoint's denoiser can go.

    Scores thousands of candidates by their velocity's distance from the whole denoiser's, all in the same compiled
    programs, over all devices. Ctrl-C or SIGTERM stops it with its table whole; the same command goes on.

    Args:
        checkpoint: official-layout folder, or the name of shipped weights.
        out: folder for sweep.parquet (all candidates) and report.html.
        budget: layers that stay; the last block, which always does, counts.
        budget_parameters: parameters that the denoiser may have, instead.
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
    """
    check_at_least(1, prompts=prompts, samples=samples, batch=batch, chunk=chunk, candidates=candidates)
    check_at_least(0, seed=seed)
    from nd_jax.data.source import prompts as world_prompts
    from nd_jax.data.world import world_named
    from nd_jax.errors import UserError
    from nd_jax.sweep.report import write_sweep
    from nd_jax.sweep.workflow import SweepOptions, blocks_to_drop, sweep
    from nd_jax.system import load_system

    if out.exists() and not out.is_dir():
        raise UserError(f"output {out} is a file, expected a folder")
    system = load_system(checkpoint, mode=mode, dtype=None)
    count = blocks_to_drop(system, budget, budget_parameters)
    if prompt_file is not None:
        captions = read_prompts((), prompt_file)[:prompts]
    else:
        captions, _ = world_prompts(world_named("64x64"), "train", prompts, seed=seed, plain=plain)
    options = SweepOptions(count, candidates, seed, samples, steps, batch, chunk, evolve)
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

        outcome = sweep(system, captions, out, options, told=say, progress=progress)
    speed = outcome.scored / max(outcome.seconds, 1e-9)
    say(f"{outcome.ended}: {outcome.scored} candidates scored, {speed:.1f} a second, {len(outcome.table.rows)} known")
    if outcome.table.rows:
        say(f"report: {write_sweep(out / 'report.html', outcome, count, str(checkpoint))}")
    found = outcome.table.best(count)
    if found is not None:
        say(f"next: nd-jax prune apply {checkpoint} --out PRUNED --drop {_told(found)}")
        print(_told(found))


def _told(drop: tuple[int, ...]) -> str:
    return " ".join(map(str, drop))
