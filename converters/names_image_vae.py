"""Names of the image autoencoder (diffusers' AutoencoderKL)."""

from __future__ import annotations

from nd_jax.converters.tables import Extras, Rule, conv2d, linear, norm
from nd_jax.models.image_vae import ImageVAEConfig

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""What older files call the layers of the attention."""


def _resnet(path: str, torch: str) -> list[Rule]:
    return [
        *norm(f"{path}/{{word=norm1|norm2}}", f"{torch}.{{word}}"),
        *conv2d(f"{path}/{{word=conv1|conv2|conv_shortcut}}", f"{torch}.{{word}}"),
    ]


def rules(config: ImageVAEConfig) -> list[Rule]:
    """All parameters."""
    side, attention = "{side=encoder|decoder}", "mid_block/attentions/{n}"
    level, torch_level = side + "/{level=down_blocks|up_blocks}/{b}", "{side}.{level}.{b}"
    torch_attention = "{side}.mid_block.attentions.{n}"
    return [
        *conv2d(f"{side}/{{word=conv_in|conv_out}}", "{side}.{word}"),
        *norm(f"{side}/conv_norm_out", "{side}.conv_norm_out"),
        *_resnet(f"{level}/resnets/{{n}}", f"{torch_level}.resnets.{{n}}"),
        *conv2d(f"{level}/{{word=downsamplers|upsamplers}}/{{n}}/conv", f"{torch_level}.{{word}}.{{n}}.conv"),
        *_resnet(f"{side}/mid_block/resnets/{{n}}", "{side}.mid_block.resnets.{n}"),
        *norm(f"{side}/{attention}/group_norm", f"{torch_attention}.group_norm"),
        *linear(f"{side}/{attention}/{{word=to_q|to_k|to_v}}", f"{torch_attention}.{{word}}"),
        *linear(f"{side}/{attention}/to_out/0", f"{torch_attention}.to_out.0"),
        *conv2d("{word=quant_conv|post_quant_conv}", "{word}"),
    ]


def extras(config: ImageVAEConfig) -> Extras:
    """The attention's old names."""
    twins = {}
    if config.mid_block_add_attention:
        for side in ("encoder", "decoder"):
            layer = f"{side}.mid_block.attentions.0"
            for name, old in OLD_NAMES.items():
                twins |= {f"{layer}.{old}.{kind}": f"{layer}.{name}.{kind}" for kind in ("weight", "bias")}
    return Extras(twins=twins)
