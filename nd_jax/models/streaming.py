"""Coding a clip piece by piece from the host, along time or in tiles: few compiled programs and little memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nd_jax.models.functional import Definition, Params
from nd_jax.models.tiling import tiled


def encode_stream(
    codec: Definition, params: Params, video: Float[Array, "b t h w 3"], window: int = 8
) -> Float[Array, "b t2 h2 w2 m"]:
    """Moments of a clip, encoded ``window`` frames at a time (the first time one more)."""
    chunks, frames = [], None
    for start, stop in _pieces(video.shape[1], window):
        moments, frames = _encode(codec, params, video[:, start:stop], frames)
        chunks.append(moments)
    return jnp.concatenate(chunks, axis=1)


def decode_stream(
    codec: Definition, params: Params, latent: Float[Array, "b t h w c"], window: int = 1
) -> Iterator[Float[Array, "b t2 h2 w2 3"]]:
    """Video of a clip as it is decoded, ``window`` latent frames at a time (the first time one more)."""
    frames = None
    for start, stop in _pieces(latent.shape[1], window):
        video, frames = _decode(codec, params, latent[:, start:stop], frames)
        yield video


def encode_tiled(
    codec: Definition, params: Params, video: Float[Array, "b t h w 3"], tile: int, scale: int
) -> Float[Array, "b t2 h2 w2 m"]:
    """Moments from overlapping tiles of ``tile`` pixels, ``scale`` pixels to a latent. Not equal to the whole."""
    return tiled(lambda x: _encode(codec, params, x, None)[0], video, tile, tile // scale)


def decode_tiled(
    codec: Definition, params: Params, latent: Float[Array, "b t h w c"], tile: int, scale: int
) -> Float[Array, "b t2 h2 w2 3"]:
    """Video from overlapping tiles of ``tile`` pixels, ``scale`` pixels to a latent. Not equal to the whole."""
    return tiled(lambda z: _decode(codec, params, z, None)[0], latent, tile // scale, tile)


def _pieces(length: int, window: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < length:
        stop = min(start + window + (start == 0), length)
        yield start, stop
        start = stop


@partial(jax.jit, static_argnums=0)
def _encode(codec: Definition, params: Params, video: Array, frames: tuple[Array, ...] | None):
    return codec.bind(params).encode_chunk(video, frames)


@partial(jax.jit, static_argnums=0)
def _decode(codec: Definition, params: Params, latent: Array, frames: tuple[Array, ...] | None):
    return codec.bind(params).decode_chunk(latent, frames)
