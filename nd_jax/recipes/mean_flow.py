"""Mean flows on the pyramid (Geng et al., arXiv 2505.13447; a baseline of Neodragon, 2511.06055).

The student learns the average velocity ``u`` over the rest of its step, ``z_r = z_s - (s - r) u(z_s, s)``. Since ``r``
is held fixed along the flow, ``u = v - (s - r) du/ds`` with the total derivative ``du/ds = v . grad_z u + du/ds``, a
Jacobian-vector product. ``v`` is the guided teacher's.

The interval is conditioned by ``s`` alone: its end ``r`` is the end of the step of the student's grid that ``s`` lies
in, ``r = (ceil(s n) - 1) / n``. So the network needs no second time, keeps its layout, and is sampled by Euler steps.

A network that was told timesteps 1000 .. 1 by sines answers smoothly at those it was trained on and wildly between:
its derivative is mostly noise. ``difference`` d takes the identity over a finite piece of the flow instead,
``u(z_s, s) = (d v + (s - d - r) u(z_s - d v, s - d)) / (s - r)``, an average in which nothing is amplified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.functional import Params
from nd_jax.models.system import SystemConfig
from nd_jax.pyramid.targets import NoisyClip, per_row
from nd_jax.recipes.few_step_config import FewStepConfig
from nd_jax.recipes.regression import RegressionRecipe


@dataclass(frozen=True)
class MeanFlowConfig(FewStepConfig):
    """What a mean-flow run does."""

    power: float = 1.0
    """Samples weigh ``1 / (error + 0.001)^power`` (arXiv 2505.13447, eq. 22); 0 for plain squared errors."""
    difference: float = 0.0
    """Local noise over which the identity is taken, at most what is left of the step; 0 for the derivative itself."""
    at_start: float = 0.25
    """Share of rows at the very start of a step, where the student will be asked; the others lie evenly along it."""
    ema_decay: float = 0.99


def interval_end(local: Float[Array, " b"], steps: int) -> Float[Array, " b"]:
    """End of the even step that local noise in (0, 1] lies in; a step begins at its own level."""
    return jnp.maximum(jnp.ceil(local * steps - 1e-4) - 1, 0) / steps


class MeanFlowRecipe(RegressionRecipe):
    """For the loop; see ``FewStepRecipe``. Inputs are the data's: the student is asked anywhere on the flow."""

    config: MeanFlowConfig
    name = "mean flow"

    def __init__(self, system: SystemConfig, config: MeanFlowConfig, **options: Any):
        super().__init__(system, config, **options)
        if config.renew or config.simulated or config.own_history:
            raise UserError(
                f"mean flow: renew {config.renew}, simulated {config.simulated}, own history {config.own_history}; "
                "expected none of them: its students take Euler steps and are trained on inputs of the data"
            )
        if not 0 <= config.difference <= 1:
            raise UserError(f"mean flow: difference {config.difference}; expected local noise from 0 to 1")
        if config.power < 0 or not 0 <= config.at_start <= 1:
            raise UserError(
                f"mean flow: power {config.power}, at start {config.at_start}; expected at least 0, and a share"
            )

    def draws(self, key: jax.Array) -> dict[str, Any]:
        """``local`` is anywhere in (0, 1] but for the share at a step's start."""
        drawn = super().draws(key)
        return drawn | {"local": jnp.where(drawn["level"] < self.config.at_start, drawn["local"], 1 - drawn["uniform"])}

    def weights(self, error: Array) -> Array:
        return (error + 1e-3) ** -self.config.power

    def targets(self, examples: dict[str, Any], student: Params, frozen: Params) -> dict[str, Any]:
        """``v - (s - r) du/ds``, or its finite form."""
        packed = self.scene(examples)
        asked = [NoisyClip(x.clips[-1], x.target, x.timestep, x.local) for x in packed.examples]
        known = self.teacher_velocity(frozen, examples, asked)

        def average(latents: list[Array], locals_: list[Array]) -> list[Array]:
            clips = [
                NoisyClip(z, each.target, self.schedule.timestep(stage, s), s)
                for stage, each, z, s in zip(self.columns, asked, latents, locals_, strict=True)
            ]
            return self.velocity(student, packed.at(clips))

        points = [clip.noisy for clip in asked], [clip.local for clip in asked]
        spans = [clip.local - interval_end(clip.local, n) for clip, n in zip(asked, self.column_steps, strict=True)]
        if self.config.difference:
            pieces = [jnp.minimum(self.config.difference, span) for span in spans]
            nearer = [z - per_row(d, z) * v for z, v, d in zip(points[0], known, pieces, strict=True)]
            rest = average(nearer, [s - d for s, d in zip(points[1], pieces, strict=True)])
            shares = [per_row(d / span, v) for d, span, v in zip(pieces, spans, known, strict=True)]
            goals = [share * v + (1 - share) * u for share, v, u in zip(shares, known, rest, strict=True)]
            return {"input": points[0], "target": goals}
        _, slopes = jax.jvp(average, points, (known, [jnp.ones_like(clip.local) for clip in asked]))
        goals = [v - per_row(span, v) * slope for v, slope, span in zip(known, slopes, spans, strict=True)]
        return {"input": points[0], "target": goals}
