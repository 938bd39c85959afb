"""Recipes that look at a student's clean predictions: made once in a step, put back on the flow as often as needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from nd_jax.models.functional import Params
from nd_jax.pyramid.clean import clean_prediction, renoised
from nd_jax.pyramid.targets import NoisyClip
from nd_jax.recipes.few_step import FewStepRecipe
from nd_jax.recipes.packed import Packed


class PredictingRecipe(FewStepRecipe):
    """``FewStepRecipe`` whose ``config`` also says whether predictions are ``exact``."""

    renoises = True

    def clean(self, student: Params, packed: Packed, remat: str = "none") -> list[Float[Array, "b t h w c"]]:
        """The student's clean prediction for every column of its ``inputs``."""
        return [
            clean_prediction(self.schedule, stage, each.clips[-1], v, each.local, exact=self.config.exact)
            for stage, each, v in zip(self.columns, packed.examples, self.velocity(student, packed, remat), strict=True)
        ]

    def generate(self, examples: dict[str, Any], student: Params) -> dict[str, Any]:
        """Per column the student's ``input`` and its ``clean`` prediction, without gradient."""
        packed = self.inputs(student, examples)
        return {"input": [each.clips[-1] for each in packed.examples], "clean": self.clean(student, packed)}

    def generate_once(self, examples: dict[str, Any], student: Params) -> tuple[dict[str, Any], Callable]:
        """``generate``, and what takes a gradient of the clean predictions back to the student's parameters."""
        packed = self.inputs(student, examples)
        clean, back = jax.vjp(lambda params: self.clean(params, packed, self.config.remat), student)
        return {"input": [each.clips[-1] for each in packed.examples], "clean": clean}, back

    def renoised(self, clean: Sequence[Array], examples: dict[str, Any], local: Float[Array, "b g"]) -> list[NoisyClip]:
        """Clean latents back on the flow of their stages, at local noise ``local``."""
        return [
            renoised(self.schedule, stage, z, fresh, local[:, group])
            for group, (stage, z, fresh) in enumerate(zip(self.columns, clean, examples["fresh"], strict=True))
        ]
