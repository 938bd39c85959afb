"""Pre-train a small system's text encoders to name what a caption names.

Ours. The published system begins with encoders that were trained on text at large; here each encoder gets a linear
probe, thrown away afterwards, that has to read every attribute of every object from its output: CLIP from the pooled
vector, T5 from the mean of its states. Denoisers then find their conditions in a linear, disentangled form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nd_jax.models.functional import Params
from nd_jax.models.system import TEXT_PARTS, SystemConfig, TextTokens, encode_text, init_system
from nd_jax.training.optim import OptimConfig, make_optimizer, value_and_grad
from nd_jax.training.sharding import Rules
from nd_jax.training.state import TrainState

PROBES = "probes"
"""Key of the probes beside the encoders in the recipe's parameters."""


@dataclass(frozen=True)
class TextRecipeConfig:
    """What a run does besides its optimizer."""

    batch: int = 128
    """Captions per update."""
    captions: int = 1 << 16
    """Different captions."""
    loose: float = 0.4
    """Share of captions that follow no template."""
    microbatches: int = 1
    ema_decay: float = 0.98
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            learning_rate=2e-3, warmup_steps=50, decay_steps=400, final_fraction=0.02, weight_decay=1e-2
        )
    )


class TextAttributesRecipe:
    """The recipe for the loop.

    Batches: ``t5_ids``, ``t5_mask`` [N, S], ``clip_ids``, ``clip_2_ids`` [N, S2], ``labels`` [N, places, attributes],
    all int32; a negative label is not asked for. ``values`` are the numbers of values of each attribute.
    """

    def __init__(
        self,
        system: SystemConfig,
        config: TextRecipeConfig,
        *,
        values: Sequence[int],
        places: int,
        text_length: int,
        clip_length: int,
    ):
        self.config, self.rules = config, Rules()
        self.values, self.places = tuple(values), places
        self.lengths = (text_length, clip_length)
        self.definitions = {name: part for name, part in system.definitions().items() if name in TEXT_PARTS}
        self.optimizer = make_optimizer(config.optim, self.rules)
        self._grads = value_and_grad(self.loss, config.microbatches)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        n, (text, clip) = self.config.batch, self.lengths
        shapes = {"t5_ids": (text,), "t5_mask": (text,), "clip_ids": (clip,), "clip_2_ids": (clip,)}
        shapes["labels"] = (self.places, len(self.values))
        return {name: jax.ShapeDtypeStruct((n, *shape), jnp.int32) for name, shape in shapes.items()}

    def init(self, key: jax.Array, *given: Params) -> TrainState:
        params = init_system(self.definitions, key)
        tokens = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.batch_spec())
        logits = self.places * sum(self.values)
        params[PROBES] = {
            name: {
                "kernel": jax.random.normal(jax.random.fold_in(key, index), (x.shape[-1], logits)) / x.shape[-1] ** 0.5,
                "bias": jnp.zeros(logits),
            }
            for index, (name, x) in enumerate(jax.eval_shape(self.features, params, tokens).items())
        }
        return TrainState.create(params, self.optimizer, jax.random.fold_in(key, 1), ema=True)

    def features(self, params: Params, batch: dict[str, Array]) -> dict[str, Float[Array, "n d"]]:
        """What each probe reads: ``pooled`` of both towers, and the mean of ``states`` over real tokens."""
        conditions = encode_text(self.definitions, params, TextTokens(*(batch[x] for x in TextTokens._fields)))
        weights = conditions.mask[..., None].astype(jnp.float32)
        return {
            "pooled": conditions.pooled,
            "states": (conditions.text * weights).sum(1) / jnp.maximum(weights.sum(1), 1),
        }

    def read(self, logits: Float[Array, "n l"]) -> list[Float[Array, "n places v"]]:
        """A probe's output as logits over each attribute's values."""
        split = logits.reshape(len(logits), self.places, sum(self.values))
        ends = [sum(self.values[: i + 1]) for i in range(len(self.values) - 1)]
        return jnp.split(split, ends, axis=-1)

    def loss(self, params: Params, batch: dict[str, Array]) -> tuple[Array, dict[str, Any]]:
        """Cross-entropy over named attributes, averaged over probes, and each probe's cross-entropy and accuracy."""
        metrics, total = {}, 0.0
        for name, x in self.features(params, batch).items():
            probe = params[PROBES][name]
            entropy, right = _judge(self.read(x @ probe["kernel"] + probe["bias"]), batch["labels"])
            metrics[name] = {"entropy": entropy, "accuracy": right}
            total += entropy
        return total / len(metrics), metrics

    def step(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict]:
        grads, metrics = self._grads(state.params, batch)
        state, optim_metrics = state.advance(grads, self.optimizer, ema_decay=self.config.ema_decay)
        return state, {"loss": metrics.pop("loss"), "probe": metrics, "optim": optim_metrics}


def _judge(
    logits: list[Float[Array, "n places v"]], labels: Int[Array, "n places attributes"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy (nats) and share of right answers over the labels that are not negative."""
    asked = (labels >= 0).astype(jnp.float32)
    entropy, right = [], []
    for index, each in enumerate(logits):
        label = jnp.maximum(labels[..., index], 0)
        entropy.append(optax.softmax_cross_entropy_with_integer_labels(each, label))
        right.append((each.argmax(-1) == label).astype(jnp.float32))
    return tuple((jnp.stack(x, -1) * asked).sum() / asked.sum() for x in (entropy, right))
