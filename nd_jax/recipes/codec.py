"""Train a video codec: causal encoder and decoder together, on pixels alone.

Loss = |x - x'| + 0.5 |grad x - grad x'| + (x - x')^2 + kl, ours; see ``linear_start`` for where it begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from nd_jax.models.causal_vae import AsymmetricVAEConfig, NativeVAEConfig, definition, posterior
from nd_jax.models.functional import Params
from nd_jax.recipes.linear_start import linear_start
from nd_jax.training.optim import OptimConfig, make_optimizer, value_and_grad
from nd_jax.training.sharding import Rules
from nd_jax.training.state import TrainState


@dataclass(frozen=True)
class CodecRecipeConfig:
    """What a codec run does besides its optimizer."""

    batch: int = 8
    """Clips per update."""
    frames: int = 9
    """Frames per clip, 1 + 8k: the codec is causal, so what it learns on short clips holds for long ones."""
    kl: float = 1e-6
    """Weight of the KL divergence to the standard normal."""
    edges: float = 0.5
    """Weight of the error of spatial differences: outlines are what shape and size are read from."""
    linear_start: bool = True
    """Begin with weights that pass a coarse picture through (native decoder only)."""
    microbatches: int = 1
    ema_decay: float = 0.99
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=3e-3, warmup_steps=30, decay_steps=1500, weight_decay=1e-5)
    )


def reconstruction_losses(
    reconstruction: Float[Array, "b t h w 3"], video: Float[Array, "b t h w 3"]
) -> dict[str, Float[Array, " b"]]:
    """Per clip: mean absolute and squared error, and mean absolute error of spatial differences."""
    over = (1, 2, 3, 4)
    error = (reconstruction - video).astype(jnp.float32)
    edges = sum(jnp.abs(jnp.diff(error, axis=axis)).mean(over) for axis in (2, 3))
    return {"absolute": jnp.abs(error).mean(over), "squared": jnp.square(error).mean(over), "edges": edges}


class CodecRecipe:
    """The codec recipe for the loop; batches are ``{"video": uint8 [B, T, H, W, 3]}``."""

    def __init__(
        self,
        network: NativeVAEConfig | AsymmetricVAEConfig,
        config: CodecRecipeConfig,
        height: int,
        width: int,
    ):
        self.network, self.config, self.rules = network, config, Rules()
        self.size = (height, width)
        self.codec = definition(network)
        self.optimizer = make_optimizer(config.optim, self.rules)
        self._grads = value_and_grad(self.loss, config.microbatches)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.config.batch, self.config.frames, *self.size, 3)
        return {"video": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def init(self, key: jax.Array, *given) -> TrainState:
        params = given[0] if given else self.codec.init(key)
        if not given and self.config.linear_start:
            params = linear_start(self.network, params)
        return TrainState.create(params, self.optimizer, jax.random.fold_in(key, 1), ema=True)

    def latent_shape(self) -> tuple[int, ...]:
        """[B, T', H/8, W/8, C] of one batch."""
        network, (height, width) = self.network, self.size
        frames = 1 + (self.config.frames - 1) // network.time_scale
        space = network.space_scale
        return (self.config.batch, frames, height // space, width // space, network.encoder_out_channels)

    def loss(self, params: Params, examples: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Mean loss over clips, and its terms; ``examples`` has ``video`` in uint8 and ``noise`` of latent shape."""
        config = self.config
        video = examples["video"].astype(jnp.float32) / 127.5 - 1
        codec = self.codec.bind(params)
        code = posterior(codec.encode(video))
        terms = reconstruction_losses(codec.decode(code.sample(examples["noise"])), video)
        terms = {name: term.mean() for name, term in terms.items()}
        terms["kl"] = code.kl().mean()
        total = terms["absolute"] + terms["squared"] + config.edges * terms["edges"]
        return total + config.kl * terms["kl"], terms

    def step(self, state: TrainState, batch: dict[str, UInt8[Array, "b t h w 3"]]) -> tuple[TrainState, dict]:
        noise = jax.random.normal(state.step_key(), self.latent_shape())
        grads, metrics = self._grads(state.params, {**batch, "noise": noise})
        state, optim_metrics = state.advance(grads, self.optimizer, ema_decay=self.config.ema_decay)
        psnr = 10 * jnp.log10(4 / metrics["squared"])
        return state, {"loss": metrics.pop("loss"), "term": metrics, "psnr": psnr, "optim": optim_metrics}
