"""Latent scaling. Frame 0 of a video has statistics of its own: its codec sees no motion there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError

Numbers = float | tuple[float, ...]


@dataclass(frozen=True)
class LatentStats:
    """Shift and scale of a codec's latents: ``(z - shift) * scale``; the ``video_`` pair is for frames 1, 2, ...

    Each is one number or one per channel. The constants belong to the checkpoint.
    """

    shift: Numbers
    scale: Numbers
    video_shift: Numbers
    video_scale: Numbers

    def __post_init__(self):
        for name in ("shift", "scale", "video_shift", "video_scale"):
            value = getattr(self, name)
            value = tuple(map(float, value)) if np.ndim(value) else float(value)
            if not np.all(np.isfinite(value)) or ("scale" in name and not np.all(np.asarray(value) > 0)):
                raise UserError(f"latent statistics: {name} is {value}, expected finite numbers (scales: above 0)")
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LatentStats:
        """From a config with all four names; other keys are ignored."""
        names = ("shift", "scale", "video_shift", "video_scale")
        missing = [name for name in names if name not in config]
        if missing:
            raise UserError(f"latent statistics: missing {', '.join(missing)}; expected all of {', '.join(names)}")
        return cls(**{name: config[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content; lists where there is one number per channel."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def _per_frame(self, first: Numbers, later: Numbers, latents: Array) -> Array:
        frames, channels = latents.shape[-4], latents.shape[-1]
        for value in (first, later):
            if isinstance(value, tuple) and len(value) != channels:
                raise UserError(f"latent statistics: {len(value)} values for latents with {channels} channels")
        rows = np.stack([np.broadcast_to(first, channels)] + [np.broadcast_to(later, channels)] * (frames - 1))
        return jnp.asarray(rows[:, None, None, :], jnp.float32)

    def normalise(self, latents: Float[Array, "*b t h w c"]) -> Float[Array, "*b t h w c"]:
        """Codec latents -> what the diffusion model sees."""
        shift = self._per_frame(self.shift, self.video_shift, latents)
        scale = self._per_frame(self.scale, self.video_scale, latents)
        return ((latents - shift) * scale).astype(latents.dtype)

    def denormalise(self, latents: Float[Array, "*b t h w c"]) -> Float[Array, "*b t h w c"]:
        """The inverse of ``normalise``: what the decoder takes."""
        shift = self._per_frame(self.shift, self.video_shift, latents)
        scale = self._per_frame(self.scale, self.video_scale, latents)
        return (latents / scale + shift).astype(latents.dtype)


NEODRAGON = LatentStats(shift=0.1490, scale=0.5430, video_shift=-0.2343, video_scale=0.3031)
"""Hard-coded in the official inference code."""

PYRAMID_FLOW = LatentStats(shift=0.1490, scale=1 / 1.8415, video_shift=-0.2343, video_scale=1 / 3.0986)
"""The teacher's own, as used in its training."""
