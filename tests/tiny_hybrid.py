"""The tiny system with first-frame networks, super-resolution and a safety checker: a whole hybrid folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from tiny_system import CONFIG, PLAN, VIDEO, random_params, random_system_params, write_tiny

from nd_jax.converters.component import save_component
from nd_jax.models import clip, image_vae, quicksrnet, safety_checker, unet
from nd_jax.models.clip import CLIPTextConfig
from nd_jax.models.image_vae import ImageVAEConfig
from nd_jax.models.quicksrnet import QuickSRNetConfig
from nd_jax.models.safety_checker import SafetyCheckerConfig
from nd_jax.models.unet import UNetConfig
from nd_jax.system import TOKENIZERS, VideoSystem, save_system

TOWER = CLIPTextConfig(
    vocab_size=600,
    hidden_size=8,
    intermediate_size=16,
    projection_dim=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=12,
)
FIRST_FRAME = {
    "ssd_1b_text_encoder": (dataclasses.replace(TOWER, with_projection=False), clip),
    "ssd_1b_text_encoder_2": (TOWER, clip),
    "ssd_1b_unet": (
        UNetConfig(
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, (2,)),
            reverse_transformer_layers_per_block=((1, 2), 1),
            attention_head_dim=(1, 2),
            cross_attention_dim=16,
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=32,
            norm_num_groups=4,
            sample_size=8,
        ),
        unet,
    ),
    "ssd_1b_vae": (
        ImageVAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64),
        image_vae,
    ),
    "super_resolution": (QuickSRNetConfig(8, 1), quicksrnet),
    "safety_checker": (
        SafetyCheckerConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            projection_dim=8,
        ),
        safety_checker,
    ),
}


def write_hybrid(folder: Path) -> Path:
    """``folder/hybrid``, an official-layout hybrid folder, 64x64 and 9 frames; the checker never objects."""
    write_tiny(folder)
    plan = dataclasses.replace(PLAN, first_guidance=0.0, later_guidance=0.0)
    system = VideoSystem(CONFIG, random_system_params(), {}, VIDEO, plan, mode="hybrid")
    tokenizers = {name: folder / "tokenizers" / name for name in TOKENIZERS.values()}
    tokenizers |= {f"ssd_1b_{name}": tokenizers[name] for name in ("tokenizer", "tokenizer_2")}
    save_system(folder / "hybrid", system, tokenizers)
    for seed, (name, (config, module)) in enumerate(FIRST_FRAME.items()):
        params = random_params(module.definition(config), seed)
        if name == "safety_checker":
            params |= {key: 0 * params[key] + 2 for key in ("concept_embeds_weights", "special_care_embeds_weights")}
        save_component(folder / "hybrid" / name, config, params)
    shutil.rmtree(folder / "system")
    return folder / "hybrid"
