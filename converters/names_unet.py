"""Names of the first-frame UNet (diffusers' UNet2DConditionModel)."""

from __future__ import annotations

from nd_jax.converters.tables import LINEAR, Extras, Rule, conv2d, linear, norm
from nd_jax.models.unet_config import UNetConfig


def _block(path: str, torch: str) -> list[Rule]:
    """One level: residual blocks, attention layers with their stacked transformer blocks, resampling."""
    resnet, torch_resnet = f"{path}/resnets/{{n}}", f"{torch}.resnets.{{n}}"
    attention, torch_attention = f"{path}/attentions/{{n}}", f"{torch}.attentions.{{n}}"
    block, torch_block = f"{attention}/transformer_blocks", f"{torch_attention}.transformer_blocks.{{layer}}"
    projections = "{attn=attn1|attn2}/{word=to_q|to_k|to_v}"
    return [
        *norm(f"{resnet}/{{word=norm1|norm2}}", f"{torch_resnet}.{{word}}"),
        *conv2d(f"{resnet}/{{word=conv1|conv2|conv_shortcut}}", f"{torch_resnet}.{{word}}"),
        *linear(f"{resnet}/time_emb_proj", f"{torch_resnet}.time_emb_proj"),
        *norm(f"{attention}/norm", f"{torch_attention}.norm"),
        *linear(f"{attention}/{{word=proj_in|proj_out}}", f"{torch_attention}.{{word}}"),
        *norm(f"{block}/{{word=norm1|norm2|norm3}}", f"{torch_block}.{{word}}"),
        Rule(f"{block}/{projections}/kernel", f"{torch_block}.{{attn}}.{{word}}.weight", LINEAR),
        *linear(f"{block}/{{attn=attn1|attn2}}/to_out", f"{torch_block}.{{attn}}.to_out.0"),
        *linear(f"{block}/ff/up", f"{torch_block}.ff.net.0.proj"),
        *linear(f"{block}/ff/down", f"{torch_block}.ff.net.2"),
        *conv2d(f"{path}/{{word=downsamplers|upsamplers}}/{{n}}/conv", f"{torch}.{{word}}.{{n}}.conv"),
    ]


def rules(config: UNetConfig) -> list[Rule]:
    """All parameters."""
    return [
        *conv2d("{word=conv_in|conv_out}", "{word}"),
        *norm("conv_norm_out", "conv_norm_out"),
        *linear(
            "{embedding=time_embedding|add_embedding}/{word=linear_1|linear_2}",
            "{embedding}.{word}",
        ),
        Rule("time_embedding/cond_proj/kernel", "time_embedding.cond_proj.weight", LINEAR),
        *_block("{side=down_blocks|up_blocks}/{b}", "{side}.{b}"),
        *_block("mid_block", "mid_block"),
    ]


def extras(config: UNetConfig) -> Extras:
    """Nothing beside the parameters."""
    return Extras()
