"""A sweep from start to end: record, search, keep the table, and leave it whole when it is stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from nd_jax.errors import UserError
from nd_jax.influence import block_influence, generator_of
from nd_jax.models.system import DENOISER
from nd_jax.recipes.pruning import choose_blocks
from nd_jax.sweep.calibration import record
from nd_jax.sweep.population import Population
from nd_jax.sweep.search import Drop, plan, run
from nd_jax.sweep.table import SweepTable
from nd_jax.system import VideoSystem
from nd_jax.training.interrupt import Interruption, agreed
from nd_jax.training.paths import named_leaves

TABLE = "sweep.parquet"
SAVE_EVERY = 10.0
"""Seconds between two writes of the table."""


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep measures and how long it looks.

    ``count`` blocks are to go; ``candidates`` at most are scored, on ``samples`` videos of every prompt, at ``steps``
    noise levels of every stage (None: all). ``batch`` videos and ``chunk`` candidates of a device go through a program
    at a time; neither changes a score. ``evolve``: search on when the systematic searches are over.
    """

    count: int
    candidates: int = 512
    seed: int = 0
    samples: int = 1
    steps: int | None = 2
    batch: int = 8
    chunk: int = 32
    evolve: bool = True


@dataclass(frozen=True)
class Outcome:
    """``ended``: "complete", "candidates" or the name of the signal that stopped it. ``influence``: what block
    influence would drop. ``seconds``: of scoring ``scored`` candidates in this run, compilation included."""

    table: SweepTable
    ended: str
    influence: Drop
    scored: int
    seconds: float


def sweep(
    system: VideoSystem,
    prompts: Sequence[str],
    out: Path,
    options: SweepOptions,
    *,
    told: Callable[[str], None] = lambda line: None,
    progress: Callable[[SweepTable], None] = lambda table: None,
) -> Outcome:
    """Search which ``options.count`` blocks can go; ``out/sweep.parquet`` holds all candidates, and is gone on with
    where there is one. The first SIGINT or SIGTERM stops after the chunk under way.

    Raises UserError for options that do not fit the system, and for a table of another sweep.
    """
    blocks = system.config.diffusion_transformer.num_layers - 1
    plan(blocks, options.count, options.candidates, options.seed, evolve=options.evolve)  # refuses early
    generator = generator_of(system)
    told("recording what the whole denoiser meets")
    sampled = {"seed": options.seed, "samples": options.samples, "batch": options.batch}
    calibration = record(generator, prompts, steps=options.steps, **sampled)
    influence = choose_blocks(block_influence(system, prompts, generator=generator, **sampled).score, options.count)
    table = empty_table(system, prompts, options, calibration.levels)
    path = out / TABLE
    if path.exists():
        table.load(path)
        told(f"going on with {len(table.rows)} known candidates")
    population = Population(system, generator.envelopes, calibration, chunk=options.chunk)
    chosen = {"block influence": influence}
    strategies = plan(blocks, options.count, options.candidates, options.seed, evolve=options.evolve, chosen=chosen)
    before, start = len(table.rows), time.monotonic()
    with Interruption() as interruption:
        saved, asked = time.monotonic(), 0

        def stop() -> str | None:
            nonlocal asked
            asked += 1
            return interruption.name if jax.process_count() == 1 else agreed(interruption.name, asked)

        def evaluate(drops: list[Drop], strategy: str) -> None:
            nonlocal saved
            for drop, errors in zip(drops, population(drops), strict=True):
                table.add(drop, errors, strategy)
            if time.monotonic() - saved > SAVE_EVERY:
                save(table, path)
                saved = time.monotonic()
            progress(table)

        try:
            ended = run(strategies, table, evaluate, size=population.size, candidates=options.candidates, stop=stop)
        finally:
            if len(table.rows) > before:
                save(table, path)
    ended = interruption.name or ended if ended == "stopped" else ended
    return Outcome(table, ended, influence, len(table.rows) - before, time.monotonic() - start)


def save(table: SweepTable, path: Path) -> None:
    """Write the table, where this is the process that writes."""
    if jax.process_index() == 0:
        table.save(path)


def empty_table(
    system: VideoSystem, prompts: Sequence[str], options: SweepOptions, levels: list[tuple[int, float]]
) -> SweepTable:
    """Its settings are all that a score depends on."""
    config, params = system.config.diffusion_transformer, system.params[DENOISER]
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params)):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.asarray(leaf).tobytes())
    settings = {
        "denoiser": digest.hexdigest(),
        "config": config.to_dict(),
        "sampling": asdict(system.sampling),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        **{name: getattr(options, name) for name in ("seed", "samples", "steps")},
    }
    stacked, whole = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params["blocks"], params))
    blocks = config.num_layers - 1
    sizes = {"blocks": blocks, "block_parameters": stacked // blocks, "other_parameters": whole - stacked}
    return SweepTable(settings, levels, len(prompts), **sizes)


def blocks_to_drop(system: VideoSystem, layers: int | None, parameters: int | None) -> int:
    """How many blocks have to go for a budget in ``layers`` (the last one counts) or the denoiser's ``parameters``.

    Raises UserError unless exactly one is given and can be met by removing at least one block.
    """
    if (layers is None) == (parameters is None):
        raise UserError("sweep: expected one of --budget LAYERS and --budget-parameters N")
    depth, params = system.config.diffusion_transformer.num_layers, system.params[DENOISER]
    if layers is None:
        stacked, whole = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params["blocks"], params))
        each, rest = stacked // (depth - 1), whole - stacked
        if not rest <= parameters < whole:
            raise UserError(f"sweep: budget of {parameters} parameters, expected {rest} to {whole - 1}")
        layers = 1 + (parameters - rest) // each
    if not 1 <= layers < depth:
        raise UserError(f"sweep: budget of {layers} layers, expected 1 to {depth - 1}: the denoiser has {depth}")
    return depth - layers
