"""Where training hangs its sharding constraints, so that the networks need not know about meshes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class ShardingHooks:
    """Two optional functions that a network calls at fixed points; both default to the identity.

    ``activation(x, name)`` constrains activations: ``"image"`` [B, L, D] and ``"text"`` [B, S, D] at block boundaries,
    ``"projected"`` and ``"heads"`` [B, L, H, K] (queries, keys and values as made, and before attention), ``"seen"``
    [B, L, D] (after it), ``"whole"`` [B, L, D] (all tokens of an example on one device, where they are cut into groups:
    a compiler exchanges borders piece by piece otherwise), ``"prompts"`` [N, S, D] in text encoders, and ``"pixels"``
    [B, ..., H, W, C] in networks of convolutions.
    ``weights(w, name)`` receives one layer's weight, kernels already in the compute dtype, inside the scan body, with
    its path inside the layer (``"attn/to_q/kernel"``), and typically gathers it: the wire then carries bf16 and only
    one layer is whole at a time. It may change the sharding only, by a sharding constraint, reshard or all-gather; what
    these make is never kept for the backward pass.
    """

    activation: Callable[[jax.Array, str], jax.Array] | None = None
    weights: Callable[[jax.Array, str], jax.Array] | None = None
    attention: Callable[..., jax.Array] | None = None
    """Takes the place of dense attention where every token's time is known before compiling: ``attention(q, k, v,
    asked, known)`` as ``splash.splash_attention``."""
    head_ways: tuple[int, int] = (1, 1)
    """Ways that heads are split, by the layer's weights and within each of these parts by attention alone."""

    def constrain(self, x: jax.Array, name: str) -> jax.Array:
        """``x`` under the constraint for activations called ``name``."""
        return x if self.activation is None else self.activation(x, name)

    def spread_heads(self, x: jax.Array) -> jax.Array:
        """Queries, keys or values [B, L, H, K] as attention should find them: behind every part's heads stand as many
        of zeros [B, L, H', K] as make them divide. First they lie as their layer's input does, so that its gradient is
        summed over every token once and not by all that share the heads."""
        x = self.constrain(x, "projected")
        parts, ways = self.head_ways
        if x.shape[2] % parts == 0 and (spare := -(x.shape[2] // parts) % ways):
            split = x.reshape(*x.shape[:2], parts, -1, x.shape[3])
            split = jnp.pad(split, [(0, spare if dim == 3 else 0) for dim in range(5)])
            x = split.reshape(*x.shape[:2], -1, x.shape[3])
        return self.constrain(x, "heads")

    def own_heads(self, x: jax.Array, channels: int) -> jax.Array:
        """What attention found [B, L, H' * K] as the next layer should find it, without what came of zeros [B, L,
        ``channels``]."""
        x = self.constrain(x, "seen")
        if x.shape[2] == channels:
            return x
        parts = self.head_ways[0]
        kept = x.reshape(*x.shape[:2], parts, -1)[..., : channels // parts]
        return self.constrain(kept.reshape(*x.shape[:2], channels), "seen")

    def gather(self, w: jax.Array, name: str = "") -> jax.Array:
        """``w`` as the layer should read it; ``name`` is its path inside the layer."""
        return w if self.weights is None else self.weights(w, name)


NO_HOOKS = ShardingHooks()
"""The identity everywhere."""
