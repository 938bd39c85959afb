"""Names of the CLIP text towers: CLIPTextModel and CLIPTextModelWithProjection."""

from __future__ import annotations

from nd_jax.converters.tables import Extras, Rule, embedding, linear, norm
from nd_jax.models.clip import CLIPTextConfig


def rules(config: CLIPTextConfig) -> list[Rule]:
    """All parameters."""
    path, layer = "text_model/encoder/layers", "text_model.encoder.layers.{layer}"
    return [
        *embedding("text_model/embeddings/{word=token_embedding|position_embedding}", "text_model.embeddings.{word}"),
        *linear(f"{path}/self_attn/{{word=q_proj|k_proj|v_proj|out_proj}}", f"{layer}.self_attn.{{word}}"),
        *norm(f"{path}/{{word=layer_norm1|layer_norm2}}", f"{layer}.{{word}}"),
        *linear(f"{path}/mlp/{{word=fc1|fc2}}", f"{layer}.mlp.{{word}}"),
        *norm("text_model/final_layer_norm", "text_model.final_layer_norm"),
        *linear("text_projection", "text_projection"),
    ]


def extras(config: CLIPTextConfig) -> Extras:
    """Position ids, a buffer that transformers saved until version 4.31."""
    return Extras(ignored=(r"text_model\.embeddings\.position_ids",))
