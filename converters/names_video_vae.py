"""Names of the video codecs: AsymmetricCausalVideoVAE (TAEHV decoder) and Pyramid-Flow's CausalVideoVAE.

Encoder, quant_conv and post_quant_conv are the same in both. Their 3-D convolutions are wrappers on the torch side,
whose inner ``conv`` has no counterpart here; the TAEHV decoder's 2-D convolutions are bare.
"""

from __future__ import annotations

from nd_jax.converters.tables import Extras, Rule, conv2d, conv3d, linear, norm
from nd_jax.models.codec_config import CodecConfig

_CONVS = "{word=conv1|conv2|conv_shortcut}"
_SAMPLERS = "{word=downsamplers|temporal_downsamplers|upsamplers|temporal_upsamplers}"


def _resnet(path: str, torch: str) -> list[Rule]:
    return [
        *norm(f"{path}/{{word=norm1|norm2}}", f"{torch}.{{word}}"),
        *conv3d(f"{path}/{_CONVS}", f"{torch}.{{word}}.conv"),
    ]


def _causal(side: str, blocks: str) -> list[Rule]:
    """A causal encoder or decoder: conv_in, blocks, middle, norm, conv_out."""
    attention, torch_attention = f"{side}/mid_block/attentions/{{n}}", f"{side}.mid_block.attentions.{{n}}"
    return [
        *conv3d(f"{side}/{{word=conv_in|conv_out}}", f"{side}.{{word}}.conv"),
        *norm(f"{side}/conv_norm_out", f"{side}.conv_norm_out"),
        *_resnet(f"{side}/{blocks}/{{b}}/resnets/{{n}}", f"{side}.{blocks}.{{b}}.resnets.{{n}}"),
        *conv3d(f"{side}/{blocks}/{{b}}/{_SAMPLERS}/{{n}}/conv", f"{side}.{blocks}.{{b}}.{{word}}.{{n}}.conv.conv"),
        *_resnet(f"{side}/mid_block/resnets/{{n}}", f"{side}.mid_block.resnets.{{n}}"),
        *norm(f"{attention}/group_norm", f"{torch_attention}.group_norm"),
        *linear(f"{attention}/{{word=to_q|to_k|to_v}}", f"{torch_attention}.{{word}}"),
        *linear(f"{attention}/to_out/0", f"{torch_attention}.to_out.0"),
    ]


def rules(config: CodecConfig) -> list[Rule]:
    """All parameters of either codec."""
    return [
        *_causal("encoder", "down_blocks"),
        *_causal("decoder", "up_blocks"),
        *conv3d("{word=quant_conv|post_quant_conv}", "{word}.conv"),
        *conv2d("decoder/blocks/{b}/conv/{n}", "decoder.blocks.{b}.conv.{n}"),
        *conv2d("decoder/blocks/{b}/conv", "decoder.blocks.{b}.conv"),
        *conv2d("decoder/blocks/{b}", "decoder.blocks.{b}"),
    ]


def extras(config: CodecConfig) -> Extras:
    """Nothing beside the parameters."""
    return Extras()
