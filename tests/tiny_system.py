"""A whole system small enough to run in tests: random weights, tokenizers trained on captions, official folders."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jax
import numpy as np

from nd_jax.data.captions import corpus
from nd_jax.data.tokenizers import train_tokenizers
from nd_jax.models.causal_vae import NativeVAEConfig
from nd_jax.models.clip import CLIPTextConfig
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.functional import Definition, Params
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import SystemConfig
from nd_jax.models.t5 import T5Config
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.recipes.preset import VideoConfig
from nd_jax.system import TOKENIZERS, VideoSystem, save_system
from nd_jax.training.paths import map_named

TEXT_LENGTH = 12
PLAN = SamplePlan((1, 1, 1), (1, 1, 1), 2.0, 2.0, "plain")
VIDEO = VideoConfig(height=64, width=64, frames=9, text_length=TEXT_LENGTH, clip_length=TEXT_LENGTH)

_tower = CLIPTextConfig(
    vocab_size=600,
    hidden_size=16,
    intermediate_size=32,
    projection_dim=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=TEXT_LENGTH,
)
CONFIG = SystemConfig(
    text_encoder=_tower,
    text_encoder_2=_tower,
    text_encoder_3=T5Config(vocab_size=256, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, out_dim=16),
    context_adapter=ContextAdapterConfig(input_dims=16, output_dims=16, layer_depths=(16,), skips=(True,)),
    diffusion_transformer=MMDiTConfig(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    ),
    causal_video_vae=NativeVAEConfig(
        encoder_out_channels=4,
        decoder_in_channels=4,
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_norm_num_groups=2,
        decoder_norm_num_groups=2,
        sample_size=64,
    ),
)


def random_params(definition: Definition, seed: int = 0) -> Params:
    """Numpy parameters of a network, none of them zero and nothing compiled."""
    rng = np.random.Generator(np.random.Philox(seed))

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path.endswith("scale"):
            return 1 + np.float32(0.1) * noise
        fan_in = np.prod(leaf.shape[:-1]) if path.endswith("kernel") else 16
        return noise / np.float32(np.sqrt(fan_in))

    return map_named(draw, definition.abstract())


@cache
def random_system_params() -> dict[str, Params]:
    """Parameters of every network of ``CONFIG``."""
    return {name: random_params(each, seed) for seed, (name, each) in enumerate(CONFIG.definitions().items())}


def write_tiny(folder: Path) -> Path:
    """``folder/system``, an official-layout folder, and ``folder/tokenizers``."""
    tokenizers = folder / "tokenizers"
    sizes = {"t5_length": TEXT_LENGTH, "clip_length": TEXT_LENGTH, "t5_vocab": 250, "clip_vocab": 580}
    train_tokenizers(tokenizers, corpus(count=300), **sizes)
    system = VideoSystem(CONFIG, random_system_params(), {}, VIDEO, PLAN)
    return save_system(folder / "system", system, {name: tokenizers / name for name in TOKENIZERS.values()})
