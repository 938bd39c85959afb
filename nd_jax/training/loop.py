"""The loop: shapes, shardings, state, steps, metrics, checkpoints, and a polite end. The same for every recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from nd_jax.errors import UserError
from nd_jax.training.checkpoint import CheckpointStore
from nd_jax.training.compiles import CompileCounter
from nd_jax.training.interrupt import Interruption, agreed
from nd_jax.training.lock import run_lock
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.metrics import LaggedMetrics, MetricsWriter, TrainingDiverged, first_non_finite
from nd_jax.training.program import Program
from nd_jax.training.progress import TrainingProgress
from nd_jax.training.recipe import Batch, Recipe, State
from nd_jax.training.watch import NO_WORK, Clock, Tracer, Work, productive_seconds, use_cache


@dataclass(frozen=True)
class LoopConfig:
    """How long to train and what to keep."""

    steps: int = 1000
    """Steps of the whole run, those before an interruption included."""
    max_seconds: float | None = None
    """Wall-clock budget of the whole run in seconds, compilation, evaluation and earlier parts included."""
    log_every: int = 1
    """Steps between two lines of metrics. Every step's metrics are checked all the same."""
    save_every: int = 500
    """Steps between two checkpoints (0: none in between); one is also written at the end and when interrupted."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept forever."""
    seed: int = 0
    """Of the initial state and of every random number in the steps."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    trace: tuple[int, int] | None = None
    """First and last step to record for XProf, in the run's folder ``trace``."""
    compile_cache: str | None = None
    """Folder for compiled programs, so that a restart or another host need not compile; None: JAX's own setting."""


@dataclass(frozen=True)
class Every:
    """Something to do with the state every ``steps`` steps (0: never). What belongs to the end needs the ``Outcome``.

    ``call(step, state)`` may return numbers to log. It must not keep the state: the next step donates it.
    """

    steps: int
    call: Callable[[int, State], Mapping[str, float] | None]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: State
    step: int
    reason: str
    """``steps`` or ``seconds`` (budget used up), or the name of a signal: run again to continue."""
    seconds: float
    """Wall-clock time of the whole run, earlier parts included."""
    step_compilations: int
    """1, or 0 if there was nothing left to do."""
    other_compilations: int
    """Programs compiled while stepping, callbacks excluded; more than none means something runs op by op."""

    @property
    def finished(self) -> bool:
        """Whether a budget was used up, rather than the run interrupted."""
        return self.reason in ("steps", "seconds")


def train(
    recipe: Recipe,
    batches: Iterator[Batch],
    config: LoopConfig,
    folder: Path | str,
    *,
    preset: str,
    settings: Mapping[str, Any] | None = None,
    pinned: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    given: tuple = (),
    callbacks: Sequence[Every] = (),
    work: Work = NO_WORK,
    quiet: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Trains until a budget is used up or somebody interrupts; resumes if ``folder`` holds a checkpoint.

    ``batches`` yields this process's examples as numpy trees, forever, and has ``get_state`` and ``set_state`` (a Grain
    iterator, say). ``settings`` (JSON) is stored with checkpoints; ``preset`` and ``pinned`` (e.g. worker count and
    batch size, on which the order of examples depends) must be the same in every part of a run.
    ``given`` goes to the recipe's ``init``. ``work`` is what a step amounts to, for rates and utilisation.

    The folder receives ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` and ``run.lock``. A resumed run is
    bit-equal to one that was never interrupted, on the same mesh.

    Raises ``TrainingDiverged`` naming step, metric and parameter groups as soon as a metric is not finite, before such
    a state is saved; ``UserError`` for a mesh, a batch or a checkpoint that does not fit, for data that ends, for a
    folder that another run uses or that cannot be written, and for a damaged checkpoint.
    """
    began = time.monotonic()
    folder = Path(folder)
    use_cache(config.compile_cache)
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    program = Program(recipe, mesh, jax.random.key(config.seed), given)
    leader = jax.process_index() == 0

    identity = {"preset": preset, **(pinned or {})}
    with (
        run_lock(folder),
        Interruption() as interruption,
        CheckpointStore(folder, identity, settings, keep=config.keep, keep_every=config.keep_every) as store,
        CompileCounter() as compiles,
    ):
        # ---- resume or begin
        start, earlier, productive = store.latest(), 0.0, 0.0
        if start is None:
            start, state = 0, program.initial_state()
        else:
            state, record = store.restore(program.state, batches)
            earlier, productive = record["seconds"], productive_seconds(record)

        def seconds() -> float:
            return earlier + time.monotonic() - began

        def why_stop(step: int) -> str | None:
            if step >= config.steps:
                return "steps"
            late = config.max_seconds is not None and seconds() >= config.max_seconds
            reason = interruption.name or ("seconds" if late else None)
            return reason if jax.process_count() == 1 else agreed(reason, step)

        reason = why_stop(start)
        if reason is not None and (start or reason != "seconds"):
            return Outcome(state, start, reason, seconds(), 0, 0)

        # ---- compile
        progress = TrainingProgress(preset, start, config.steps, enabled=leader and not quiet, console=console)
        tracer = Tracer(config.trace, folder)
        writer = MetricsWriter(folder, start) if leader else None
        try:
            progress.say(f"compiling for {_told(mesh)}" + (f", resuming at step {start}" if start else ""))
            names, run_step = program.metric_names, program.compile_step()
            progress.say(f"compiled in {compiles.seconds:.1f} s")
            if interruption.name is not None and jax.process_count() == 1:
                return Outcome(state, start, interruption.name, seconds(), 1, 0)
            # The host runs this many steps ahead: that is all the prefetching the device needs, and since the host
            # does things in order, the data iterator stands exactly at the step being saved. Several collectives under
            # way at once can deadlock on fake CPU devices, so there it waits.
            lag = 0 if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu" else 2
            metrics = LaggedMetrics(names, lag)
            clock = Clock(work, folder, productive)

            def settle(everything: bool = False) -> None:
                store.check()
                for done, values in metrics.ready(everything=everything):
                    if first_non_finite(values) is not None:
                        raise TrainingDiverged(done, values, store.kept())
                    if done % max(config.log_every, 1) == 0 or done == config.steps:
                        values |= clock.lap(done)
                        if writer is not None:
                            writer.write(done, values)
                        progress.update(done, values)

            def save() -> None:
                settle(everything=True)
                if writer is not None:
                    writer.flush()
                store.save(step, state, batches, seconds(), clock.productive)

            # ---- run
            step, stray = start, 0
            while True:
                known = compiles.count
                asked = time.monotonic()
                batch = _next(batches, step, interruption)
                clock.waited += time.monotonic() - asked
                tracer.before(step + 1)
                state, packed = run_step(state, program.put(batch))
                step += 1
                tracer.after(step, packed)
                metrics.push(step, packed)
                settle()
                stray += compiles.count - known
                for callback in callbacks:
                    if callback.steps and step % callback.steps == 0:
                        settle(everything=True)
                        values = callback.call(step, state)
                        if values and writer is not None:
                            writer.write(step, {name: float(value) for name, value in values.items()})
                if config.save_every and step % config.save_every == 0:
                    save()
                reason = why_stop(step)
                if reason is not None:
                    break

            # ---- end
            if int(state.step) != step:
                raise TypeError(f"the recipe's state says step {int(state.step)} after step {step}")
            save()
            store.wait()
            return Outcome(state, step, reason, seconds(), 1, stray)
        finally:
            tracer.close()
            progress.close()
            if writer is not None:
                writer.close()


def _next(batches: Iterator[Batch], step: int, interruption: Interruption) -> Batch:
    try:
        return next(batches)
    except StopIteration:
        raise UserError(f"the data ended after step {step}; expected a stream without end, so repeat it") from None
    except Exception as error:
        if interruption.name is not None:  # the signal ended the processes that read, too
            raise KeyboardInterrupt from error
        raise


def _told(mesh: Mesh) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
