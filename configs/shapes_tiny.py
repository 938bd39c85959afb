"""The smallest chain, from nothing: a codec and a teacher in minutes on two CPU cores, then pruning and recovery.

`nd-jax demo` trains its teacher for two minutes (420 of its 1600 steps, the schedule shortened alike).
"""

from nd_jax.models.causal_vae import NativeVAEConfig
from nd_jax.models.clip import CLIPTextConfig
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import SystemConfig
from nd_jax.models.t5 import T5Config
from nd_jax.recipes.codec import CodecRecipeConfig
from nd_jax.recipes.flow_matching import FlowRecipeConfig
from nd_jax.recipes.preset import CodecRun, FlowRun, Preset, SamplingConfig, VideoConfig
from nd_jax.training.loop import LoopConfig
from nd_jax.training.optim import OptimConfig

WIDTH, HEADS = 128, 4
TEXT_LENGTH = 24
LATENT_CHANNELS = 12

tower = CLIPTextConfig(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=128,
    projection_dim=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=TEXT_LENGTH,
)
system = SystemConfig(
    text_encoder=tower,
    text_encoder_2=tower,
    text_encoder_3=T5Config(vocab_size=512, d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4, out_dim=96),
    context_adapter=ContextAdapterConfig(input_dims=96, output_dims=WIDTH, layer_depths=(96,), skips=(True,)),
    diffusion_transformer=MMDiTConfig(
        sample_size=8,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        num_layers=8,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
    ),
    causal_video_vae=NativeVAEConfig(
        encoder_out_channels=LATENT_CHANNELS,
        decoder_in_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(8, 8, 24, 48),
        decoder_block_out_channels=(8, 8, 24, 48),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_norm_num_groups=1,
        decoder_norm_num_groups=1,
        sample_size=64,
    ),
)

PRESET = Preset(
    name="shapes_tiny",
    system=system,
    video=VideoConfig(height=64, width=64, frames=33, text_length=TEXT_LENGTH, clip_length=TEXT_LENGTH),
    sampling=SamplingConfig(
        first_steps=(4, 4, 4), later_steps=(4, 4, 4), first_guidance=2.0, later_guidance=2.0, grid="plain"
    ),
    world="64x64",
    plain_captions=True,
    runs={
        "codec": CodecRun(
            recipe=CodecRecipeConfig(
                batch=2,
                frames=17,
                optim=OptimConfig(learning_rate=2e-4, warmup_steps=50, decay_steps=260, b2=0.98, weight_decay=1e-5),
            ),
            loop=LoopConfig(steps=260, save_every=130, log_every=10),
        ),
        "teacher": FlowRun(
            recipe=FlowRecipeConfig(
                batch=24,
                stage_mix=(3, 2, 1),
                ema_decay=0.995,
                optim=OptimConfig(
                    learning_rate=1.5e-3,
                    warmup_steps=100,
                    decay_steps=1600,
                    b2=0.95,
                    weight_decay=1e-4,
                    final_fraction=0.05,
                ),
            ),
            loop=LoopConfig(steps=1600, save_every=400, log_every=10),
        ),
        "recovery": FlowRun(
            recipe=FlowRecipeConfig(
                batch=24,
                stage_mix=(3, 2, 1),
                ema_decay=0.98,
                train_text=False,
                optim=OptimConfig(
                    learning_rate=5e-4,
                    warmup_steps=20,
                    decay_steps=250,
                    b2=0.95,
                    weight_decay=1e-4,
                    final_fraction=0.05,
                ),
            ),
            loop=LoopConfig(steps=250, save_every=125, log_every=10),
        ),
    },
)
