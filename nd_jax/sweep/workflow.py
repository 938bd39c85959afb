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
from nd_jax.generate import Generator
from nd_jax.influence import generator_of
from nd_jax.models.system import DENOISER
from nd_jax.sweep.calibration import Calibration, record
from nd_jax.sweep.cheap import CheapScores, cheap_scores
from nd_jax.sweep.costs import CostModel, cost_model
from nd_jax.sweep.population import Population
from nd_jax.sweep.search import plan, run
from nd_jax.sweep.table import SweepTable
from nd_jax.sweep.units import Drop, Kind, Units
from nd_jax.system import VideoSystem
from nd_jax.training.interrupt import Interruption, agreed
from nd_jax.training.paths import named_leaves

TABLE, SCORES = "sweep.parquet", "scores.json"
SAVE_EVERY = 10.0
"""Seconds between two writes of the table."""


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep measures and how long it looks.

    ``count`` units are to go; ``candidates`` at most are scored, on ``samples`` videos of every prompt, at ``steps``
    noise levels of every stage (None: all). ``batch`` videos and ``chunk`` candidates of a device go through a program
    at a time; neither changes a score. ``evolve``: search on when the systematic searches are over. ``units``: what
    they are, with ``slices`` of every MLP. ``probes`` directions for Taylor scores and ``gate_steps`` of learned gates;
    0: without them.
    """

    count: int
    candidates: int = 512
    seed: int = 0
    samples: int = 1
    steps: int | None = 2
    batch: int = 8
    chunk: int = 32
    evolve: bool = True
    units: Kind = "blocks"
    slices: int = 8
    probes: int = 4
    gate_steps: int = 100


@dataclass(frozen=True)
class Outcome:
    """``ended``: "complete", "candidates" or the name of the signal that stopped it. ``chosen``: what cheap scores
    would drop, by name. ``seconds``: of scoring ``scored`` candidates in this run, compilation included."""

    table: SweepTable
    units: Units
    ended: str
    chosen: dict[str, Drop]
    cheap: CheapScores
    scored: int
    seconds: float

    def finalists(self, count: int, most: int) -> dict[Drop, str]:
        """The whole network, the ``most`` best that drop ``count`` units, and what other scores chose, with names."""
        right = sorted((d for d in self.table.rows if len(d) == count), key=lambda d: (self.table.errors[d], d))
        found = {(): "whole", **{drop: f"best {place + 1}" for place, drop in enumerate(right[:most])}}
        for name, drop in self.chosen.items():
            if drop in self.table.rows:
                found[drop] = f"{found[drop]}, {name}" if drop in found else name
        shown = {drop: " ".join(map(self.units.name, drop[:8])) + (" ..." if len(drop) > 8 else "") for drop in found}
        return {drop: f"{name}: without {shown[drop]}" if drop else name for drop, name in found.items()}

    @property
    def baseline(self) -> Drop | None:
        """The choice that others are compared with: block influence's, or Taylor scores' where blocks stay whole."""
        return next(iter(self.chosen.values()), None)


def sweep(
    system: VideoSystem,
    prompts: Sequence[str],
    out: Path,
    options: SweepOptions,
    *,
    generator: Generator | None = None,
    costs: CostModel | None = None,
    told: Callable[[str], None] = lambda line: None,
    progress: Callable[[SweepTable], None] = lambda table: None,
) -> Outcome:
    """Search which ``options.count`` units can go; ``out/sweep.parquet`` holds all candidates, and is gone on with
    where there is one. The first SIGINT or SIGTERM stops after the chunk under way.

    Raises UserError for options that do not fit the system, and for a table of another sweep.
    """
    units = Units(system.config.diffusion_transformer, options.units, options.slices)
    plan(len(units), options.count, options.candidates, options.seed, evolve=options.evolve)  # refuses early
    generator = generator or generator_of(system)
    costs = costs or cost_model(generator, units)
    told("recording what the whole denoiser meets")
    sampled = {"seed": options.seed, "samples": options.samples, "batch": options.batch}
    calibration = record(generator, prompts, steps=options.steps, **sampled)
    table = empty_table(system, prompts, options, calibration, costs)
    path = out / TABLE
    if path.exists():
        table.load(path)
        told(f"going on with {len(table.rows)} known candidates")
    cheap = cheap_scores(generator, prompts, calibration, units, options, table.settings, out / SCORES, told=told)
    population = Population(system, generator.envelopes, calibration, units=units, chunk=options.chunk)
    chosen = cheap.choices(options.count)
    strategies = plan(len(units), options.count, options.candidates, options.seed, evolve=options.evolve, chosen=chosen)
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
    return Outcome(table, units, ended, chosen, cheap, len(table.rows) - before, time.monotonic() - start)


def save(table: SweepTable, path: Path) -> None:
    """Write the table, where this is the process that writes."""
    if jax.process_index() == 0:
        table.save(path)


def empty_table(
    system: VideoSystem,
    prompts: Sequence[str],
    options: SweepOptions,
    calibration: Calibration,
    costs: CostModel | None = None,
) -> SweepTable:
    """Its settings are all that a score depends on."""
    config = system.config.diffusion_transformer
    settings = {
        "denoiser": denoiser_digest(system),
        "config": config.to_dict(),
        "compute": np.dtype(system.compute).name,
        "sampling": asdict(system.sampling),
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        **{name: getattr(options, name) for name in ("seed", "samples", "steps", "units")},
        **({"slices": options.slices} if options.units == "mlp" else {}),
    }
    units = len(Units(config, options.units, options.slices))
    return SweepTable(settings, calibration.levels, len(prompts), units=units, samples=options.samples, costs=costs)


def denoiser_digest(system: VideoSystem) -> str:
    """SHA-256 of the denoiser's names, shapes and numbers."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(system.params[DENOISER])):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def units_to_drop(costs: CostModel, units: Units, left: int | None = None, **budgets: float | None) -> int:
    """How many units have to go so that ``left`` of them stay (of blocks the last one, which always does, counts), or
    that the rest costs at most one of ``budgets``, by the names of ``Cost.figures``.

    Raises UserError unless exactly one is given and can be met by removing at least one unit.
    """
    given = {name: value for name, value in budgets.items() if value is not None}
    if (left is not None) + len(given) != 1:
        raise UserError(
            "sweep: expected one of --budget, --budget-parameters, --budget-macs, --budget-bytes and --budget-ms"
        )
    if left is None:
        ((name, value),) = given.items()
        return costs.count(name, value)
    whole = len(units) + (units.kind == "blocks")
    if not whole - len(units) <= left < whole or not left:
        what = "layers" if units.kind == "blocks" else units.kind
        raise UserError(f"sweep: budget of {left} {what}, expected 1 to {whole - 1}: the denoiser has {whole}")
    return whole - left
