"""Train QuickSRNet (arXiv 2303.04336): pictures against themselves, scaled down and up again.

Inputs are antialiased bicubic reductions of real pictures; loss = absolute |x - x'| + squared (x - x')^2, weights ours;
where it begins is said in ``upscaler_start``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.hooks import NO_HOOKS, ShardingHooks
from nd_jax.models.quicksrnet import QuickSRNetConfig, definition, enlarge, near_identity
from nd_jax.training.optim import OptimConfig, make_optimizer, value_and_grad
from nd_jax.training.sharding import Rules
from nd_jax.training.state import TrainState


@dataclass(frozen=True)
class UpscalerRecipeConfig:
    """What an upscaler run does besides its optimizer."""

    batch: int = 16
    """Pictures per update."""
    size: int = 96
    """Height and width of the large pictures, pixels."""
    most: float = 4.0
    """Largest box that a picture is made of, in multiples of its size."""
    absolute: float = 1.0
    """Weight of the mean absolute error, pixels in [0, 1]."""
    squared: float = 0.0
    """Weight of the mean squared error, pixels in [0, 1]."""
    start: Literal["linear", "identity", "random"] = "linear"
    """Begin as the best linear filter (``upscaler_start``; as "identity" where the network has no room for it), as
    nearest upsampling (``near_identity``; 1.5x needs use_ito_connection), or anyhow."""
    microbatches: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; losses are float32 in any case."""
    ema_decay: float = 0.99
    """Of the averaged parameters, which are the result."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            learning_rate=1e-3, warmup_steps=50, decay_steps=4000, final_fraction=0.01, weight_decay=0.0
        )
    )


def reduced(image: Float[Array, "b h w 3"], scale: float) -> Float[Array, "b h2 w2 3"]:
    """Pictures in [0, 1] made smaller by ``scale``: bicubic with antialiasing, clipped."""
    b, h, w, c = image.shape
    small = jax.image.resize(image, (b, round(h / scale), round(w / scale), c), "cubic", antialias=True)
    return jnp.clip(small, 0, 1)


def interpolated(
    image: Float[Array, "b h w 3"], scale: float, method: Literal["bilinear", "bicubic"]
) -> Float[Array, "b h2 w2 3"]:
    """Pictures in [0, 1] made larger by ``scale`` without any learning, clipped: what an upscaler has to beat."""
    b, h, w, c = image.shape
    large = jax.image.resize(image, (b, round(h * scale), round(w * scale), c), method)
    return jnp.clip(large, 0, 1)


class UpscalerRecipe:
    """The upscaler recipe for the loop; batches are ``{"image": uint8 [B, size, size, 3]}``."""

    def __init__(self, network: QuickSRNetConfig, config: UpscalerRecipeConfig, hooks: ShardingHooks = NO_HOOKS):
        # The small picture has whole pixels, and 1.5x needs an even number of them.
        step = 2 * network.ratio.numerator
        if config.size < step or config.size % step:
            near = max(1, round(config.size / step)) * step
            raise UserError(f"upscaler: pictures of {config.size} pixels, expected a multiple of {step}: try {near}")
        if config.absolute + config.squared <= 0 or min(config.absolute, config.squared) < 0:
            raise UserError(
                f"upscaler: weights {config.absolute} and {config.squared}; expected none below 0, and one above"
            )
        self.network, self.config, self.rules, self.hooks = network, config, Rules(), hooks
        self.upscaler = definition(network, dtype=jnp.dtype(config.dtype))
        self.optimizer = make_optimizer(config.optim, self.rules)
        self._grads = value_and_grad(self.loss, config.microbatches)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"image": jax.ShapeDtypeStruct((self.config.batch, self.config.size, self.config.size, 3), jnp.uint8)}

    def init(self, key: jax.Array, *given: Params) -> TrainState:
        """Begins with the parameters ``given``, if any: a linear start needs pictures, which are not to be had here.
        Without any, "linear" is "identity"."""
        params = given[0] if given else self.upscaler.init(key)
        if not given and self.config.start != "random":
            params = near_identity(self.network, params)
        return TrainState.create(params, self.optimizer, jax.random.fold_in(key, 1), ema=True)

    def loss(self, params: Params, examples: dict[str, UInt8[Array, "b h w 3"]]) -> tuple[Array, dict[str, Array]]:
        """Mean loss over pictures, and its terms."""
        image = self.hooks.constrain(examples["image"].astype(jnp.float32) / 255, "pixels")
        small = self.hooks.constrain(reduced(image, self.network.scaling_factor), "pixels")
        made = enlarge(self.upscaler, params, small, self.network).astype(jnp.float32)
        terms = {"absolute": jnp.abs(made - image).mean(), "squared": jnp.square(made - image).mean()}
        return self.config.absolute * terms["absolute"] + self.config.squared * terms["squared"], terms

    def step(self, state: TrainState, batch: dict[str, UInt8[Array, "b h w 3"]]) -> tuple[TrainState, dict]:
        grads, metrics = self._grads(state.params, batch)
        state, optim_metrics = state.advance(grads, self.optimizer, ema_decay=self.config.ema_decay)
        psnr = -10 * jnp.log10(metrics["squared"])
        return state, {"loss": metrics.pop("loss"), "term": metrics, "psnr": psnr, "optim": optim_metrics}
