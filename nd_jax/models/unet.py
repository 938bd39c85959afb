"""The first-frame UNet: SDXL's family with the irregular depths of SSD-1B (arXiv 2401.02677).

Latents [B, H, W, 4], H and W of any size; text states of both CLIP towers side by side [B, S, D]; conditioned on the
timestep, the pooled text and six numbers about the picture (SDXL's micro-conditioning, arXiv 2307.01952).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from nd_jax.models.embeddings import Embedder, sinusoid
from nd_jax.models.functional import Definition
from nd_jax.models.image_blocks import Conv, Downsample, GroupNorm, ResBlock, Upsample
from nd_jax.models.unet_config import UNetConfig
from nd_jax.models.unet_transformer import ImageTransformer, Projection

__all__ = ["UNet", "UNetConfig", "definition", "guidance_embedding", "size_sinusoids"]

Seen = dict[str, Array] | None


def size_sinusoids(time_ids: Float[Array, "b 6"], channels: int) -> Float[Array, "b 6*channels"]:
    """Sinusoids of the six numbers side by side: original height and width, crop top and left, target height and
    width, in pixels."""
    return sinusoid(time_ids.reshape(-1), channels).reshape(time_ids.shape[0], -1)


def guidance_embedding(guidance: Float[Array, " b"], channels: int) -> Float[Array, "b channels"]:
    """Sinusoid of 1000 (guidance - 1), sine half first, for UNets that had guidance distilled into them
    (arXiv 2310.04378). Near 1000 the float32 angles are off by about 1e-4."""
    half = channels // 2
    rates = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = 1000 * (guidance.astype(jnp.float32)[:, None] - 1) * rates
    both = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(both, ((0, 0), (0, channels % 2)))


class TimeEmbedder(Embedder):
    """Linear, SiLU, linear, in float32; a guidance embedding is projected and added in front, if there is one."""

    def __init__(self, inputs: int, features: int, condition: int | None, *, rngs: nnx.Rngs):
        super().__init__(inputs, features, rngs=rngs)
        self.cond_proj = None if condition is None else Projection(condition, inputs, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"], condition: Float[Array, "b k"] | None = None) -> Float[Array, "b d"]:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        return super().__call__(x)


class UNetBlock(nnx.Module):
    """One level, on the way down, in the middle or on the way up: residual blocks, each followed by an attention layer
    if there are any (in the middle the attention lies between two residual blocks), then resampling."""

    def __init__(
        self,
        config: UNetConfig,
        widths: list[tuple[int, int]],
        depths: tuple[int, ...],
        heads: int,
        resample: str | None,
        **kw: Any,
    ):
        groups, outputs = config.norm_num_groups, widths[-1][1]
        self.resnets = nnx.List(
            ResBlock(before, after, groups, config.norm_eps, config.time_channels, **kw) for before, after in widths
        )
        self.attentions = nnx.List(
            ImageTransformer(outputs, config.cross_attention_dim, heads, depth, groups, **kw) for depth in depths
        )
        self.downsamplers = nnx.List([Downsample(outputs, (1, 1), **kw)] if resample == "down" else [])
        self.upsamplers = nnx.List([Upsample(outputs, **kw)] if resample == "up" else [])

    def down(self, x: Array, embedding: Array, text: Array) -> list[Array]:
        """Everything that the way up reads; the last one is the level's output."""
        outputs = []
        for index, block in enumerate(self.resnets):
            x = block(x, embedding)
            if self.attentions:
                x = self.attentions[index](x, text)
            outputs.append(x)
        return outputs + [downsample(x) for downsample in self.downsamplers]

    def middle(self, x: Array, embedding: Array, text: Array) -> Array:
        x = self.resnets[0](x, embedding)
        for attention, block in zip(self.attentions, list(self.resnets)[1:], strict=True):
            x = block(attention(x, text), embedding)
        return x

    def up(self, x: Array, embedding: Array, text: Array, skips: list[Array]) -> Array:
        """Takes its share from the end of ``skips``."""
        for index, block in enumerate(self.resnets):
            x = block(jnp.concatenate([x, skips.pop()], axis=-1), embedding)
            if self.attentions:
                x = self.attentions[index](x, text)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[1:3])
        return x


class UNet(nnx.Module):
    """``unet(sample, timestep, text, pooled, time_ids)`` predicts the noise in ``sample``."""

    def __init__(self, config: UNetConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        kw, channels, count = {"dtype": dtype, "rngs": rngs}, config.block_out_channels, config.layers_per_block
        first, levels, heads = channels[0], len(channels), config.attention_head_dim
        self.conv_in = Conv(config.in_channels, first, **kw)
        self.time_embedding = TimeEmbedder(first, config.time_channels, config.time_cond_proj_dim, rngs=rngs)
        self.add_embedding = Embedder(config.projection_class_embeddings_input_dim, config.time_channels, rngs=rngs)

        self.down_blocks = nnx.List()
        skips = [first]  # channels of what the way up reads
        for level, after in enumerate(channels):
            widths = [(skips[-1], after), *[(after, after)] * (count - 1)]
            last = level == levels - 1
            self.down_blocks.append(
                UNetBlock(config, widths, config.depths(level, down=True), heads[level], None if last else "down", **kw)
            )
            skips += [after] * (count if last else count + 1)

        depth, deepest = config.middle_depth, channels[-1]
        widths = [(deepest, deepest)] * (1 if depth is None else 2)
        self.mid_block = UNetBlock(config, widths, () if depth is None else (depth,), heads[-1], None, **kw)

        self.up_blocks = nnx.List()
        before = deepest
        for level, after in enumerate(channels[::-1]):
            widths = []
            for _ in range(count + 1):
                widths.append((before + skips.pop(), after))
                before = after
            resample = None if level == levels - 1 else "up"
            depths = config.depths(level, down=False)
            self.up_blocks.append(UNetBlock(config, widths, depths, heads[levels - 1 - level], resample, **kw))

        self.conv_norm_out = GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = Conv(first, config.out_channels, **kw)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Shaped[Array, " b"],
        text: Float[Array, "b s d"],
        pooled: Float[Array, "b p"],
        time_ids: Float[Array, "b 6"],
        guidance: Float[Array, "b k"] | None = None,
        *,
        activations: Seen = None,
    ) -> Float[Array, "b h w c"]:
        """Noise prediction.

        Args:
            sample: noisy latents.
            timestep: 0 to 999.
            text: last-but-one hidden states of both CLIP towers, side by side.
            pooled: projected pooled state of the second tower.
            time_ids: see ``size_sinusoids``.
            guidance: a ``guidance_embedding``, for UNets that have ``time_cond_proj_dim``.
            activations: if given, is filled with both embeddings and the output of every block.
        """
        seen = {} if activations is None else activations
        time = seen["time_embedding"] = self.time_embedding(
            sinusoid(timestep, self.config.block_out_channels[0]), guidance
        )
        sizes = size_sinusoids(time_ids, self.config.addition_time_embed_dim)
        added = jnp.concatenate([pooled.astype(jnp.float32), sizes], axis=-1)
        seen["add_embedding"] = self.add_embedding(added)
        embedding = time + seen["add_embedding"]
        text = text.astype(self.dtype)
        x = seen["conv_in"] = self.conv_in(sample)
        skips = [x]
        for level, block in enumerate(self.down_blocks):
            skips += block.down(skips[-1], embedding, text)
            seen[f"down_{level}"] = skips[-1]
        x = seen["mid"] = self.mid_block.middle(skips[-1], embedding, text)
        for level, block in enumerate(self.up_blocks):
            x = seen[f"up_{level}"] = block.up(x, embedding, text, skips)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


def definition(config: UNetConfig, *, dtype: Any = jnp.float32) -> Definition:
    """Structure of a UNet that computes in ``dtype`` (norms, softmax and both embeddings in float32)."""
    return Definition(lambda rngs: UNet(config, dtype=dtype, rngs=rngs))
