"""Names of the denoiser: PyramidMMDiT, and Pyramid-Flow's teacher with its context embedder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nd_jax.converters.tables import Buffer, Extras, Rule, conv2d, linear, norm
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.positions import axis_table

_WORDS = "{word=to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_add_out}"
_NORMS = "{word=norm_q|norm_k|norm_add_q|norm_add_k}"


def _block(path: str, torch: str) -> list[Rule]:
    return [
        *linear(f"{path}/{{word=norm1|norm1_context}}/linear", f"{torch}.{{word}}.linear"),
        *linear(f"{path}/attn/{_WORDS}", f"{torch}.attn.{{word}}"),
        *linear(f"{path}/attn/to_out", f"{torch}.attn.to_out.0"),
        *norm(f"{path}/attn/{_NORMS}", f"{torch}.attn.{{word}}"),
        *linear(f"{path}/{{word=ff|ff_context}}/up", f"{torch}.{{word}}.net.0.proj"),
        *linear(f"{path}/{{word=ff|ff_context}}/down", f"{torch}.{{word}}.net.2"),
    ]


def rules(config: MMDiTConfig) -> list[Rule]:
    """All parameters. The stacked blocks are numbers 0 .. num_layers - 2, the last block is num_layers - 1."""
    return [
        *conv2d("pos_embed/proj", "pos_embed.proj"),
        *linear(
            "time_text_embed/{part=timestep_embedder|text_embedder}/{word=linear_1|linear_2}",
            "time_text_embed.{part}.{word}",
        ),
        *linear("{word=context_embedder|proj_out}", "{word}"),
        *linear("norm_out/linear", "norm_out.linear"),
        *_block("blocks", "transformer_blocks.{layer}"),
        *_block("last_block", f"transformer_blocks.{config.num_layers - 1}"),
    ]


def extras(config: MMDiTConfig) -> Extras:
    """The table of spatial positions, a buffer in every checkpoint: [1, grid * grid, width], row by row."""
    grid, width = config.pos_embed_max_size, config.width

    def blocks() -> Iterator[np.ndarray]:
        axis = axis_table(width // 2, grid, config.sample_size // config.patch_size).astype(np.float32)
        for row in axis:
            yield np.concatenate([axis, np.broadcast_to(row, axis.shape)], axis=1)

    what = "the sin-cos table that pos_embed_max_size, sample_size and patch_size of config.json describe"
    return Extras(buffers={"pos_embed.pos_embed": Buffer((1, grid * grid, width), blocks, what)})
