"""A tiny teacher that embeds its T5's states itself, a tiny student, and batches of made-up tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tiny_system

from nd_jax.data.prompt_source import PromptSource
from nd_jax.models import context_adapter, t5
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.functional import Params
from nd_jax.models.system import ADAPTER, T5, SystemConfig
from nd_jax.models.t5 import T5Config
from nd_jax.recipes.lora import LoraConfig
from nd_jax.recipes.text_distillation import TextDistillConfig, TextDistillRecipe
from nd_jax.training.optim import OptimConfig

LENGTH, WIDE = tiny_system.TEXT_LENGTH, 24
SYSTEM = dataclasses.replace(
    tiny_system.CONFIG,
    text_encoder_3=T5Config(vocab_size=256, d_model=WIDE, d_kv=8, d_ff=32, num_layers=2, num_heads=2, out_dim=None),
    context_adapter=None,
    diffusion_transformer=dataclasses.replace(
        tiny_system.CONFIG.diffusion_transformer, joint_attention_dim=WIDE, context_embedder=True
    ),
)
ENCODER = T5Config(vocab_size=256, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, out_dim=12)
CONFIG = TextDistillConfig(
    batch=16,
    encoder="trained",
    lora=LoraConfig(rank=4, alpha=4.0),
    empty=0.1,
    ema_decay=0.9,
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=1, schedule="constant"),
)


def adapter(mode: str = "replace") -> ContextAdapterConfig:
    """The student's adapter, to the denoiser's width or to what its embedder reads."""
    width = SYSTEM.diffusion_transformer.width if mode == "replace" else WIDE
    return ContextAdapterConfig(input_dims=12, output_dims=width, layer_depths=(16,), skips=(True,))


def recipe(*, system: SystemConfig = SYSTEM, live: bool = True, **changes: Any) -> TextDistillRecipe:
    """The recipe with some settings changed."""
    given = changes.pop("adapter", None) or adapter(changes.get("mode", "replace"))
    return TextDistillRecipe(
        ENCODER,
        given,
        dataclasses.replace(CONFIG, **changes),
        denoiser=system.diffusion_transformer,
        teacher=system if live else None,
        text_length=LENGTH,
    )


def random_params() -> dict[str, Params]:
    """Of every network of ``SYSTEM``."""
    made = SYSTEM.definitions()
    return {name: tiny_system.random_params(each, seed) for seed, (name, each) in enumerate(made.items())}


def student_params(mode: str = "replace", seed: int = 9) -> dict[str, Params]:
    """Encoder and adapter, drawn."""
    parts = {T5: t5.definition(ENCODER), ADAPTER: context_adapter.definition(adapter(mode))}
    return {name: tiny_system.random_params(part, seed) for name, part in parts.items()}


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Ids and masks of prompts of every length from one token on."""
    rng = np.random.Generator(np.random.Philox(seed))
    ids = rng.integers(1, 256, (CONFIG.batch, LENGTH), np.int32)
    mask = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (CONFIG.batch, 1))).astype(np.int32)
    return {"t5_ids": ids * mask, "t5_mask": mask}


def prompts(count: int = 40, *, empty: float = CONFIG.empty) -> PromptSource:
    """Different prompts of two to five words."""
    words = ["red", "small", "circle", "moves", "left", "blue", "cross", "stays"]
    rng = np.random.Generator(np.random.Philox(1))
    texts = [f"{n} " + " ".join(rng.choice(words, rng.integers(1, 5))) for n in range(count)]
    return PromptSource([[{"caption": text} for text in texts]], empty=empty)
