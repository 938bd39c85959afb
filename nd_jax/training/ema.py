"""Exponential moving average of parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from nd_jax.models.functional import Params


def ema_decay(step: Int32[Array, ""], decay: float) -> jax.Array:
    """Decay at ``step`` (0 = first update): ``min(decay, (1 + step) / (10 + step))``.

    The ramp keeps the random initial parameters from lingering in the average of a short run.
    """
    ramp = (1.0 + step) / (10.0 + step)
    return jnp.minimum(decay, ramp).astype(jnp.float32)


def update_ema(ema: Params, params: Params, step: Int32[Array, ""], decay: float) -> Params:
    """``ema + (1 - d) (params - ema)`` in float32, with ``d`` from ``ema_decay``."""
    rate = 1.0 - ema_decay(step, decay)
    return jax.tree.map(lambda e, p: e + (rate * (p.astype(jnp.float32) - e)).astype(e.dtype), ema, params)
