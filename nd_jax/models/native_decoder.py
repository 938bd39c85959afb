"""Pyramid-Flow's own causal video decoder: the mirror image of the encoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.models.causal_blocks import FrameGroupNorm, MiddleBlock, ResidualBlock, UpsampleSpace, UpsampleTime
from nd_jax.models.causal_conv import Carry, CausalConv
from nd_jax.models.codec_config import NativeVAEConfig


class UpBlock(nnx.Module):
    """Residual blocks, then space and then time upsampling where the level asks for them."""

    def __init__(self, inputs: int, outputs: int, layers: int, space: bool, time: bool, groups: int, **kw):
        self.resnets = nnx.List(
            ResidualBlock(inputs if i == 0 else outputs, outputs, groups, **kw) for i in range(layers)
        )
        self.upsamplers = nnx.List([UpsampleSpace(outputs, **kw)] if space else [])
        self.temporal_upsamplers = nnx.List([UpsampleTime(outputs, **kw)] if time else [])

    def __call__(self, x: Float[Array, "b t h w c"], carry: Carry, drop_first: bool) -> Float[Array, "b t2 h2 w2 o"]:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x, carry)
        for layer in self.temporal_upsamplers:
            x = layer(x, carry, drop_first)
        return x


class NativeDecoder(nnx.Module):
    """Latents [B, 1 + k, h, w, C] to video [B, 1 + 8k, 8h, 8w, 3]; without ``drop_first`` 8(1 + k) frames."""

    def __init__(self, config: NativeVAEConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        channels, groups = config.decoder_block_out_channels[::-1], config.decoder_norm_num_groups
        self.conv_in = CausalConv(config.decoder_in_channels, channels[0], **kw)
        self.mid_block = MiddleBlock(channels[0], groups, **kw)
        self.up_blocks = nnx.List(
            UpBlock(channels[max(i - 1, 0)], width, layers, space, time, groups, **kw)
            for i, (width, layers, space, time) in enumerate(
                zip(
                    channels,
                    config.decoder_layers_per_block,
                    config.decoder_spatial_up_sample,
                    config.decoder_temporal_up_sample,
                    strict=True,
                )
            )
        )
        self.conv_norm_out = FrameGroupNorm(groups, channels[-1])
        self.conv_out = CausalConv(channels[-1], config.decoder_out_channels, **kw)

    def __call__(
        self,
        latent: Float[Array, "b t h w c"],
        carry: Carry,
        drop_first: bool = True,
        activations: dict[str, Array] | None = None,
    ) -> Float[Array, "b t2 h2 w2 3"]:
        """``activations``, if given, is filled with the output of every stage."""
        seen = {} if activations is None else activations
        x = seen["conv_in"] = self.conv_in(latent, carry)
        x = seen["mid"] = self.mid_block(x, carry)
        for i, block in enumerate(self.up_blocks):
            x = seen[f"up_{i}"] = block(x, carry, drop_first)
        x = seen["conv_norm_out"] = self.conv_norm_out(x)
        x = seen["conv_out"] = self.conv_out(jax.nn.silu(x), carry)
        return x
