"""Names of the safety checker (diffusers' StableDiffusionSafetyChecker)."""

from __future__ import annotations

from nd_jax.converters.tables import CONV2D, LINEAR, Extras, Rule, embedding, linear, norm
from nd_jax.models.safety_checker import SafetyCheckerConfig

_TOWER = "vision_model.vision_model"


def rules(config: SafetyCheckerConfig) -> list[Rule]:
    """All parameters."""
    layer = f"{_TOWER}.encoder.layers.{{layer}}"
    own = "{word=concept_embeds|special_care_embeds|concept_embeds_weights|special_care_embeds_weights}"
    return [
        Rule("embeddings/class_embedding", f"{_TOWER}.embeddings.class_embedding"),
        Rule("embeddings/patch_embedding/kernel", f"{_TOWER}.embeddings.patch_embedding.weight", CONV2D),
        *embedding("embeddings/position_embedding", f"{_TOWER}.embeddings.position_embedding"),
        *norm("{word=pre_layrnorm|post_layernorm}", f"{_TOWER}.{{word}}"),
        *linear("layers/self_attn/{word=q_proj|k_proj|v_proj|out_proj}", f"{layer}.self_attn.{{word}}"),
        *norm("layers/{word=layer_norm1|layer_norm2}", f"{layer}.{{word}}"),
        *linear("layers/mlp/{word=fc1|fc2}", f"{layer}.mlp.{{word}}"),
        Rule("visual_projection/kernel", "visual_projection.weight", LINEAR),
        Rule(own, "{word}"),
    ]


def extras(config: SafetyCheckerConfig) -> Extras:
    """The tower under the shorter names that transformers 5 gives it; and position ids, a buffer that it saved until
    version 4.31."""
    both = ("weight", "bias")
    names = ["embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"]
    names += [f"{norm}.{kind}" for norm in ("pre_layrnorm", "post_layernorm") for kind in both]
    parts = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    parts += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    layers = range(config.num_hidden_layers)
    names += [f"encoder.layers.{layer}.{part}.{kind}" for layer in layers for part in parts for kind in both]
    return Extras(
        twins={f"vision_model.{name}": f"{_TOWER}.{name}" for name in names},
        ignored=(r"(vision_model\.)+embeddings\.position_ids",),
    )
