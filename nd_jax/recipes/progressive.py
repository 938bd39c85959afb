"""Progressive distillation on the pyramid (Salimans and Ho, arXiv 2202.00512; a baseline of Neodragon, 2511.06055).

One of the student's Euler steps in a stage should go where several of its teacher's go, guided. In rounds, the number
of steps falls by that factor each time: from the second round on the teacher is the student of the round before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.system import DENOISER, SystemConfig
from nd_jax.pyramid.targets import NoisyClip, per_row
from nd_jax.recipes.dmd_loss import few_step_levels
from nd_jax.recipes.few_step_config import FewStepConfig
from nd_jax.recipes.recovery import at_rest
from nd_jax.recipes.regression import RegressionRecipe
from nd_jax.training.state import TrainState


@dataclass(frozen=True)
class ProgressiveConfig(FewStepConfig):
    """What a run of progressive distillation does."""

    teacher_steps: int = 2
    """Of the teacher, in one of the student's."""
    rounds: int = 1
    """In round r of R the student takes ``steps * teacher_steps^(R - r)`` steps in each stage."""
    round_steps: int = 0
    """Updates of every round but the last, which takes what is left."""
    ema_decay: float = 0.99


class ProgressiveRecipe(RegressionRecipe):
    """For the loop; see ``FewStepRecipe``. Over several rounds the student is as deep as its teacher, and its inputs
    are the data's."""

    config: ProgressiveConfig
    name = "progressive"

    def __init__(self, system: SystemConfig, config: ProgressiveConfig, **options: Any):
        super().__init__(system, config, **options)
        if config.teacher_steps < 2 or config.rounds < 1:
            raise UserError(
                f"progressive: {config.teacher_steps} teacher steps, {config.rounds} rounds; expected at least 2 and 1"
            )
        if config.renew:
            raise UserError("progressive: --recipe.renew; these students take Euler steps")
        if config.rounds > 1 and (config.round_steps < 1 or config.simulated or config.own_history):
            raise UserError(
                f"progressive: {config.rounds} rounds of {config.round_steps} updates, simulated {config.simulated}, "
                f"own history {config.own_history}; expected rounds of at least 1 update on inputs of the data"
            )

    def init(self, key: jax.Array, student: Params, teacher: Params | None = None) -> TrainState:
        state = super().init(key, student, teacher)
        depths = [len(jax.tree.leaves(x[DENOISER]["blocks"])[0]) for x in (state.params, state.frozen)]
        if self.config.rounds > 1 and depths[0] != depths[1]:
            raise UserError(
                f"progressive: a student of {depths[0] + 1} blocks becomes the teacher of the next round, the first "
                f"teacher has {depths[1] + 1}; expected as many, or --recipe.rounds 1"
            )
        return state

    def round(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """Of an update, from 0."""
        return jnp.minimum(step // max(self.config.round_steps, 1), self.config.rounds - 1)

    def step(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict]:
        config, now = self.config, self.round(state.step)
        if config.rounds > 1:
            begins = (now > 0) & (state.step == now * config.round_steps)
            resting = at_rest(state.ema[DENOISER], jnp.dtype(config.dtype))
            teacher = jax.tree.map(lambda new, old: jnp.where(begins, new, old), resting, state.frozen[DENOISER])
            state = state.replace(frozen={**state.frozen, DENOISER: teacher})
        examples, told = self.prepare(state, batch)
        examples |= self.draws(state.step_key())
        factor = config.teacher_steps ** (config.rounds - 1 - now)
        local = [few_step_levels(examples["uniform"][:, g], n * factor) for g, n in enumerate(self.column_steps)]
        rows = len(examples["unit"])
        shared = {"factor": jnp.full(rows, factor), "guided": jnp.full(rows, now == 0)}
        state, metrics = self.learn(state, examples | shared | {"local": jnp.stack(local, axis=1)}, told)
        return state, {**metrics, "round": now}

    def targets(self, examples: dict[str, Any], student: Params, frozen: Params) -> dict[str, Any]:
        """The velocity of one straight step to where the teacher's steps lead."""
        packed = self.inputs(student, examples)
        begun = [each.clips[-1] for each in packed.examples]
        counts = [n * examples["factor"].astype(jnp.float32) for n in self.column_steps]

        def velocity(clips: list[NoisyClip]) -> list[Float[Array, "b t h w c"]]:
            if self.config.rounds == 1:
                return self.teacher_velocity(frozen, examples, clips)
            return jax.lax.cond(
                examples["guided"][0],
                lambda: self.teacher_velocity(frozen, examples, clips),
                lambda: self.velocity(frozen[DENOISER], packed.at(clips)),
            )

        def one(index: Array, latents: list[Array]) -> list[Array]:
            parts, clips = [1 / (n * self.config.teacher_steps) for n in counts], []
            for stage, each, z, part in zip(self.columns, packed.examples, latents, parts, strict=True):
                local = each.local - index * part
                clips.append(NoisyClip(z, each.target, self.schedule.timestep(stage, local), local))
            answers = zip(latents, velocity(clips), parts, strict=True)
            return [z - per_row(part, z) * v for z, v, part in answers]

        ended = jax.lax.fori_loop(0, self.config.teacher_steps, one, begun)
        ways = zip(begun, ended, counts, strict=True)
        return {"input": begun, "target": [per_row(n, z) * (z - end) for z, end, n in ways]}
