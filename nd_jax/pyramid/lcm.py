"""Latent consistency sampling (arXiv 2310.04378) of the first frame: a few steps from noise to latent.

Noise prediction, DDPM's variance schedule, no clipping. Each step goes to an estimate of the clean latent and, except
for the last one, back to the next timestep's noise level with fresh noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError

SIGMA_DATA = 0.5


class LCMStep(NamedTuple):
    """One step's results, each [B, H, W, C]: the estimate of the clean latent, the same after the boundary scalings,
    and the next step's sample (the last step's is ``denoised``)."""

    predicted_original: Float[Array, "b h w c"]
    denoised: Float[Array, "b h w c"]
    prev_sample: Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True)
class LCMSchedule:
    """The tables. Defaults are those of the official first-frame generator."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    original_inference_steps: int = 4
    timestep_scaling: float = 10.0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LCMSchedule:
        """Read a scheduler_config.json. Raises ``UserError`` for values that are not supported.

        ``set_alpha_to_one`` and ``steps_offset`` have no effect on these steps.
        """
        fixed = {
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "prediction_type": "epsilon",
            "rescale_betas_zero_snr": False,
            "thresholding": False,
            "trained_betas": None,
        }
        for key, expected in fixed.items():
            if config.get(key, expected) != expected:
                raise UserError(f"scheduler config key {key!r} is {config[key]!r}; only {expected!r} is supported")
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config})

    @cached_property
    def betas(self) -> Float[np.ndarray, " n"]:
        """Variances added by each timestep, float32."""
        roots = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps)
        return np.square(roots.astype(np.float32))

    @cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, " n"]:
        """Share of the signal's variance left at each timestep, a float32 cumulative product."""
        return np.cumprod(np.float32(1) - self.betas, dtype=np.float32)

    def timesteps(self, steps: int, original: int | None = None) -> np.ndarray:
        """``steps`` timesteps out of ``original`` ones (default: the config's), highest first; int64.

        Raises ``UserError`` for more steps than there are.
        """
        original = self.original_inference_steps if original is None else original
        if not 1 <= steps <= original <= self.num_train_timesteps:
            raise UserError(f"LCM: {steps} steps out of {original}; expected 1 to {original} of at most 1000")
        all_of_them = np.arange(1, original + 1) * (self.num_train_timesteps // original) - 1
        chosen = np.floor(np.linspace(0, original, num=steps, endpoint=False)).astype(np.int64)
        return all_of_them[::-1][chosen]

    def boundary_scalings(self, timestep: int) -> tuple[float, float]:
        """``c_skip`` and ``c_out``: at timestep 0 the sample itself, far from it the prediction alone."""
        scaled = float(timestep) * self.timestep_scaling
        total = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / total, scaled / total**0.5

    def step(
        self,
        noise_pred: Float[Array, "b h w c"],
        sample: Float[Array, "b h w c"],
        timestep: int,
        following: int | None,
        noise: Float[Array, "b h w c"] | None = None,
    ) -> LCMStep:
        """From ``timestep`` to ``following``; ``None`` ends the walk, without noise."""
        signal = self.alphas_cumprod[timestep]
        c_skip, c_out = self.boundary_scalings(timestep)
        clean = (sample - np.sqrt(1 - signal) * noise_pred) / np.sqrt(signal)
        denoised = np.float32(c_out) * clean + np.float32(c_skip) * sample
        if following is None:
            return LCMStep(clean, denoised, denoised)
        return LCMStep(clean, denoised, self.add_noise(denoised, noise, np.asarray([following])))

    def add_noise(
        self, original: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], timesteps: np.ndarray
    ) -> Float[Array, "b h w c"]:
        """Latents at the noise levels of ``timesteps`` [B] or [1]."""
        signal = self.alphas_cumprod[timesteps].reshape(-1, *[1] * (original.ndim - 1))
        return np.sqrt(signal) * original + np.sqrt(1 - signal) * noise


def lcm_sample(
    schedule: LCMSchedule,
    predict: Callable[[Array, int], Array],
    initial: Float[Array, "b h w c"],
    step_noise: Sequence[Float[Array, "b h w c"]],
    timesteps: Sequence[int],
    trace: Callable[[int, Array, LCMStep], None] = lambda index, noise_pred, step: None,
) -> Float[Array, "b h w c"]:
    """The walk from noise to a clean latent.

    Args:
        schedule: tables.
        predict: (sample, timestep) -> noise prediction.
        initial: standard normal noise; neither it nor the network's input is scaled.
        step_noise: fresh noise after every step but the last.
        timesteps: highest first.
        trace: receives every step's number, prediction and results.
    """
    sample, after = jnp.asarray(initial), [*timesteps[1:], None]
    for index, (timestep, following) in enumerate(zip(timesteps, after, strict=True)):
        noise_pred = predict(sample, int(timestep))
        noise = None if following is None else step_noise[index]
        step = schedule.step(noise_pred, sample, int(timestep), following, noise)
        trace(index, noise_pred, step)
        sample = step.prev_sample
    return sample
