"""The shapes teacher that ships with the package: hours instead of minutes on two CPU cores.

Its runs in order, with their commands, hours and curves: nd_jax/weights/shapes_base/README.md.
"""

import dataclasses

from nd_jax.models.causal_vae import NativeVAEConfig
from nd_jax.models.clip import CLIPTextConfig
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import SystemConfig
from nd_jax.models.t5 import T5Config
from nd_jax.recipes.adversarial import AdversarialConfig
from nd_jax.recipes.codec import CodecRecipeConfig
from nd_jax.recipes.decoder_distillation import DecoderRecipeConfig
from nd_jax.recipes.dmd_config import DmdRecipeConfig
from nd_jax.recipes.flow_matching import FlowRecipeConfig
from nd_jax.recipes.mean_flow import MeanFlowConfig
from nd_jax.recipes.preset import (
    AdversarialRun,
    CodecRun,
    DecoderRun,
    DmdRun,
    FlowRun,
    MeanFlowRun,
    Preset,
    ProgressiveRun,
    RecoveryRun,
    SamplingConfig,
    TextDistillRun,
    TextRun,
    UpscalerRun,
    VideoConfig,
)
from nd_jax.recipes.progressive import ProgressiveConfig
from nd_jax.recipes.recovery import RecoveryRecipeConfig
from nd_jax.recipes.text_attributes import TextRecipeConfig
from nd_jax.recipes.text_distillation import TextDistillConfig
from nd_jax.recipes.upscaler import UpscalerRecipeConfig
from nd_jax.training.loop import LoopConfig
from nd_jax.training.optim import OptimConfig

WIDTH, HEADS = 128, 4
TEXT_WIDTH = 128
TEXT_LENGTH = 36  # two objects take up to 35 tokens
LATENT_CHANNELS = 12

tower = CLIPTextConfig(
    vocab_size=1024,
    hidden_size=64,
    intermediate_size=256,
    projection_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=TEXT_LENGTH,
)
system = SystemConfig(
    text_encoder=tower,
    text_encoder_2=tower,
    text_encoder_3=T5Config(
        vocab_size=512, d_model=TEXT_WIDTH, d_kv=32, d_ff=256, num_layers=3, num_heads=4, out_dim=None
    ),
    diffusion_transformer=MMDiTConfig(
        sample_size=8,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        num_layers=8,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        context_embedder=True,
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


def flow(
    steps: int, learning_rate: float, *, schedule: str = "constant", ema_decay: float = 0.998, **recipe
) -> FlowRun:
    """A run with frozen text encoders."""
    optim = OptimConfig(
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=100,
        decay_steps=steps,
        final_fraction=0.02,
        b2=0.95,
        weight_decay=1e-4,
    )
    return FlowRun(
        recipe=FlowRecipeConfig(train_text=False, ema_decay=ema_decay, optim=optim, **recipe),
        loop=LoopConfig(steps=steps, save_every=250, log_every=25),
    )


recovery = flow(250, 5e-4, schedule="linear", batch=24, stage_mix=(1, 1, 2), ema_decay=0.98)

text_student = TextDistillRun(  # 140 928 parameters, of which the adapter 20 672; its teacher's text path has 574 592
    encoder=T5Config(vocab_size=512, d_model=64, d_kv=16, d_ff=120, num_layers=2, num_heads=4, out_dim=64),
    adapter=ContextAdapterConfig(input_dims=64, output_dims=WIDTH, layer_depths=(64,), skips=(True,)),
    recipe=TextDistillConfig(
        batch=64,
        encoder="trained",
        captions=1 << 16,
        ema_decay=0.998,
        optim=OptimConfig(
            learning_rate=3e-3, warmup_steps=100, decay_steps=6000, final_fraction=0.02, b2=0.98, weight_decay=1e-4
        ),
    ),
    loop=LoopConfig(steps=6000, save_every=1000, log_every=25),
)


def adam(learning_rate: float, steps: int) -> OptimConfig:
    """For distribution matching: no momentum, since the loss moves along with the networks."""
    return OptimConfig(
        learning_rate=learning_rate,
        schedule="linear",
        warmup_steps=20,
        decay_steps=steps,
        b1=0.0,
        b2=0.99,
        weight_decay=0.0,
    )


few = {  # one schedule of calls and one teacher for every way of distilling steps
    "batch": 24,
    "stage_mix": (1, 1, 2),
    "steps": (1, 1, 1),
    "first_guidance": 2.0,
    "later_guidance": 1.5,
    "ema_decay": 0.98,
}
STEPS = LoopConfig(steps=600, save_every=100, log_every=10)
# First guesses, all of them: neither rates nor weights nor lengths have been compared.
student = DmdRun(
    DmdRecipeConfig(**few, cauchy_weight=0.1, optim=adam(1e-4, 600), fake_optim=adam(3e-4, 1200)),
    STEPS,
)
regress = dataclasses.replace(adam(3e-4, 600), b1=0.9, b2=0.95)
progressive = ProgressiveRun(ProgressiveConfig(**few, teacher_steps=2, rounds=2, round_steps=250, optim=regress), STEPS)
mean_flow = MeanFlowRun(MeanFlowConfig(**few, difference=1 / 16, optim=regress), STEPS)
adversarial = AdversarialRun(
    AdversarialConfig(**few, cauchy_weight=0.1, optim=adam(1e-4, 600), head_optim=adam(1e-3, 600)), STEPS
)

PRESET = Preset(
    name="shapes_base",
    system=system,
    video=VideoConfig(height=64, width=64, frames=33, text_length=TEXT_LENGTH, clip_length=TEXT_LENGTH),
    sampling=SamplingConfig(
        first_steps=(8, 8, 8), later_steps=(4, 4, 4), first_guidance=2.0, later_guidance=1.5, grid="plain"
    ),
    world="64x64",
    runs={
        "codec": CodecRun(
            recipe=CodecRecipeConfig(
                batch=4,
                frames=17,
                optim=OptimConfig(learning_rate=2e-4, warmup_steps=50, decay_steps=440, b2=0.98, weight_decay=1e-5),
            ),
            loop=LoopConfig(steps=440, save_every=100, log_every=10),
        ),
        "decoder": DecoderRun(
            recipe=DecoderRecipeConfig(
                batch=4,
                frames=17,
                channels=(28, 22, 16, 12),  # 182 209 parameters, a fifth of the native decoder's
                optim=OptimConfig(learning_rate=2e-3, warmup_steps=50, decay_steps=1500, b2=0.98, weight_decay=1e-5),
            ),
            loop=LoopConfig(steps=1500, save_every=250, log_every=10),
        ),
        "text": TextRun(recipe=TextRecipeConfig(), loop=LoopConfig(steps=400, save_every=200, log_every=20)),
        "image": flow(6000, 1.5e-3, batch=24, stage_mix=(1, 1, 2), size_mix=(2, 1), units=1),
        "teacher": flow(2500, 1.2e-3, schedule="linear", batch=24, stage_mix=(1, 1, 2), size_mix=(1, 1, 1)),
        "text_student": text_student,
        "recovery": recovery,
        "recovery_2": RecoveryRun(
            stage1=recovery,
            recipe=RecoveryRecipeConfig(
                batch=24,
                stage_mix=(1, 1, 2),
                ema_decay=0.98,
                normalise=True,
                optim=dataclasses.replace(recovery.recipe.optim, warmup_steps=20, decay_steps=500),
            ),
            loop=LoopConfig(steps=500, save_every=250, log_every=25),
        ),
        "student": student,
        "progressive": progressive,
        "mean_flow": mean_flow,
        "adversarial": adversarial,
        "upscaler": UpscalerRun(
            recipe=UpscalerRecipeConfig(
                size=64,
                most=2.0,
                absolute=0.0,
                squared=1.0,
                optim=OptimConfig(
                    learning_rate=2e-4, warmup_steps=50, decay_steps=2000, final_fraction=0.01, weight_decay=0.0
                ),
            ),
            loop=LoopConfig(steps=2000, save_every=1000, log_every=50),
        ),
    },
)
