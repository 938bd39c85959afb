"""The two video codecs: one causal encoder, either with the small TAEHV decoder or with its own mirror image.

Video is [B, T, H, W, 3] in [-1, 1] with T = 1 + 8k; latents are [B, 1 + k, H/8, W/8, C] before any normalisation.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.causal_conv import Carry, CausalConv
from nd_jax.models.causal_encoder import CausalEncoder
from nd_jax.models.codec_config import AsymmetricVAEConfig, CodecConfig, NativeVAEConfig, config_from_dict
from nd_jax.models.functional import Definition
from nd_jax.models.native_decoder import NativeDecoder
from nd_jax.models.posterior import Posterior, posterior
from nd_jax.models.taehv import TAEHVDecoder

__all__ = [
    "AsymmetricVAEConfig",
    "NativeVAEConfig",
    "Posterior",
    "VideoVAE",
    "config_from_dict",
    "definition",
    "posterior",
]

Frames = tuple[Array, ...]
"""What a chunk hands to the next one: remembered frames, one array per layer with memory."""


Half = Literal["encoder", "decoder"]


class VideoVAE(nnx.Module):
    """Encoder, decoder and the 1x1x1 convolutions on both sides of the latent; or one ``half`` of that."""

    def __init__(self, config: CodecConfig, *, half: Half | None = None, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        kw = {"dtype": dtype, "rngs": rngs}
        latent = config.encoder_out_channels
        if half != "decoder":
            self.encoder = CausalEncoder(config, **kw)
            self.quant_conv = CausalConv(2 * latent, 2 * latent, 1, **kw)
        if half == "encoder":
            return
        native = isinstance(config, NativeVAEConfig)
        self.decoder = NativeDecoder(config, **kw) if native else TAEHVDecoder(config, **kw)
        has_post = not native or config.add_post_quant_conv
        self.post_quant_conv = CausalConv(latent, latent, 1, **kw) if has_post else None

    def encode(
        self, video: Float[Array, "b t h w 3"], activations: dict[str, Array] | None = None
    ) -> Float[Array, "b t2 h2 w2 m"]:
        """Moments of a whole clip; ``posterior(moments)`` splits them.

        Raises ``UserError`` for frame counts other than 1 + 8k or sides that 8 does not divide (official scales).
        """
        self._check_video(video)
        return self._moments(video, Carry(), activations)

    def encode_chunk(
        self, video: Float[Array, "b t h w 3"], frames: Frames | None = None
    ) -> tuple[Float[Array, "b t2 h2 w2 m"], Frames]:
        """Moments of the next piece of a clip: first 1 + 8k frames with ``frames`` None, then 8k with those returned.

        Equal to ``encode`` of the whole clip up to rounding.
        """
        self._check_video(video, first=frames is None)
        carry = Carry(frames)
        return self._moments(video, carry), carry.frames

    def decode(
        self,
        latent: Float[Array, "b t h w c"],
        drop_first: bool = True,
        activations: dict[str, Array] | None = None,
    ) -> Float[Array, "b t2 h2 w2 3"]:
        """Video of a whole clip of latents, not clamped: 8T - 7 frames, or all 8T without ``drop_first``.

        ``activations``, if given, is filled with the output of every stage (native) or entry (tiny decoder).
        """
        x = self._post_quant(latent, Carry())
        if activations is not None:
            activations["post_quant_conv"] = x
        if isinstance(self.decoder, NativeDecoder):
            return self.decoder(x, Carry(), drop_first, activations)
        if activations is None:
            return self._trim(self.decoder(x), drop_first)
        outputs = self.decoder.entries(x)
        activations.update({f"{i:02d}": output for i, output in enumerate(outputs)})
        return self._trim(outputs[-1], drop_first)

    def decode_chunk(
        self, latent: Float[Array, "b t h w c"], frames: Frames | None = None
    ) -> tuple[Float[Array, "b t2 h2 w2 3"], Frames]:
        """Video of the next latent frames of a clip, equal to ``decode`` of the whole clip up to rounding.

        ``frames`` None starts a clip (8t - 7 frames come out); afterwards pass the frames returned (8t come out).
        """
        first = frames is None
        x = self._post_quant(latent, Carry())
        if isinstance(self.decoder, NativeDecoder):
            carry = Carry(frames)
            return self.decoder(x, carry, drop_first=first), carry.frames
        b, _, h, w, _ = latent.shape
        video, frames = self.decoder.stream(x, self.decoder.start(b, h, w, x.dtype) if first else frames)
        return self._trim(video, first), frames

    def __call__(
        self, video: Float[Array, "b t h w 3"], noise: Float[Array, "b t2 h2 w2 c"] | None = None
    ) -> tuple[Float[Array, "b t h w 3"], Posterior]:
        """Reconstruction through a posterior sample (through its mean without ``noise``), and the posterior."""
        code = posterior(self.encode(video))
        return self.decode(code.mean if noise is None else code.sample(noise)), code

    def _moments(self, video: Array, carry: Carry, activations: dict[str, Array] | None = None) -> Array:
        return self.quant_conv(self.encoder(video, carry, activations), carry)

    def _post_quant(self, latent: Array, carry: Carry) -> Array:
        return latent if self.post_quant_conv is None else self.post_quant_conv(latent, carry)

    def _trim(self, video: Array, drop_first: bool) -> Array:
        return video[:, self.config.frames_per_latent - 1 :] if drop_first else video

    def _check_video(self, video: Array, first: bool = True) -> None:
        _, t, h, w, _ = video.shape
        time, space = self.config.time_scale, self.config.space_scale
        alone = 1 if first else 0  # a clip's first frame is coded by itself
        if (t - alone) % time or t < 1:
            rule = f"1 + {time}k" if first else f"{time}k"
            legal = max(round((t - alone) / time), 1 - alone) * time + alone
            raise UserError(f"encode: {t} frames given, expected {rule}; the nearest legal number is {legal}")
        if h % space or w % space:
            near = "x".join(str(max(1, round(n / space)) * space) for n in (h, w))
            raise UserError(f"encode: frames are {h}x{w}, expected multiples of {space}; the nearest size is {near}")


def definition(
    config: AsymmetricVAEConfig | NativeVAEConfig, *, half: Half | None = None, dtype=jnp.float32
) -> Definition:
    """The codec as structure plus dict of arrays; ``dtype`` is that of convolutions and matrix products.

    ``half`` leaves the other half's parameters out: the two halves' dicts together are the codec's.
    Use ``definition(config).bind(params).encode(video)`` inside a traced function.
    """
    return Definition(lambda rngs: VideoVAE(config, half=half, dtype=dtype, rngs=rngs))
