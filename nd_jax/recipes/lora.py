"""Low-rank adaptation (LoRA, arXiv 2106.09685): W + (alpha / rank) A B, with W frozen and A, B trained.

The factors of ``path/kernel`` are ``path/down/kernel`` [..., in, rank] and ``path/up/kernel`` [..., rank, out]; a
leading ``layers`` axis stays. They are merged into the weights before the network runs, so the network knows nothing
of them, and neither does what is exported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.training.paths import map_named, named_leaves

KERNEL = "/kernel"


@dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and how far."""

    rank: int = 16
    """Columns of A and rows of B."""
    alpha: float = 16.0
    """A B counts alpha / rank times, so that the learning rate need not follow the rank."""
    pattern: str = r"SelfAttention/[qkvo]/kernel$"
    """Regular expression searched in the kernels' paths."""


def init_lora(config: LoraConfig, params: Params, key: jax.Array) -> Params:
    """Factors for the kernels that match: A normal with deviation 1 / sqrt(in), B zero, so that nothing changes yet.

    Raises UserError when no kernel matches, or the rank is not below the sizes of one that does.
    """
    chosen = [
        (path, leaf) for path, leaf in named_leaves(params) if path.endswith(KERNEL) and re.search(config.pattern, path)
    ]
    if not chosen:
        raise UserError(f"LoRA: no kernel matches {config.pattern!r}; expected one, such as encoder/.../q/kernel")
    lora: Params = {}
    for number, (path, leaf) in enumerate(chosen):
        *lead, width_in, width_out = leaf.shape
        if not 0 < config.rank < min(width_in, width_out):
            raise UserError(f"LoRA: rank {config.rank} for {path} {list(leaf.shape)}; expected less than its sides")
        noise = jax.random.normal(jax.random.fold_in(key, number), (*lead, width_in, config.rank))
        node = lora
        for part in path.removesuffix(KERNEL).split("/"):
            node = node.setdefault(part, {})
        node["down"] = {"kernel": noise * width_in**-0.5}
        node["up"] = {"kernel": jnp.zeros((*lead, config.rank, width_out))}
    return lora


def merge_lora(config: LoraConfig, params: Params, lora: Params) -> Params:
    """``params`` with the factors' products added to their kernels, each in its kernel's dtype."""
    factors = dict(named_leaves(lora))

    def merged(path: str, leaf: jax.Array) -> jax.Array:
        stem = path.removesuffix("kernel")
        if stem + "down/kernel" not in factors:
            return leaf
        change = factors[stem + "down/kernel"] @ factors[stem + "up/kernel"]
        return (leaf + config.alpha / config.rank * change).astype(leaf.dtype)

    return map_named(merged, params)
