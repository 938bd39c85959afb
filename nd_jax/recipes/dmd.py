"""Pyramidal distribution matching: a guided many-step teacher becomes a few-step student (Neodragon, arXiv 2511.06055).

Three denoisers begin as the same many-step one: the student is trained, the teacher stays, the fake learns what the
student generates. One step of the loop is ``fake_updates`` updates of the fake and then one of the student, all on one
batch of videos and prompts but each with units, noise and levels of its own. So every step logs everything, learning
rates and averages count student updates, and a ratio is a number instead of a schedule that a resumed run must find
again. The fake's updates are a loop: the ratio does not change the size of the program.

The student's update has two passes, because weights are bounded over the whole batch: first, without gradients, what
teacher and fake say of its predictions; then its gradient, with weights and answers given. Either may go through the
batch in microbatches. The price is one more forward pass of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.system import DENOISER, Conditions, SystemConfig, TextTokens, encode_text
from nd_jax.pyramid.clean import clean_prediction, renoised
from nd_jax.pyramid.targets import NoisyClip, per_row, per_sample_loss
from nd_jax.recipes.dmd_config import DmdRecipeConfig, check
from nd_jax.recipes.dmd_diagnostics import previous_frame, row_sizes, summary
from nd_jax.recipes.dmd_loss import (
    cauchy_loss,
    error_weights,
    even_levels,
    few_step_levels,
    guided,
    matching_loss,
)
from nd_jax.recipes.flow_matching import FlowRecipe, normals
from nd_jax.recipes.own_steps import own_steps
from nd_jax.recipes.packed import Packed
from nd_jax.recipes.recovery import at_rest
from nd_jax.training.optim import FROZEN, in_parts, make_optimizer, value_and_grad
from nd_jax.training.sharding import DEFAULT_TABLE, Rule
from nd_jax.training.state import TrainState

NEGATIVE = "negative"
"""Part of the frozen state: the conditions of the empty prompt."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DmdState(TrainState):
    """``params`` is the student's system; ``frozen`` the teacher's denoiser and the empty prompt's conditions."""

    fake: Params | None = None
    fake_opt_state: Any = None


class DmdRecipe(FlowRecipe):
    """Pyramidal distribution matching for the loop, on the batches of flow matching.

    ``negative`` are the tokens of one prompt, [1, S] and [1, S2]: the empty one, as the teacher was trained with.
    ``init(key, student, teacher)`` takes the student's networks and the teacher's denoiser (default: the student's);
    the fake begins as the student. The teacher may have more blocks. It rests in the compute dtype.

    History is the data's, corrupted as in flow matching; a student trained so has never seen its own. Units that the
    student generated would replace the earlier ones of ``latents`` in the examples of ``step``.

    Raises UserError for settings that cannot be, and for a student without denoiser.
    """

    config: DmdRecipeConfig

    def __init__(
        self,
        system: SystemConfig,
        config: DmdRecipeConfig,
        *,
        negative: TextTokens,
        table: tuple[Rule, ...] = DEFAULT_TABLE,
        **options: Any,
    ):
        super().__init__(system, config, table=(Rule(rf"^{NEGATIVE}/", whole=True, label=FROZEN), *table), **options)
        check(config, self.schedule.stages)
        shapes = tuple(np.shape(ids) for ids in negative)
        text, clip = self.lengths
        if shapes != ((1, text), (1, text), (1, clip), (1, clip)):
            raise UserError(f"dmd: negative prompt of shapes {shapes}; expected one row of {text} and {clip} tokens")
        self.negative = negative
        self.fake_optimizer = make_optimizer(config.fake_optim, self.rules)
        self._fake_grads = value_and_grad(self.fake_loss, config.microbatches)
        self._judge = in_parts(self.judge, config.microbatches)

    def init(self, key: jax.Array, student: Params, teacher: Params | None = None) -> DmdState:
        if DENOISER not in student:
            raise UserError(f"dmd: a student without {DENOISER}; expected a trained system to begin with")
        state = super().init(key, student)
        denoiser = state.params[DENOISER]
        negative = encode_text(self.definitions, state.params, self.negative)
        resting = at_rest(denoiser if teacher is None else teacher, jnp.dtype(self.config.dtype))
        frozen, fake = {DENOISER: resting, NEGATIVE: negative._asdict()}, {DENOISER: denoiser}
        known = vars(state) | {"frozen": frozen}
        return DmdState(**known, fake=fake, fake_opt_state=self.fake_optimizer.init(fake))

    def draws(self, key: jax.Array) -> dict[str, Any]:
        """All randomness of one update, of either network: besides flow matching's, ``local`` (the level of the
        student's input), ``level`` in [0, 1) (for that of the comparison) and ``simulated`` as [B, G], and per column
        the ``fresh`` noise [B, 1, h_i, w_i, C] of the stage's own size; with ``renew`` also noise ``again`` for own
        steps, [B, most steps - 1, 1, h_i, w_i, C]."""
        key, uniform_key, normal_key = jax.random.split(key, 3)
        drawn = super().draws(key)
        level, simulated = jax.random.uniform(uniform_key, (2, *drawn["uniform"].shape))
        steps = [self.config.steps[stage] for stage in self.columns]
        local = [few_step_levels(drawn["uniform"][:, group], n) for group, n in enumerate(steps)]
        channels = self.system.diffusion_transformer.in_channels
        shapes = [(*envelope.clips[-1], channels) for envelope in self.envelopes]
        again = [(max(steps) - 1, *shape) for shape in shapes] if self.config.renew else []
        arrays = normals(normal_key, level.shape[0], shapes + again)
        drawn |= {"local": jnp.stack(local, axis=1), "level": level, "simulated": simulated < self.config.simulated}
        return drawn | {"fresh": arrays[: len(shapes)], "again": arrays[len(shapes) :]}

    def velocity(self, denoiser: Params, packed: Packed, remat: str = "none") -> list[Float[Array, "b t h w c"]]:
        """A denoiser's float32 answer for every column."""
        answers = self.definitions[DENOISER](denoiser, *packed.inputs, remat=remat)
        return [answer.astype(jnp.float32) for answer in answers]

    def scene(self, examples: dict[str, Any]) -> Packed:
        """``assemble`` for examples that hold conditions as [B, G, ...]."""
        rows = [examples[name].reshape(-1, *examples[name].shape[2:]) for name in Conditions._fields]
        return self.assemble(Conditions(*rows), examples)

    def inputs(self, student: Params, examples: dict[str, Any]) -> Packed:
        """What the student is asked: data at the drawn level, or where its own steps from the stage's start led."""
        packed = self.scene(examples)
        steps = [self.config.steps[stage] for stage in self.columns]
        if max(steps) == 1 or not self.config.simulated:
            return packed

        def velocity(asked: Packed) -> list[Array]:
            return self.velocity(student, asked)

        noise = examples["again"] if self.config.renew else None
        own = own_steps(velocity, packed, self.schedule, self.columns, steps, noise)
        simulated = jnp.moveaxis(examples["simulated"], 1, 0)
        chosen = [
            jnp.where(per_row(pick, z), z, each.clips[-1])
            for pick, z, each in zip(simulated, own, packed.examples, strict=True)
        ]
        return packed.with_inputs(chosen)

    def clean(self, student: Params, packed: Packed, remat: str = "none") -> list[Float[Array, "b t h w c"]]:
        """The student's clean prediction for every column of its ``inputs``."""
        return [
            clean_prediction(self.schedule, stage, each.clips[-1], v, each.local, exact=self.config.exact)
            for stage, each, v in zip(self.columns, packed.examples, self.velocity(student, packed, remat), strict=True)
        ]

    def renoised(self, clean: Sequence[Array], examples: dict[str, Any], local: Float[Array, "b g"]) -> list[NoisyClip]:
        """Clean predictions back on the flow of their stages, at local noise ``local``."""
        return [
            renoised(self.schedule, stage, z, fresh, local[:, group])
            for group, (stage, z, fresh) in enumerate(zip(self.columns, clean, examples["fresh"], strict=True))
        ]

    def fake_loss(self, fake: Params, examples: dict[str, Any], student: Params) -> tuple[Array, dict[str, Any]]:
        """Flow matching on what the student generates, at uniform local noise; its mean, and each stage's."""
        packed = self.inputs(student, examples)
        clips = self.renoised(self.clean(student, packed), examples, 1 - examples["level"])
        packed = packed.at(clips)
        return self.velocity_error(self.velocity(fake[DENOISER], packed, self.config.remat), packed)

    def teacher_velocity(
        self, frozen: Params, examples: dict[str, Any], clips: Sequence[NoisyClip]
    ) -> list[Float[Array, "b t h w c"]]:
        """The teacher's guided velocity. Each row and its twin with the empty prompt are neighbours, on one device."""
        first, later = self.config.first_guidance, self.config.later_guidance
        if first == later == 1:
            return self.velocity(frozen[DENOISER], self.scene(examples).at(clips))
        pairs, clips = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), (examples, list(clips)))
        empty = jnp.arange(len(pairs["unit"])) % 2 == 0
        pairs |= {name: jnp.where(per_row(empty, pairs[name]), x, pairs[name]) for name, x in frozen[NEGATIVE].items()}
        answers = self.velocity(frozen[DENOISER], self.scene(pairs).at(clips))
        guidance = jnp.where(examples["unit"] == 0, first, later)
        answers = [answer.reshape(-1, 2, *answer.shape[1:]) for answer in answers]
        return [guided(v[:, 0], v[:, 1], guidance[:, group]) for group, v in enumerate(answers)]

    def judge(self, examples: dict[str, Any], student: Params, fake: Params, frozen: Params) -> dict[str, Any]:
        """What teacher and fake say of the student's predictions.

        Per column the student's ``input`` and the ``teacher``'s and ``fake``'s velocities, and ``sizes``, see
        ``row_sizes``.
        """
        packed = self.inputs(student, examples)
        clean = self.clean(student, packed)
        clips = self.renoised(clean, examples, even_levels(examples["level"], self.config.levels))
        answers = {
            "teacher": self.teacher_velocity(frozen, examples, clips),
            "fake": self.velocity(fake[DENOISER], packed.at(clips)),
        }
        columns = enumerate(zip(self.columns, self.column_latents(examples), strict=True))
        unit, stages = examples["unit"], self.schedule.stages
        sizes = row_sizes(
            **answers,
            target=[clip.target for clip in clips],
            clean=clean,
            truth=[each.clean for each in packed.examples],
            before=[previous_frame(latents, unit[:, group], stage, stages) for group, (stage, latents) in columns],
            reduction=self.config.cauchy_reduction,
        )
        return {"input": [each.clips[-1] for each in packed.examples], **answers, "sizes": sizes}

    def loss(self, params: Params, examples: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """The student's loss, for examples that hold what ``judge`` gives and ``weight`` [B, G]."""
        packed = self.scene(examples).with_inputs(examples["input"])
        clean = self.clean(params[DENOISER], packed, self.config.remat)
        truth = [each.clean for each in packed.examples]
        weights = jnp.moveaxis(examples["weight"], 1, 0)
        matching = jax.tree.map(matching_loss, clean, examples["teacher"], examples["fake"], list(weights))
        cauchy = [cauchy_loss(z, z_i, self.config.cauchy_reduction) for z, z_i in zip(clean, truth, strict=True)]
        terms = {"matching": jnp.mean(jnp.stack(matching)), "cauchy": jnp.mean(jnp.stack(cauchy))}
        errors = [per_sample_loss(z, z_i) for z, z_i in zip(clean, truth, strict=True)]
        loss = terms["matching"] + self.config.cauchy_weight * terms["cauchy"]
        return loss, {"student": terms, "clean_error": self.stage_means(errors)}

    def step(self, state: DmdState, batch: dict[str, Array]) -> tuple[DmdState, dict]:
        config, student = self.config, state.params[DENOISER]
        rows = config.batch // len(self.columns)
        examples = {name: x.reshape(rows, -1, *x.shape[1:]) for name, x in batch.items()}
        conditions = self.encode(state.params, examples)._asdict()
        examples |= {name: x.reshape(rows, -1, *x.shape[1:]) for name, x in conditions.items()}
        draws = jax.vmap(self.draws)(jax.random.split(state.step_key(), config.fake_updates + 1))

        def update_fake(carry: tuple, drawn: dict[str, Any]) -> tuple[tuple, dict]:
            fake, opt_state = carry
            grads, metrics = self._fake_grads(fake, examples | drawn, student)
            fake, opt_state, told = self.fake_optimizer.apply(grads, opt_state, fake)
            return (fake, opt_state), {**metrics, "optim": told}

        carry = state.fake, state.fake_opt_state
        (fake, fake_opt_state), fakes = jax.lax.scan(update_fake, carry, jax.tree.map(lambda x: x[:-1], draws))
        fakes = jax.tree.map(jnp.mean, fakes)

        examples |= jax.tree.map(lambda x: x[-1], draws)
        judged = self._judge(examples, student, fake, state.frozen)
        weight = error_weights(judged["sizes"]["teacher_error"], config.weighting, config.weight_floor)
        grads, metrics = self._grads({DENOISER: student}, examples | judged | {"weight": weight})
        # The optimizer expects a gradient for everything in params; frozen text has none.
        grads = jax.tree.map(jnp.zeros_like, state.params) | grads
        state, optim = state.advance(grads, self.optimizer, ema_decay=config.ema_decay)
        told = summary(
            judged["sizes"], weight, examples["unit"], stages=self.columns, cauchy_weight=config.cauchy_weight
        )
        metrics |= {**told, "fake": fakes, "optim": optim}
        return state.replace(fake=fake, fake_opt_state=fake_opt_state), metrics
