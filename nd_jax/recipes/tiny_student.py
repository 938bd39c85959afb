"""TAEHV as a student: its configuration beside a teacher's encoder, its parameters, levels both decoders share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nd_jax.errors import UserError
from nd_jax.models.causal_vae import AsymmetricVAEConfig, NativeVAEConfig, definition
from nd_jax.models.codec_config import CodecConfig
from nd_jax.models.functional import Params


class TinyStudent:
    """TAEHV as a student: the decoder's half of a codec."""

    def __init__(self, config: AsymmetricVAEConfig, *, dtype=jnp.float32):
        self.config, self.half = config, definition(config, half="decoder", dtype=dtype)

    def init(self, key: jax.Array) -> Params:
        return self.half.init(key)

    def __call__(self, params: Params, latent: Array, activations: dict[str, Array] | None = None) -> Array:
        return self.half.bind(params).decode(latent, activations=activations)


def student_config(
    teacher: CodecConfig, channels: Sequence[int], space_growth: Sequence[bool], time_growth: Sequence[bool]
) -> AsymmetricVAEConfig:
    """The teacher's encoder and latent constants with a TAEHV decoder of the wanted form.

    Raises UserError for a decoder that does not grow as the encoder shrinks.
    """
    for what, flags, scale in (
        ("space", space_growth, teacher.space_scale),
        ("time", time_growth, teacher.time_scale),
    ):
        if 2 ** sum(flags) != scale:
            raise UserError(
                f"decoder: {what}_growth {flags} grows {2 ** sum(flags)} times, the encoder shrinks {scale} times; "
                f"expected {scale.bit_length() - 1} times True"
            )
    shared = {each.name: getattr(teacher, each.name) for each in dataclasses.fields(CodecConfig)}
    return AsymmetricVAEConfig(
        **shared,
        decoder_num_features=tuple(channels),
        decoder_space_upscale=tuple(space_growth),
        decoder_time_upscale=tuple(time_growth),
        spatial_downsample_scale=teacher.space_scale,
        temporal_downsample_scale=teacher.time_scale,
    )


@dataclass(frozen=True)
class Level:
    """Features of both decoders with the same size: after a transition of the student, after a native block."""

    student: str
    native: str
    channels: tuple[int, int]
    skip: int
    """First frames that the native decoder has dropped by then."""


def matching_levels(teacher: NativeVAEConfig, student: AsymmetricVAEConfig) -> list[Level]:
    """The levels at which the decoders' features have one size. Raises UserError when there is none."""
    native: dict[tuple[int, int], tuple[str, int]] = {}
    space = time = 1
    widths = teacher.decoder_block_out_channels[::-1]
    flags = zip(teacher.decoder_spatial_up_sample, teacher.decoder_temporal_up_sample, strict=True)
    for index, (grows_space, grows_time) in enumerate(flags):
        space, time = space * (1 + grows_space), time * (1 + grows_time)
        native.setdefault((space, time), (f"up_{index}", widths[index]))
    found, space, time = [], 1, 1
    flags = zip(student.decoder_space_upscale, student.decoder_time_upscale, strict=True)
    for index, (grows_space, grows_time) in enumerate(flags):
        space, time = space * (1 + grows_space), time * (1 + grows_time)
        if (space, time) in native:
            name, width = native[space, time]
            entry = 3 + 6 * index + 5  # three entries before the first level, six in each
            channels = (student.decoder_num_features[index + 1], width)
            found.append(Level(f"{entry:02d}", name, channels, time - 1))
    if not found:
        raise UserError("decoder: no level of the student has the size of a native one; set features to 0")
    return found
