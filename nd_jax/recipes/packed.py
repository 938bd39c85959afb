"""What one packed forward of the denoiser reads: every column's clips and layout, and the prompts' conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from nd_jax.models.system import Conditions
from nd_jax.pyramid.examples import FlowExample
from nd_jax.pyramid.layout import LayoutArrays
from nd_jax.pyramid.targets import NoisyClip


class Packed(NamedTuple):
    """One packed forward: per column an example and its layout, and conditions with rows ``b * G + g``."""

    examples: list[FlowExample]
    layouts: list[LayoutArrays]
    conditions: Conditions

    @property
    def timesteps(self) -> Float[Array, " b*g"]:
        """In the rows of the conditions."""
        return jnp.stack([example.timestep for example in self.examples], axis=1).reshape(-1)

    @property
    def inputs(self) -> tuple:
        """The denoiser's arguments."""
        clips = [example.clips for example in self.examples]
        return clips, self.conditions.text, self.conditions.pooled, self.timesteps, self.layouts

    def at(self, clips: Sequence[NoisyClip]) -> Packed:
        """The same scene with other current clips: their noisy latents, targets and timesteps, one per column."""
        examples = [
            each._replace(clips=(*each.clips[:-1], c.noisy), target=c.target, timestep=c.timestep, local=c.local)
            for each, c in zip(self.examples, clips, strict=True)
        ]
        return self._replace(examples=examples)

    def with_inputs(self, inputs: Sequence[Float[Array, "b t h w c"]]) -> Packed:
        """The same scene with other noisy latents at the same levels."""
        pairs = zip(self.examples, inputs, strict=True)
        return self._replace(examples=[each._replace(clips=(*each.clips[:-1], z)) for each, z in pairs])
