"""The paper's system at full size: 49 frames of 320x512 from 7x40x64 latents (Neodragon, arXiv 2511.06055).

Learning rate, Adam's betas, weight decay, warm-up, clipping, stage mix, history corruption and caption dropout of the
teacher are Pyramid-Flow's published ones. Of pruning and recovery the paper says: importance over 100 prompts and 5
samples, 6 of 24 blocks removed, a first stage that converges in about 300 steps, a second one of 60 000. Batch sizes,
learning rates, the weights of the losses and everything else about recovery are ours. Of text distillation: the
networks, replace mode, MSE + 0.1 (1 - cos) over valid tokens, about 1.4 million prompts; the rest is ours. Of step
distillation: 1-1-1 steps, two fake updates for each of the student's, four levels, the Cauchy term with its sum; the
rest is ours, rates, batch and length after what others use.
Commands: nd-jax prune importance TEACHER --prompts 100 --samples 5 --prompt-file PROMPTS --out SCORES
          nd-jax prune apply TEACHER --count 6 --scores SCORES --out PRUNED
          nd-jax train neodragon_320p text --teacher PYRAMID_FLOW --start DT5 --prompts PROMPTS --out RUN
          nd-jax train neodragon_320p decoder --codec NATIVE --data DATA --lpips vgg.safetensors --out RUN
          nd-jax train neodragon_320p recovery_2 --start PRUNED --teacher TEACHER --latents LATENTS --out RUN
          nd-jax train neodragon_320p student --start RECOVERED --teacher TEACHER --latents LATENTS --out RUN
"""

import dataclasses

from nd_jax.models.causal_vae import AsymmetricVAEConfig
from nd_jax.models.clip import clip_bigg, clip_l
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import SystemConfig
from nd_jax.models.t5 import T5Config
from nd_jax.pyramid.sampler import MONOLITHIC
from nd_jax.recipes.adversarial import AdversarialConfig
from nd_jax.recipes.decoder_distillation import DecoderRecipeConfig
from nd_jax.recipes.dmd_config import DmdRecipeConfig
from nd_jax.recipes.flow_matching import FlowRecipeConfig
from nd_jax.recipes.mean_flow import MeanFlowConfig
from nd_jax.recipes.preset import (
    AdversarialRun,
    DecoderRun,
    DmdRun,
    FlowRun,
    MeanFlowRun,
    Preset,
    ProgressiveRun,
    RecoveryRun,
    TextDistillRun,
    UpscalerRun,
    VideoConfig,
)
from nd_jax.recipes.progressive import ProgressiveConfig
from nd_jax.recipes.recovery import RecoveryRecipeConfig
from nd_jax.recipes.text_distillation import TextDistillConfig
from nd_jax.recipes.upscaler import UpscalerRecipeConfig
from nd_jax.training.loop import LoopConfig
from nd_jax.training.optim import OptimConfig

published = OptimConfig(
    learning_rate=1e-4, schedule="constant", warmup_steps=1000, b1=0.9, b2=0.95, weight_decay=1e-4, clip_norm=1.0
)
recipe = FlowRecipeConfig(
    batch=448,  # ours: 16 rows of 28 columns, four for each latent frame
    stage_mix=(1, 2, 1),
    every_unit=True,  # ours: no token is padding
    train_text=False,
    remat="full",
    dtype="bfloat16",
    ema_decay=0.9999,  # ours
    optim=published,
)

recovery = FlowRun(
    dataclasses.replace(recipe, optim=dataclasses.replace(published, learning_rate=5e-5, warmup_steps=50)),  # ours
    LoopConfig(steps=300, save_every=50),
)

text = TextDistillRun(
    encoder=T5Config(),
    adapter=ContextAdapterConfig(),
    recipe=TextDistillConfig(
        batch=1024,  # ours
        mode="replace",
        encoder="frozen",
        mse=1.0,
        cosine=0.1,
        empty=0.02,  # ours
        remat=True,
        dtype="bfloat16",
        teacher_dtype="bfloat16",
        optim=OptimConfig(learning_rate=1e-4, warmup_steps=500, decay_steps=14_000),  # ours
    ),
    loop=LoopConfig(steps=14_000, save_every=1000, log_every=10),  # ours: ten times 1.4 million prompts
)

decoder = DecoderRun(
    # Published: frozen encoder, no KL, these channels, time doubled at every level, MSE + LPIPS, about 350 000 videos.
    DecoderRecipeConfig(
        channels=(256, 128, 64, 64),
        time_growth=(True, True, True),
        batch=64,  # and everything below: ours
        frames=17,
        perceptual_frames=4,
        dtype="bfloat16",
        ema_decay=0.999,
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=500, decay_steps=20_000, b2=0.95, weight_decay=1e-4),
    ),
    LoopConfig(steps=20_000, save_every=500, log_every=10),
)

adam = OptimConfig(schedule="constant", warmup_steps=1, b1=0.0, b2=0.999, weight_decay=0.0)  # ours
student = DmdRun(
    DmdRecipeConfig(
        batch=448,  # ours, and the next two: as the teacher's
        stage_mix=(1, 2, 1),
        every_unit=True,
        steps=(1, 1, 1),
        fake_updates=2,
        levels=4,
        cauchy_weight=1.0,  # of our mean over the sample; read literally the paper's is smaller, see dmd_loss.py
        cauchy_reduction="sum",
        exact=True,  # ours; the paper's form is off
        weighting="normalised",  # ours; the paper's is raw
        first_guidance=7.0,  # ours: what the teacher is sampled with
        later_guidance=5.0,  # ours, likewise
        ema_decay=0.99,  # ours
        remat="full",
        dtype="bfloat16",
        optim=dataclasses.replace(adam, learning_rate=2e-6),  # ours
        fake_optim=dataclasses.replace(adam, learning_rate=4e-7),  # ours
    ),
    LoopConfig(steps=4000, save_every=250, log_every=10),  # ours
)

names = ("batch", "stage_mix", "every_unit", "steps", "first_guidance", "later_guidance", "ema_decay", "remat")
names += ("dtype", "optim")
few = {name: getattr(student.recipe, name) for name in names}  # the baselines' other settings are ours, all of them

PRESET = Preset(
    name="neodragon_320p",
    system=SystemConfig(
        text_encoder=clip_l(),
        text_encoder_2=clip_bigg(),
        text_encoder_3=T5Config(),
        context_adapter=ContextAdapterConfig(),
        diffusion_transformer=MMDiTConfig(num_layers=24),
        causal_video_vae=AsymmetricVAEConfig(),
    ),
    video=VideoConfig(),
    sampling=MONOLITHIC,
    runs={
        "decoder": decoder,
        "teacher": FlowRun(recipe, LoopConfig(steps=100_000, save_every=1000, log_every=10)),
        "text": text,
        "recovery": recovery,
        "recovery_2": RecoveryRun(
            stage1=recovery,
            recipe=RecoveryRecipeConfig(**vars(recovery.recipe), normalise=True),  # ours
            loop=LoopConfig(steps=60_000, save_every=1000, log_every=10),
        ),
        "student": student,
        "progressive": ProgressiveRun(
            ProgressiveConfig(**few, teacher_steps=2, rounds=3, round_steps=1000), student.loop
        ),
        "mean_flow": MeanFlowRun(MeanFlowConfig(**few, difference=1 / 16), student.loop),
        "adversarial": AdversarialRun(AdversarialConfig(**few), student.loop),
        "upscaler": UpscalerRun(
            recipe=UpscalerRecipeConfig(  # ours
                batch=64,
                optim=OptimConfig(
                    learning_rate=1e-3, warmup_steps=200, decay_steps=50_000, final_fraction=0.01, weight_decay=0.0
                ),
            ),
            loop=LoopConfig(steps=50_000, save_every=1000, log_every=50),
        ),
    },
)
