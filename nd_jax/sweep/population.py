"""Populations of pruned denoisers, scored on fixed inputs by one program for each stage of the pyramid.

Candidates are data, spread over the data axes of a mesh. A device runs its candidates one after the other, so memory is
that of one candidate. They are sorted, and the blocks with which a candidate starts as the one before it are not run
again: tokens after every block are kept from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from nd_jax.models.functional import Definition
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.layout import Envelope, layout_arrays
from nd_jax.pyramid.sampler import CountingJit, twice
from nd_jax.sweep.calibration import Calibration
from nd_jax.sweep.units import Candidates, Drop, Units, sort_keys
from nd_jax.system import VideoSystem
from nd_jax.training.mesh import MeshConfig, batch_entry, batch_ways, make_mesh


class Population:
    """Scores candidates by their distance from the whole denoiser.

    Args:
        system: whose denoiser; its weights are copied to every device.
        envelopes: one for each stage, those that ``calibration`` was recorded with.
        calibration: the inputs.
        units: what candidates drop; default: blocks.
        mesh: devices; default: all of them, each with candidates of its own.
        chunk: candidates of a device in one call of a program: what can be interrupted and saved.
    """

    def __init__(
        self,
        system: VideoSystem,
        envelopes: Sequence[Envelope],
        calibration: Calibration,
        *,
        units: Units | None = None,
        mesh: Mesh | None = None,
        chunk: int = 32,
    ):
        self.calibration = calibration
        self.units = Units(system.config.diffusion_transformer) if units is None else units
        self.mesh = make_mesh(MeshConfig(data=-1, fsdp=1)) if mesh is None else mesh
        self.size = chunk * batch_ways(self.mesh)
        whole, spread = NamedSharding(self.mesh, P()), NamedSharding(self.mesh, P(batch_entry(self.mesh)))
        self._params = jax.device_put(system.params[DENOISER], whole)
        self._conditions = [jax.device_put(each, whole) for each in calibration.conditions]
        self._inputs = [jax.device_put(call.inputs, whole) for call in calibration.calls]
        self._spread, self._programs = spread, []
        for envelope in envelopes:
            errors = spread_errors(system.definitions[DENOISER], envelope, self.mesh, guided=calibration.guided)
            self._programs.append(CountingJit(errors, out_shardings=whole))

    @property
    def compilations(self) -> int:
        """Programs compiled so far: one for each stage, however many candidates of whatever size."""
        return sum(program.compilations for program in self._programs)

    def __call__(self, drops: Sequence[Drop]) -> Float[np.ndarray, "p levels videos"]:
        """Mean squared velocity error of at most ``size`` candidates, by noise level and video, float32.

        Videos are in order of prompts, a prompt's samples side by side. Means over both branches of guidance and the
        latent frames of the video.
        """
        if not 0 < len(drops) <= self.size:
            raise ValueError(f"{len(drops)} candidates, expected 1 to {self.size}")
        candidates = self.units.encode(drops)
        chosen, rows = arrange(sort_keys(candidates), batch_ways(self.mesh), self.size)
        given = jax.device_put(jax.tree.map(lambda x: x[chosen], candidates), self._spread)
        calls = self.calibration.calls
        found = [
            self._programs[call.stage](self._params, self._conditions[call.batch], inputs, given)
            for call, inputs in zip(calls, self._inputs, strict=True)
        ]
        levels, batches = self.calibration.levels, len(self.calibration.conditions)
        videos = found[0].shape[1]
        sums, counts = np.zeros((len(drops), len(levels), batches, videos)), np.zeros((len(levels), batches, 1))
        for call, errors in zip(calls, found, strict=True):
            level = levels.index((call.stage, call.timestep))
            sums[:, level, call.batch] += np.asarray(errors, np.float64)[rows]
            counts[level, call.batch] += 1
        return (sums / counts).reshape(len(drops), len(levels), -1).astype(np.float32)


def spread_errors(denoiser: Definition, envelope: Envelope, mesh: Mesh, *, guided: bool) -> Callable:
    """``candidate_errors`` of (params, conditions, inputs, candidates), candidates split over the mesh's data axes."""
    errors, entry = partial(candidate_errors, denoiser, envelope, guided=guided), P(batch_entry(mesh))
    return jax.shard_map(errors, mesh=mesh, in_specs=(P(), P(), P(), entry), out_specs=entry, check_vma=False)


def arrange(keys: np.ndarray, ways: int, size: int) -> tuple[Int[np.ndarray, " size"], Int[np.ndarray, " p"]]:
    """Which of the candidates with these keys [p, n] goes to each of ``size`` rows for ``ways`` devices, and the row of
    each candidate: in order, so that neighbours start alike, and evenly; the last of each device repeats, which costs
    nothing."""
    order = np.lexsort(keys.T[::-1])
    chosen, rows = np.empty((ways, size // ways), np.int64), np.empty(len(keys), np.int64)
    for way, mine in enumerate(np.array_split(order, ways)):
        rows[mine] = way * (size // ways) + np.arange(len(mine))
        chosen[way] = mine[-1] if len(mine) else order[-1]
        chosen[way, : len(mine)] = mine
    return chosen.ravel(), rows


def candidate_errors(
    denoiser, envelope, params, conditions, inputs, candidates: Candidates, *, guided
) -> Float[jax.Array, "p b"]:
    """Every candidate's squared velocity error in every video of one call; both branches of guidance count alike."""

    def error(velocity, whole):
        return jnp.mean(jnp.square(velocity - whole), axis=(1, 2, 3, 4))

    errors = each_velocity(denoiser, envelope, params, conditions, inputs, candidates, error, guided=guided)
    return jnp.mean(errors.reshape(len(candidates.kept), 2 if guided else 1, -1), axis=1)


def each_velocity(denoiser, envelope, params, conditions, inputs, candidates, reduce, *, guided):
    """``reduce(velocity, the whole denoiser's)`` of every candidate at one call, float32, guidance's rows doubled."""
    z, timestep, history, unit = inputs
    if guided:
        z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
    layout = layout_arrays(envelope, unit, conditions.mask)
    arguments = params, [(*history, z)], conditions.text, conditions.pooled, timestep, [layout]
    (whole,), states = denoiser(*arguments, reducer=lambda _, image, __, text: (image, text))
    whole = whole.astype(jnp.float32)

    blocks = jnp.arange(candidates.kept.shape[1], dtype=candidates.kept.dtype)
    opened = (
        [] if candidates.gates is None else [jax.tree.map(lambda g: jnp.ones(g.shape[1:], g.dtype), candidates.gates)]
    )

    def run(last, candidate):
        known, _ = last

        def fresh():
            (velocity,), after = denoiser(*arguments, kept=candidate.kept, gates=candidate.gates, known=known)
            return after, reduce(velocity.astype(jnp.float32), whole)

        before = Candidates(known[0], known[2] if opened else None)
        same = jax.tree.leaves(jax.tree.map(lambda one, other: jnp.all(one == other), candidate, before))
        last = jax.lax.cond(jnp.stack(same).all(), lambda: last, fresh)
        return last, last[1]

    start = (blocks, states, *opened), reduce(whole, whole)
    return jax.lax.scan(run, start, candidates)[1]
