"""Small systems for the tests of graphs and bundles: the tiny one, and one with a tiny decoder and 2x2 patches."""

from __future__ import annotations

import dataclasses

import tiny_system

from nd_jax.models.causal_vae import AsymmetricVAEConfig
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import SystemConfig

TINY_DECODER = AsymmetricVAEConfig(
    encoder_out_channels=4,
    encoder_block_out_channels=(4, 4, 4, 4),
    encoder_layers_per_block=(1, 1, 1, 1),
    encoder_norm_num_groups=2,
    sample_size=64,
    decoder_num_features=(6, 5, 4, 4),
)
STUDENT = dataclasses.replace(tiny_system.CONFIG, causal_video_vae=TINY_DECODER)
"""The tiny system with a distilled student's kind of decoder."""


def denoiser(**changes) -> MMDiTConfig:
    """A denoiser of two heads and three blocks."""
    return dataclasses.replace(
        MMDiTConfig(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=20,
            pooled_projection_dim=16,
            pos_embed_max_size=16,
        ),
        **changes,
    )


def random_system(config: SystemConfig = STUDENT, seed: int = 0):
    """Random parameters of every network by name."""
    networks = config.definitions().items()
    return {name: tiny_system.random_params(each, seed + i) for i, (name, each) in enumerate(networks)}


def student_system(tokenizers, plan=None, frames=17):
    """The student as a system in memory, 64 x 64 pixels, with the tiny tokenizers."""
    from nd_jax.data.tokenizers import TextTokenizer
    from nd_jax.system import TOKENIZERS, VideoSystem

    loaded = {
        name: TextTokenizer.from_folder(tokenizers / folder, max_length=tiny_system.TEXT_LENGTH)
        for name, folder in TOKENIZERS.items()
    }
    video = dataclasses.replace(tiny_system.VIDEO, frames=frames)
    return VideoSystem(STUDENT, random_system(), loaded, video, plan or tiny_system.PLAN, folder=tokenizers)
