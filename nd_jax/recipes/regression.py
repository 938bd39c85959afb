"""Recipes that regress a student's velocity to a target which teacher and student make together, without gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nd_jax.models.functional import Params
from nd_jax.models.system import DENOISER, SystemConfig
from nd_jax.pyramid.targets import per_sample_loss
from nd_jax.recipes.few_step import FewStepRecipe
from nd_jax.recipes.few_step_config import FewStepConfig
from nd_jax.training.optim import in_parts
from nd_jax.training.state import TrainState


class RegressionRecipe(FewStepRecipe):
    """``FewStepRecipe`` for subclasses with ``targets``."""

    def __init__(self, system: SystemConfig, config: FewStepConfig, **options: Any):
        super().__init__(system, config, **options)
        self._targets = in_parts(self.targets, config.microbatches)

    def targets(self, examples: dict[str, Any], student: Params, frozen: Params) -> dict[str, Any]:
        """Per column the student's ``input`` and the ``target`` of its velocity there; rows as in ``examples``."""
        raise NotImplementedError

    def weights(self, error: Array) -> Array:
        """Of the samples, by their squared errors and without gradient."""
        return jnp.ones_like(error)

    def loss(self, params: Params, examples: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """Weighted mean of the squared errors of all samples, and each stage's without weights."""
        packed = self.scene(examples).with_inputs(examples["input"])
        answers = self.velocity(params[DENOISER], packed, self.config.remat)
        errors = [per_sample_loss(v, goal) for v, goal in zip(answers, examples["target"], strict=True)]
        weighted = [jax.lax.stop_gradient(self.weights(error)) * error for error in errors]
        return jnp.mean(jnp.stack(weighted)), {"error": self.stage_means(errors)}

    def learn(self, state: TrainState, examples: dict[str, Any], told: dict[str, Any]) -> tuple[TrainState, dict]:
        """The student's update on complete examples."""
        student = state.params[DENOISER]
        examples = examples | self._targets(examples, student, state.frozen)
        grads, metrics = self._grads({DENOISER: student}, examples)
        state, optim = self.advanced(state, grads)
        return state, {**metrics, **told, "optim": optim}

    def step(self, state: TrainState, batch: dict[str, Array]) -> tuple[TrainState, dict]:
        examples, told = self.prepare(state, batch)
        return self.learn(state, examples | self.draws(state.step_key()), told)
