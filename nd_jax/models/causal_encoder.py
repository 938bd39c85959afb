"""The causal video encoder of both codecs: pixels to moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.models.causal_blocks import Downsample, FrameGroupNorm, MiddleBlock, ResidualBlock
from nd_jax.models.causal_conv import Carry, CausalConv
from nd_jax.models.codec_config import CodecConfig


class DownBlock(nnx.Module):
    """Residual blocks, then space and then time downsampling where the level asks for them."""

    def __init__(self, inputs: int, outputs: int, layers: int, space: bool, time: bool, groups: int, **kw):
        self.resnets = nnx.List(
            ResidualBlock(inputs if i == 0 else outputs, outputs, groups, **kw) for i in range(layers)
        )
        self.downsamplers = nnx.List([Downsample(outputs, "space", **kw)] if space else [])
        self.temporal_downsamplers = nnx.List([Downsample(outputs, "time", **kw)] if time else [])

    def __call__(self, x: Float[Array, "b t h w c"], carry: Carry) -> Float[Array, "b t2 h2 w2 o"]:
        for layer in [*self.resnets, *self.downsamplers, *self.temporal_downsamplers]:
            x = layer(x, carry)
        return x


class CausalEncoder(nnx.Module):
    """Video [B, 1 + 8k, H, W, 3] to moments before ``quant_conv`` [B, 1 + k, H/8, W/8, 2C] (official scales)."""

    def __init__(self, config: CodecConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        channels, groups = config.encoder_block_out_channels, config.encoder_norm_num_groups
        self.conv_in = CausalConv(config.encoder_in_channels, channels[0], **kw)
        self.down_blocks = nnx.List(
            DownBlock(channels[max(i - 1, 0)], width, layers, space, time, groups, **kw)
            for i, (width, layers, space, time) in enumerate(
                zip(
                    channels,
                    config.encoder_layers_per_block,
                    config.encoder_spatial_down_sample,
                    config.encoder_temporal_down_sample,
                    strict=True,
                )
            )
        )
        self.mid_block = MiddleBlock(channels[-1], groups, **kw)
        self.conv_norm_out = FrameGroupNorm(groups, channels[-1])
        self.conv_out = CausalConv(channels[-1], 2 * config.encoder_out_channels, **kw)

    def __call__(
        self, video: Float[Array, "b t h w c"], carry: Carry, activations: dict[str, Array] | None = None
    ) -> Float[Array, "b t2 h2 w2 m"]:
        """``activations``, if given, is filled with the output of every stage."""
        seen = {} if activations is None else activations
        x = seen["conv_in"] = self.conv_in(video, carry)
        for i, block in enumerate(self.down_blocks):
            x = seen[f"down_{i}"] = block(x, carry)
        x = seen["mid"] = self.mid_block(x, carry)
        x = seen["conv_norm_out"] = self.conv_norm_out(x)
        x = seen["conv_out"] = self.conv_out(jax.nn.silu(x), carry)
        return x
