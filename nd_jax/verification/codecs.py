"""Video codec cases: encode and decode, whole, in chunks, tiled; activations; the posterior."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.models import causal_vae
from nd_jax.models.causal_vae import posterior
from nd_jax.models.streaming import decode_stream, decode_tiled, encode_stream, encode_tiled
from nd_jax.pyramid.normalise import NEODRAGON
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.layouts import from_torch, to_torch
from nd_jax.verification.weights import load, parts_in, read_config, with_zeros

ROWS = re.compile(r"video_rows_(\d+)_(\d+)")


class Codec:
    """A case's codec, and each subcase's way of using it."""

    def __init__(self, case: Case):
        self.config = read_config(case, "video_vae")
        # Some cases have the encoder's half of the weights only, some the decoder's.
        parts = parts_in(case, "video_vae", self.config)
        self.params = with_zeros(load(case, "video_vae", self.config, parts=parts), "video_vae", self.config)
        self.definition = causal_vae.definition(self.config, dtype=case.dtype)
        self._compiled: dict[tuple, Callable] = {}

    def run(self, subcase: Subcase, method: str, x: jax.Array, **options: Any) -> jax.Array:
        """``encode`` or ``decode`` in the mode that meta.json names."""
        about, codec = subcase.about, self.definition
        if "tile_sample_min_size" in about:
            tiled = {"encode": encode_tiled, "decode": decode_tiled}[method]
            return tiled(codec, self.params, x, subcase.parameter("tile_sample_min_size", int), self.config.tile_scale)
        if "window_size" in about:
            return self.in_chunks(method, x, subcase.parameter("window_size", int))
        if "frame-by-frame" in str(about.get("note")) or "sequential" in subcase.name:
            return self.in_chunks(method, x, 1)
        key = (method, *sorted(options.items()))
        if key not in self._compiled:
            self._compiled[key] = jax.jit(lambda params, x: getattr(codec.bind(params), method)(x, **options))
        return self._compiled[key](self.params, x)

    def in_chunks(self, method: str, x: jax.Array, window: int) -> jax.Array:
        """Piece by piece: ``window`` + 1 frames, then ``window`` at a time."""
        if method == "encode":
            return encode_stream(self.definition, self.params, x, window)
        return jnp.concatenate(list(decode_stream(self.definition, self.params, x, window)), axis=1)

    def activations(self, subcase: Subcase, method: str, x: jax.Array) -> dict[str, jax.Array]:
        """Outputs of the codec's stages by name."""

        def staged(params: Any, x: jax.Array) -> dict[str, jax.Array]:
            seen: dict[str, jax.Array] = {}
            getattr(self.definition.bind(params), method)(x, activations=seen)
            return seen

        return jax.jit(staged)(self.params, x)

    def encode(self, subcase: Subcase) -> Outputs:
        video = from_torch(subcase.input("video"))
        moments = self.run(subcase, "encode", video)
        yield "moments", to_torch(moments)
        yield from self.posterior(subcase, moments)
        if any(output.startswith("act/") for output in subcase.outputs):
            yield from kept(subcase, self.activations(subcase, "encode", video))
        if "latent_mean" in subcase.outputs:
            mean = posterior(moments).mean
            yield "latent_mean", to_torch(mean)
            yield "video", to_torch(self.run(subcase, "decode", mean))

    def posterior(self, subcase: Subcase, moments: jax.Array) -> Outputs:
        code = posterior(moments)
        yield from ((name, to_torch(getattr(code, name))) for name in ("mean", "logvar", "std"))
        if "noise" in subcase.inputs:
            latent = code.sample(from_torch(subcase.inputs["noise"]))
            yield "latent", to_torch(latent)
            yield "scaled_latent", to_torch(NEODRAGON.normalise(latent))

    def decode(self, subcase: Subcase) -> Outputs:
        latent = from_torch(subcase.input("latent"))
        options = {"drop_first": False} if "is_init_image=False" in str(subcase.about.get("mode")) else {}
        video = to_torch(self.run(subcase, "decode", latent, **options))
        yield "video", video
        yield "frame_means", video.mean(axis=(3, 4))
        for output in subcase.outputs:
            if match := ROWS.fullmatch(output):
                yield output, video[:, :, :, int(match[1]) : int(match[2])]
        if any(output.startswith(("act/", "block/", "post_quant")) for output in subcase.outputs):
            seen = self.activations(subcase, "decode", latent)
            yield "post_quant", to_torch(seen["post_quant_conv"])
            yield from kept(subcase, seen)
            for name, x in seen.items():
                yield f"block/{name}", to_torch(x.reshape(-1, *x.shape[2:]))


def kept(subcase: Subcase, activations: dict[str, jax.Array]) -> Outputs:
    """Activations of as many first frames as the case recorded."""
    for name, x in activations.items():
        recorded = subcase.outputs.get(f"act/{name}")
        if recorded is not None:
            yield f"act/{name}", to_torch(x)[:, :, : recorded.shape[2]]


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """Load the codec once; the function returned recomputes one subcase."""
    codec = Codec(case)

    def outputs(subcase: Subcase) -> Outputs:
        if "video" in subcase.inputs:
            return codec.encode(subcase)
        if "latent" in subcase.inputs:
            return codec.decode(subcase)
        return codec.posterior(subcase, from_torch(subcase.input("moments")))

    return outputs
