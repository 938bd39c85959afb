"""Pyramidal distribution matching: a guided many-step teacher becomes a few-step student (Neodragon, arXiv 2511.06055).

Three denoisers begin as the same many-step one: the student is trained, the teacher stays, the fake learns what the
student generates. One step of the loop is ``fake_updates`` updates of the fake and then one of the student, all on one
batch of videos and prompts but each with units, noise and levels of its own. So every step logs everything, learning
rates and averages count student updates, and a ratio is a number instead of a schedule that a resumed run must find
again. The fake's updates are a loop: the ratio does not change the size of the program.

By default the student generates once for all of them (``shared``): the fake learns on the predictions that are judged
afterwards, put back on the flow anew. The student's update has two passes, because weights are bounded over the whole
batch: first, without gradients, what teacher and fake say of its predictions; then its gradient, with weights and
answers given. In microbatches the price is one more forward pass of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nd_jax.models.functional import Params
from nd_jax.models.system import DENOISER, SystemConfig
from nd_jax.recipes.dmd_config import DmdRecipeConfig, check
from nd_jax.recipes.dmd_diagnostics import frame_at, row_sizes, summary
from nd_jax.recipes.dmd_loss import cauchy_loss, error_weights, even_levels, matching_loss
from nd_jax.recipes.few_step import NEGATIVE
from nd_jax.recipes.predicting import PredictingRecipe
from nd_jax.training.optim import in_parts, make_optimizer, value_and_grad
from nd_jax.training.state import TrainState

__all__ = ["NEGATIVE", "DmdRecipe", "DmdState"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DmdState(TrainState):
    """``params`` is the student's system; ``frozen`` the teacher's denoiser and the empty prompt's conditions."""

    fake: Params | None = None
    fake_opt_state: Any = None


class DmdRecipe(PredictingRecipe):
    """Pyramidal distribution matching for the loop; see ``FewStepRecipe``. The fake begins as the student."""

    config: DmdRecipeConfig
    name = "dmd"

    def __init__(self, system: SystemConfig, config: DmdRecipeConfig, **options: Any):
        super().__init__(system, config, **options)
        check(config, self.schedule.stages)
        self.fake_optimizer = make_optimizer(config.fake_optim, self.rules)
        self._fake_grads = value_and_grad(self.fake_loss, config.microbatches)
        self._generate = in_parts(self.generate, config.microbatches)
        self._judge = in_parts(self.judge, config.microbatches)

    def init(self, key: jax.Array, student: Params, teacher: Params | None = None) -> DmdState:
        state = super().init(key, student, teacher)
        fake = {DENOISER: state.params[DENOISER]}
        return DmdState(**vars(state), fake=fake, fake_opt_state=self.fake_optimizer.init(fake))

    def fake_loss(self, fake: Params, examples: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """Flow matching on what the student generated, at uniform local noise; its mean, and each stage's."""
        clips = self.renoised(examples["clean"], examples, 1 - examples["level"])
        packed = self.scene(examples).at(clips)
        return self.velocity_error(self.velocity(fake[DENOISER], packed, self.config.remat), packed)

    def judge(self, examples: dict[str, Any], fake: Params, frozen: Params) -> dict[str, Any]:
        """What teacher and fake say of the student's predictions: their velocities for every column, and ``sizes``, see
        ``row_sizes``."""
        packed, clean = self.scene(examples), examples["clean"]
        clips = self.renoised(clean, examples, even_levels(examples["level"], self.config.levels))
        answers = {
            "teacher": self.teacher_velocity(frozen, examples, clips),
            "fake": self.velocity(fake[DENOISER], packed.at(clips)),
        }

        def frames(latents: Sequence[Array], back: int) -> list[Array]:
            stages, unit = self.schedule.stages, examples["unit"] - back
            parts = enumerate(zip(self.columns, latents, strict=True))
            return [frame_at(each, unit[:, group], stage, stages) for group, (stage, each) in parts]

        data = self.data_latents(examples)
        sizes = row_sizes(
            **answers,
            target=[clip.target for clip in clips],
            clean=clean,
            truth=frames(data, 0),
            before=frames(self.column_latents(examples), 1),
            data_before=frames(data, 1),
            reduction=self.config.cauchy_reduction,
        )
        if not self.config.videos:  # motion is then told as it is
            sizes["data_motion"] = jnp.ones_like(sizes["data_motion"])
        return answers | {"sizes": sizes}

    def loss(self, params: Params, examples: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """The student's loss, for examples that hold what ``generate`` and ``judge`` give and ``weight`` [B, G]."""
        packed = self.scene(examples).with_inputs(examples["input"])
        return self.clean_loss(self.clean(params[DENOISER], packed, self.config.remat), examples)

    def clean_loss(self, clean: Sequence[Array], examples: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """The same of clean predictions."""
        packed, from_data = self.scene(examples), self.from_data(examples)
        weights = jnp.moveaxis(examples["weight"], 1, 0)
        matching = jax.tree.map(matching_loss, clean, examples["teacher"], examples["fake"], list(weights))
        cauchy = [
            from_data * cauchy_loss(z, each.clean, self.config.cauchy_reduction)
            for z, each in zip(clean, packed.examples, strict=True)
        ]
        terms = {"matching": jnp.mean(jnp.stack(matching)), "cauchy": jnp.mean(jnp.stack(cauchy))}
        return terms["matching"] + self.config.cauchy_weight * terms["cauchy"], {"student": terms}

    def step(self, state: DmdState, batch: dict[str, Array]) -> tuple[DmdState, dict]:
        config, student = self.config, state.params[DENOISER]
        base, told = self.prepare(state, batch)
        draws = jax.vmap(self.draws)(jax.random.split(state.step_key(), config.fake_updates + 1))
        examples = base | jax.tree.map(lambda x: x[-1], draws)
        once = config.microbatches == 1  # then the forward pass that is judged is also the one that learns
        generated, back = self.generate_once(examples, student) if once else (self._generate(examples, student), None)
        examples |= generated

        def update_fake(carry: tuple, drawn: dict[str, Any]) -> tuple[tuple, dict]:
            fake, opt_state = carry
            if config.shared:
                mine = examples | {name: drawn[name] for name in ("level", "fresh")}
            else:
                mine = base | drawn
                mine |= self._generate(mine, student)
            grads, metrics = self._fake_grads(fake, mine)
            fake, opt_state, told = self.fake_optimizer.apply(grads, opt_state, fake)
            return (fake, opt_state), {**metrics, "optim": told}

        carry = state.fake, state.fake_opt_state
        (fake, fake_opt_state), fakes = jax.lax.scan(update_fake, carry, jax.tree.map(lambda x: x[:-1], draws))
        fakes = jax.tree.map(jnp.mean, fakes)

        judged = self._judge(examples, fake, state.frozen)
        weight = error_weights(judged["sizes"]["teacher_error"], config.weighting, config.weight_floor)
        examples |= judged | {"weight": weight}
        if once:
            by_clean = jax.value_and_grad(self.clean_loss, has_aux=True)
            (loss, metrics), pull = by_clean(examples["clean"], examples)
            metrics, grads = {"loss": loss, **metrics}, {DENOISER: back(pull)[0]}
        else:
            grads, metrics = self._grads({DENOISER: student}, examples)
        state, optim = self.advanced(state, grads)
        told |= summary(
            judged["sizes"],
            weight,
            examples["unit"],
            self.from_data(examples),
            stages=self.columns,
            cauchy_weight=config.cauchy_weight,
        )
        metrics |= {**told, "fake": fakes, "optim": optim}
        return state.replace(fake=fake, fake_opt_state=fake_opt_state), metrics
