"""What a training run carries from step to step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from nd_jax.models.functional import Params
from nd_jax.training.ema import update_ema
from nd_jax.training.optim import Optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a checkpoint must hold for a run to go on as if nothing had happened."""

    step: Int32[Array, ""]
    params: Params
    opt_state: Any
    key: jax.Array
    """Typed random key; constant, since ``step_key`` folds the step in."""
    ema: Params | None = None
    frozen: Params | None = None
    """Parameters used but never updated, e.g. a teacher. Sharded by the same rules."""

    @classmethod
    def create(
        cls, params: Params, optimizer: Optimizer, key: jax.Array, *, ema: bool = False, frozen: Params | None = None
    ) -> TrainState:
        """A state before its first step; the EMA, if any, starts at the parameters, in float32."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            key=key,
            ema=jax.tree.map(lambda x: x.astype(jnp.float32), params) if ema else None,
            frozen=frozen,
        )

    def step_key(self) -> jax.Array:
        """The key for this step's randomness."""
        return jax.random.fold_in(self.key, self.step)

    def replace(self, **changes: Any) -> TrainState:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def advance(
        self, grads: Params, optimizer: Optimizer, *, ema_decay: float = 0.999
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state after one optimizer step, and the optimizer's metrics (gradient norm, learning rate)."""
        params, opt_state, metrics = optimizer.apply(grads, self.opt_state, self.params)
        ema = None if self.ema is None else update_ema(self.ema, params, self.step, ema_decay)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, ema=ema), metrics
