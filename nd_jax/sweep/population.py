"""Populations of pruned denoisers, scored on fixed inputs by one program for each stage of the pyramid.

Candidates are data, spread over the data axes of a mesh. A device runs its candidates one after the other, so memory is
that of one candidate, and the blocks before the first one that a candidate lacks are the whole denoiser's: they are
computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from nd_jax.models.system import DENOISER
from nd_jax.pyramid.layout import Envelope, layout_arrays
from nd_jax.pyramid.sampler import CountingJit, twice
from nd_jax.recipes.pruning import ragged_population
from nd_jax.sweep.calibration import Calibration
from nd_jax.system import VideoSystem
from nd_jax.training.mesh import MeshConfig, batch_entry, batch_ways, make_mesh

Drop = tuple[int, ...]
"""A candidate: the blocks that go, in ascending order."""


class Population:
    """Scores candidates by their distance from the whole denoiser.

    Args:
        system: whose denoiser; its weights are copied to every device.
        envelopes: one for each stage, those that ``calibration`` was recorded with.
        calibration: the inputs.
        mesh: devices; default: all of them, each with candidates of its own.
        chunk: candidates of a device in one call of a program: what can be interrupted and saved.
    """

    def __init__(
        self,
        system: VideoSystem,
        envelopes: Sequence[Envelope],
        calibration: Calibration,
        *,
        mesh: Mesh | None = None,
        chunk: int = 16,
    ):
        self.calibration = calibration
        self.blocks = system.config.diffusion_transformer.num_layers - 1
        self.mesh = make_mesh(MeshConfig(data=-1, fsdp=1)) if mesh is None else mesh
        self.size = chunk * batch_ways(self.mesh)
        whole, spread = NamedSharding(self.mesh, P()), NamedSharding(self.mesh, P(batch_entry(self.mesh)))
        self._params = jax.device_put(system.params[DENOISER], whole)
        self._conditions = [jax.device_put(each, whole) for each in calibration.conditions]
        self._inputs = [jax.device_put(call.inputs, whole) for call in calibration.calls]
        self._spread, self._programs = spread, []
        for envelope in envelopes:
            errors = partial(candidate_errors, system.definitions[DENOISER], envelope, guided=calibration.guided)
            entry = P(batch_entry(self.mesh))
            shared = jax.shard_map(
                errors, mesh=self.mesh, in_specs=(P(), P(), P(), entry), out_specs=entry, check_vma=False
            )
            self._programs.append(CountingJit(shared, out_shardings=whole))

    @property
    def compilations(self) -> int:
        """Programs compiled so far: one for each stage, however many candidates of whatever size."""
        return sum(program.compilations for program in self._programs)

    def __call__(self, drops: Sequence[Drop]) -> Float[np.ndarray, "p levels prompts"]:
        """Mean squared velocity error of at most ``size`` candidates, by noise level and prompt, float32.

        Means over both branches of guidance, the units of the video, and the samples of a prompt.
        """
        if not 0 < len(drops) <= self.size:
            raise ValueError(f"{len(drops)} candidates, expected 1 to {self.size}")
        filler = [()] * (self.size - len(drops))  # the whole network: nothing left to run but the last block
        rows = np.arange(self.size).reshape(-1, self.size // batch_ways(self.mesh)).T.ravel()  # dealt out in turn
        kept = np.empty((self.size, self.blocks), np.int32)
        kept[rows] = ragged_population(self.blocks, [*drops, *filler])
        kept = jax.device_put(kept, self._spread)
        calls = self.calibration.calls
        found = [
            self._programs[call.stage](self._params, self._conditions[call.batch], inputs, kept)
            for call, inputs in zip(calls, self._inputs, strict=True)
        ]
        levels, batches = self.calibration.levels, len(self.calibration.conditions)
        videos = found[0].shape[1]
        sums, counts = np.zeros((len(drops), len(levels), batches, videos)), np.zeros((len(levels), batches, 1))
        for call, errors in zip(calls, found, strict=True):
            level = levels.index((call.stage, call.timestep))
            sums[:, level, call.batch] += np.asarray(errors, np.float64)[rows[: len(drops)]]
            counts[level, call.batch] += 1
        means = (sums / counts).reshape(len(drops), len(levels), self.calibration.prompts, self.calibration.samples)
        return means.mean(axis=-1).astype(np.float32)


def candidate_errors(denoiser, envelope, params, conditions, inputs, candidates, *, guided) -> Float[jax.Array, "p b"]:
    """Every candidate's squared velocity error in every video of one call; both branches of guidance count alike."""
    velocity = candidate_velocities(denoiser, envelope, params, conditions, inputs, guided=guided)
    whole = velocity(None)
    errors = jax.lax.map(lambda kept: jnp.mean(jnp.square(velocity(kept) - whole), axis=(1, 2, 3, 4)), candidates)
    return jnp.mean(errors.reshape(len(candidates), 2 if guided else 1, -1), axis=1)


def candidate_velocities(denoiser, envelope, params, conditions, inputs, *, guided):
    """A function from kept blocks (None: all) to the velocity of one call, in float32; the whole denoiser runs once."""
    z, timestep, history, unit = inputs
    if guided:
        z, timestep, history = twice(z), twice(timestep), tuple(map(twice, history))
    layout = layout_arrays(envelope, unit, conditions.mask)
    arguments = params, [(*history, z)], conditions.text, conditions.pooled, timestep, [layout]
    whole, known = denoiser(*arguments, reducer=lambda _, image, __, text: (image, text))

    def velocity(kept=None):
        found = whole if kept is None else denoiser(*arguments, kept=kept, known=known)
        return found[0].astype(jnp.float32)

    return velocity
