"""The pyramidal video diffusion transformer (skeleton)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from nd_jax.models.embeddings import PatchEmbed, TimeTextEmbed
from nd_jax.models.functional import Definition
from nd_jax.models.mmdit_block import Block, xavier
from nd_jax.models.norms import AdaLayerNorm


@dataclass(frozen=True)
class MMDiTConfig:
    """Fields of the official config.json."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192
    max_num_frames: int = 200
    qk_norm: str | None = "rms_norm"
    use_temporal_causal: bool = True
    interp_condition_pos: bool = True
    context_embedder: bool = False

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class MMDiT(nnx.Module):
    def __init__(self, config: MMDiTConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        width, patch = config.width, config.patch_size
        self.pos_embed = PatchEmbed(config.in_channels, width, patch, dtype=dtype, rngs=rngs)
        self.time_text_embed = TimeTextEmbed(config.pooled_projection_dim, width, rngs=rngs)
        if config.context_embedder:
            self.context_embedder = nnx.Linear(
                config.joint_attention_dim, width, kernel_init=xavier, dtype=dtype, rngs=rngs
            )

        @nnx.split_rngs(splits=config.num_layers - 1)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, rngs=rngs)

        self.blocks = stack(rngs)
        self.last_block = Block(config, last=True, dtype=dtype, rngs=rngs)
        self.norm_out = AdaLayerNorm(width, 2, dtype=dtype, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.proj_out = nnx.Linear(width, patch * patch * config.in_channels, kernel_init=zeros, dtype=dtype, rngs=rngs)


def definition(config: MMDiTConfig, *, dtype=jnp.float32) -> Definition:
    return Definition(lambda rngs: MMDiT(config, dtype=dtype, rngs=rngs))
