"""Adversarial distillation on the pyramid (Sauer et al., arXiv 2311.17042 and 2403.12015; a baseline of Neodragon,
2511.06055).

A small head on the frozen teacher's image tokens tells data from the student's clean predictions, both put on the flow
at the same levels with the same noise; the hinge loss trains it, and the student raises what it says of its own. The
Cauchy term holds the student near the data. One pass of the teacher over the predictions serves both updates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.system import DENOISER, SystemConfig
from nd_jax.pyramid.targets import per_sample_loss
from nd_jax.recipes.dmd_loss import Reduction, cauchy_loss, even_levels
from nd_jax.recipes.few_step_config import FewStepConfig
from nd_jax.recipes.packed import Packed
from nd_jax.recipes.predicting import PredictingRecipe
from nd_jax.training.optim import OptimConfig, make_optimizer
from nd_jax.training.state import TrainState


@dataclass(frozen=True)
class AdversarialConfig(FewStepConfig):
    """What an adversarial run does."""

    exact: bool = True
    """The clean prediction that the true velocity takes to the clean latent."""
    levels: int = 4
    """Even levels of local noise at which data and predictions are told apart, 1 among them."""
    features: int = 3
    """Blocks of the teacher whose tokens the head reads, evenly spaced, the last one with text among them."""
    hidden: int = 64
    """Width of the head."""
    cauchy_weight: float = 1.0
    cauchy_reduction: Reduction = "sum"
    ema_decay: float = 0.99
    head_optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            learning_rate=1e-4, schedule="constant", warmup_steps=1, b1=0.0, b2=0.999, weight_decay=0.0
        )
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdversarialState(TrainState):
    """``head`` tells data from predictions."""

    head: Params | None = None
    head_opt_state: Any = None


def init_head(key: jax.Array, features: int, width: int, hidden: int) -> Params:
    """One small MLP for each block that is read."""
    one, two = jax.random.split(key)
    return {
        "in": {
            "kernel": jax.random.normal(one, (features, width, hidden)) * width**-0.5,
            "bias": jnp.zeros((features, hidden)),
        },
        "out": {"kernel": jax.random.normal(two, (features, hidden, 1)) * hidden**-0.5},
    }


def logits(head: Params, tokens: Float[Array, "f b n d"]) -> Float[Array, " b"]:
    """What the head makes of a sample's tokens: mean over tokens and blocks; above 0 is data."""
    size = jnp.sqrt(jnp.mean(jnp.square(tokens), axis=-1, keepdims=True) + 1e-6)
    inner = jnp.einsum("fbnd,fdh->fbnh", tokens / size, head["in"]["kernel"]) + head["in"]["bias"][:, None, None]
    outer = jnp.einsum("fbnh,fho->fbno", jax.nn.gelu(inner), head["out"]["kernel"])
    return jnp.mean(outer, axis=(0, 2, 3))


def hinge(real: Float[Array, "g b"], made: Float[Array, "g b"]) -> Float[Array, ""]:
    """The head's loss: nothing to gain beyond 1 and -1."""
    return jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + made))


class AdversarialRecipe(PredictingRecipe):
    """For the loop; see ``FewStepRecipe``. Histories are the data's, without which nothing is real."""

    config: AdversarialConfig
    name = "adversarial"

    def __init__(self, system: SystemConfig, config: AdversarialConfig, **options: Any):
        super().__init__(system, config, **options)
        if config.own_history or config.microbatches > 1:
            raise UserError(
                f"adversarial: own history {config.own_history}, {config.microbatches} microbatches; expected 0 and 1: "
                "data and predictions of a whole batch are compared"
            )
        for name in ("levels", "features", "hidden"):
            if getattr(config, name) < 1:
                raise UserError(f"adversarial: {name} is {getattr(config, name)}, expected at least 1")
        self.head_optimizer = make_optimizer(config.head_optim, self.rules)

    def init(self, key: jax.Array, student: Params, teacher: Params | None = None) -> AdversarialState:
        state = super().init(key, student, teacher)
        width = self.system.diffusion_transformer.width
        head = init_head(jax.random.fold_in(key, 2), self.config.features, width, self.config.hidden)
        return AdversarialState(**vars(state), head=head, head_opt_state=self.head_optimizer.init(head))

    def tokens(self, frozen: Params, packed: Packed) -> list[Float[Array, "f b n d"]]:
        """The frozen teacher's tokens of every column's current clip, after the blocks that are read."""
        run = self.definitions[DENOISER]
        _, states = run(frozen[DENOISER], *packed.inputs, return_blocks=True, remat=self.config.remat)
        depth = len(states.image)
        image = states.image[np.linspace(0, depth - 1, self.config.features + 1).round().astype(int)[1:]]
        found, end = [], 0
        for envelope in self.envelopes:
            frames, height, width = envelope.clips[-1]
            end += envelope.image_length
            current = frames * height * width // envelope.patch_size**2
            found.append(image[:, :, end - current : end].astype(jnp.float32))
        return found

    def head_loss(self, head: Params, real: list[Array], made: list[Array]) -> tuple[Array, dict[str, Array]]:
        told = [jnp.stack([logits(head, tokens) for tokens in each]) for each in (real, made)]
        return hinge(*told), {"real": jnp.mean(told[0]), "made": jnp.mean(told[1])}

    def step(self, state: AdversarialState, batch: dict[str, Array]) -> tuple[AdversarialState, dict]:
        config = self.config
        examples, told = self.prepare(state, batch)
        examples |= self.draws(state.step_key())
        generated, back = self.generate_once(examples, state.params[DENOISER])
        packed, clean = self.scene(examples), generated["clean"]
        levels = even_levels(examples["level"], config.levels)

        def tokens(latents: list[Array]) -> list[Array]:
            return self.tokens(state.frozen, packed.at(self.renoised(latents, examples, levels)))

        truth = [each.clean for each in packed.examples]
        made, to_clean = jax.vjp(tokens, clean)
        compare = jax.value_and_grad(self.head_loss, has_aux=True)
        (head_loss, opinions), grads = compare(state.head, tokens(truth), made)
        head, head_opt_state, head_told = self.head_optimizer.apply(grads, state.head_opt_state, state.head)

        def opinion(made: list[Array]) -> Array:
            return -jnp.mean(jnp.stack([logits(head, each) for each in made]))

        def regression(clean: list[Array]) -> Array:
            pairs = zip(clean, truth, strict=True)
            return jnp.mean(jnp.stack([cauchy_loss(z, z_i, config.cauchy_reduction) for z, z_i in pairs]))

        generator, by_tokens = jax.value_and_grad(opinion)(made)
        cauchy, by_cauchy = jax.value_and_grad(regression)(clean)
        pull = jax.tree.map(lambda a, b: a + config.cauchy_weight * b, to_clean(by_tokens)[0], by_cauchy)
        state, optim = self.advanced(state, {DENOISER: back(pull)[0]})
        errors = [per_sample_loss(z, z_i) for z, z_i in zip(clean, truth, strict=True)]
        metrics = {
            "loss": generator + config.cauchy_weight * cauchy,
            "student": {"generator": generator, "cauchy": cauchy},
            "clean_error": self.stage_means(errors),
            "head": {"loss": head_loss, **opinions, "optim": head_told},
            "optim": optim,
        }
        return state.replace(head=head, head_opt_state=head_opt_state), metrics | told
