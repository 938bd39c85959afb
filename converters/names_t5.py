"""Names of the T5 encoder: T5EncoderWithProjection (DT5) and plain T5EncoderModel (T5-XXL)."""

from __future__ import annotations

from nd_jax.converters.tables import Extras, Rule, embedding, linear, norm
from nd_jax.models.t5 import T5Config


def _prefix(config: T5Config) -> str:
    return "" if config.out_dim is None else "encoder."  # the encoder is an attribute of the class with projection


def rules(config: T5Config) -> list[Rule]:
    """All parameters. The relative position table is layer 0's on the torch side."""
    prefix = _prefix(config)
    path, block = "encoder/block/layer", f"{prefix}encoder.block.{{layer}}.layer"
    table = f"{prefix}encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    return [
        *embedding("shared", f"{prefix}shared"),
        *embedding("encoder/relative_attention_bias", table),
        *linear(f"{path}/0/SelfAttention/{{word=q|k|v|o}}", f"{block}.0.SelfAttention.{{word}}"),
        *linear(f"{path}/1/DenseReluDense/{{word=wi|wi_0|wi_1|wo}}", f"{block}.1.DenseReluDense.{{word}}"),
        *norm(f"{path}/{{part=0|1}}/layer_norm", f"{block}.{{part}}.layer_norm"),
        *norm("encoder/final_layer_norm", f"{prefix}encoder.final_layer_norm"),
        *linear("final_projection/0", "final_projection.0"),
        *linear("final_projection/1", "final_projection.3"),  # 1 is the ReLU, 2 the dropout
    ]


def extras(config: T5Config) -> Extras:
    """The embedding's tied second name; the decoder of a full T5, of which only the encoder is wanted."""
    prefix = _prefix(config)
    return Extras(
        twins={f"{prefix}encoder.embed_tokens.weight": f"{prefix}shared.weight"},
        ignored=() if prefix else (r"decoder\..*", r"lm_head\.weight"),
    )
