"""Stages, sigmas and timesteps of pyramidal flow matching (Pyramidal Flow Matching, arXiv 2410.05954, section 3).

Global noise runs from 1 (noise) to 0 (clean); stage ``i`` covers ``[end_i, start_i]`` of it at its own resolution.
Inside a stage the *local* noise ``s`` runs from 1 to 0. Tables are numpy: constants of a program, never traced.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError

GRIDS = ("official", "plain")


@dataclass(frozen=True)
class Schedule:
    """The noise windows of every stage; hashable, so it can be a static argument.

    ``stages`` counts resolutions (0 = lowest), ``gamma`` is the correlation of the block noise between stages,
    ``stage_range`` gives the ``stages + 1`` borders as fractions of the table (default: equal parts).
    Raises ``UserError`` for borders that do not rise from 0 to 1 or other values outside their range.
    """

    stages: int = 3
    gamma: float = 1 / 3
    num_train_timesteps: int = 1000
    stage_range: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.stages < 1 or self.num_train_timesteps < 2 * self.stages:
            raise UserError(
                f"schedule: {self.stages} stages over {self.num_train_timesteps} training timesteps; expected at least "
                "1 stage and 2 timesteps for each; change stages or num_train_timesteps"
            )
        if not self.gamma > 0:
            raise UserError(f"schedule: gamma is {self.gamma}, expected a positive number; 1/3 is the usual value")
        borders = self.stage_range
        if borders is None:
            borders = tuple(i / self.stages for i in range(self.stages + 1))
        borders = tuple(float(border) for border in borders)
        starts = [int(border * self.num_train_timesteps) for border in borders]
        rising = all(a < b for a, b in itertools.pairwise(starts))
        if len(borders) != self.stages + 1 or borders[0] != 0 or borders[-1] != 1 or not rising:
            raise UserError(
                f"schedule: stage_range is {list(borders)}, expected {self.stages + 1} borders rising from 0 to 1 "
                "at least one training timestep apart; leave it out for equal parts"
            )
        object.__setattr__(self, "stage_range", borders)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Schedule:
        """From a config with (some of) this class's field names; other keys are ignored."""
        names = ("stages", "gamma", "num_train_timesteps", "stage_range")
        return cls(**{name: config[name] for name in names if config.get(name) is not None})

    # Global noise ---------------------------------------------------------------------------------------------------

    @cached_property
    def timesteps(self) -> np.ndarray:
        """All training timesteps, N .. 1, float32 [N]."""
        return np.arange(self.num_train_timesteps, 0, -1, dtype=np.float32)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Global noise of ``timesteps``, float32 [N]."""
        return self.timesteps / np.float32(self.num_train_timesteps)

    @cached_property
    def orig_start_sigmas(self) -> np.ndarray:
        """Start of each stage before the correction, float64 [stages]: table entries, hence rounded to float32."""
        starts = [int(border * self.num_train_timesteps) for border in self.stage_range[:-1]]
        return self.sigmas[starts].astype(np.float64)

    @cached_property
    def end_sigmas(self) -> np.ndarray:
        """Global noise ``end_i`` at the end of each stage, float64 [stages]; 0 for the last."""
        return np.append(self.orig_start_sigmas[1:], 0.0)

    @cached_property
    def start_sigmas(self) -> np.ndarray:
        """Global noise ``start_i`` at the start of each stage, float64 [stages].

        Corrected so that upsampling and renoising the end of stage i-1 lands on it (arXiv 2410.05954, eq. 14-15).
        """
        clean = 1 - self.orig_start_sigmas[1:]
        corrected = clean / (math.sqrt(1 + 1 / self.gamma) * (1 - clean) + clean)
        return np.concatenate([self.orig_start_sigmas[:1], 1 - corrected])

    def global_sigma(self, stage: int, local: Any) -> Any:
        """Global noise at local noise ``local``: ``s * start_i + (1 - s) * end_i``. Any array type, traceable."""
        return local * float(self.start_sigmas[stage]) + (1 - local) * float(self.end_sigmas[stage])

    # What the network is told ----------------------------------------------------------------------------------------

    @cached_property
    def timestep_ratios(self) -> np.ndarray:
        """Share of the timestep axis before and after each stage, float64 [stages, 2], by length of its window."""
        lengths = self.start_sigmas - self.end_sigmas
        borders = np.concatenate([[0.0], np.cumsum(lengths)]) / lengths.sum()
        borders[-1] = 1.0
        return np.stack([borders[:-1], borders[1:]], axis=1)

    @cached_property
    def timestep_borders(self) -> np.ndarray:
        """First timestep of each stage and the one where it would end, float32 [stages, 2]."""
        entries = (self.timestep_ratios * self.num_train_timesteps).astype(np.int64)
        return self.timesteps[np.minimum(entries, self.num_train_timesteps - 1)]

    @cached_property
    def timesteps_per_stage(self) -> np.ndarray:
        """Timestep tables, float32 [stages, N], evenly spaced and stopping one entry short of the stage's end."""
        first, end = self.timestep_borders[:, :1], self.timestep_borders[:, 1:]
        step = (end - first) / np.float32(self.num_train_timesteps)  # in float32, as models were trained with
        return first + np.arange(self.num_train_timesteps, dtype=np.float32) * step

    @cached_property
    def sigmas_per_stage(self) -> np.ndarray:
        """Local noise of ``timesteps_per_stage``, float64 [stages, N]."""
        return np.tile(np.linspace(1, 0, self.num_train_timesteps + 1)[:-1], (self.stages, 1))

    @cached_property
    def timestep_per_stage_range(self) -> np.ndarray:
        """First minus last timestep of each stage's table, float64 [stages]."""
        table = self.timesteps_per_stage.astype(np.float64)
        return table[:, 0] - table[:, -1]

    def timestep(self, stage: int, local: Any) -> Any:
        """Timestep ``t_i(s)`` at any local noise, linear through the stage's table. Any array type, traceable."""
        first, end = (float(border) for border in self.timestep_borders[stage])
        return end + local * (first - end)

    def steps(self, stage: int, n: int, grid: str = "official") -> tuple[np.ndarray, np.ndarray]:
        """Timesteps [n] and local noise levels [n + 1] (ending in 0) of ``n`` Euler steps, float64.

        ``official``: even from 1 to the table's last entry, then 0, so the last of several steps covers almost nothing;
        ``plain``: even from 1 to 0. Raises ``UserError`` for an unknown stage or grid, or n < 1.
        """
        if not 0 <= stage < self.stages:
            raise UserError(f"schedule: stage {stage} does not exist, expected 0 to {self.stages - 1}")
        if n < 1:
            raise UserError(f"schedule: {n} steps at stage {stage}, expected at least 1")
        if grid == "official":
            table, sigmas = self.timesteps_per_stage[stage].astype(np.float64), self.sigmas_per_stage[stage]
            return np.linspace(table[0], table[-1], n), np.append(np.linspace(sigmas[0], sigmas[-1], n), 0.0)
        if grid == "plain":
            local = np.linspace(1, 0, n + 1)
            return self.timestep(stage, local[:-1]), local
        raise UserError(f"schedule: unknown step grid '{grid}', expected one of {', '.join(GRIDS)}")


def rounded(value: Any, dtype: Any) -> Array:
    """``value`` in float32, rounded as if stored as ``dtype``. Unlike a cast there and back, XLA may not drop it."""
    info = jnp.finfo(dtype)
    value = jnp.asarray(value, jnp.float32)
    return value if info.bits >= 32 else jax.lax.reduce_precision(value, info.nexp, info.nmant)


def euler_step(
    sample: Float[Array, "b t h w c"], velocity: Float[Array, "b t h w c"], sigma: Any, sigma_next: Any
) -> Float[Array, "b t h w c"]:
    """``z + (s_next - s) v``, added in float32; the product carries the rounding of the velocity's own dtype."""
    delta = rounded(rounded(sigma_next, velocity.dtype) - rounded(sigma, velocity.dtype), velocity.dtype)
    product = rounded(delta * velocity.astype(jnp.float32), velocity.dtype)
    return (sample.astype(jnp.float32) + product).astype(sample.dtype)
