"""Denoiser cases: predictions in every layout, block states, loss and gradients; pieces are in ``mmdit_pieces``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nd_jax.models import mmdit
from nd_jax.models.functional import Params
from nd_jax.pyramid.targets import flow_loss, per_sample_loss
from nd_jax.verification import mmdit_pieces
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.layouts import from_torch, to_torch
from nd_jax.verification.samples import Clips, clips_of, layouts_of
from nd_jax.verification.weights import load, read_config, torch_tensors


class Denoiser:
    """A case's denoiser, compiled for each shape it meets."""

    def __init__(self, case: Case, config: mmdit.MMDiTConfig):
        self.config, self.params = config, load(case, "mmdit", config)
        self.definition = mmdit.definition(config, dtype=case.dtype)
        self._run = jax.jit(self.definition, static_argnames="return_blocks")

    def __call__(self, subcase: Subcase, sample: Clips, timestep: Float[Array, " n"], **options: Any) -> Any:
        """Predictions with the subcase's text; ``return_blocks`` as in ``mmdit``."""
        return self._run(self.params, *self.arguments(subcase, sample, timestep), **options)

    def arguments(self, subcase: Subcase, sample: Clips, timestep: Float[Array, " n"]) -> tuple:
        text, mask = subcase.input("encoder_hidden_states"), subcase.input("encoder_attention_mask")
        pooled = subcase.input("pooled_projections")
        return sample, text, pooled, timestep, layouts_of(sample, mask, self.config.patch_size)

    def gradients(self, subcase: Subcase) -> Outputs:
        """Loss of the current clips against ``target/GROUP``, and its gradient by every parameter."""
        targets = [from_torch(target) for target in subcase.input_list("target")]
        arguments = self.arguments(subcase, clips_of(subcase), subcase.input("timestep_ratio"))

        def loss(params: Params) -> tuple[Array, Array]:
            predictions = self.definition(params, *arguments)
            each = [per_sample_loss(*pair) for pair in zip(predictions, targets, strict=True)]
            return flow_loss(predictions, targets), jnp.concatenate(each)

        (value, each), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.params)
        yield from (("loss", value), ("loss_per_sample", each))
        for name, gradient in torch_tensors("mmdit", self.config, gradients).items():
            yield f"grad/{name}", gradient
            yield f"grad_norm/{name}", np.linalg.norm(gradient.astype(np.float64))


def predictions(values: Sequence[Float[Array, "b t h w c"]]) -> Outputs:
    yield from ((f"pred/{group}", to_torch(value)) for group, value in enumerate(values))


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """Load the denoiser once; the function returned recomputes one subcase."""
    config = read_config(case, "mmdit")
    whole = any("/pred/" in name for name in case.outputs)
    denoiser = Denoiser(case, config) if whole else None
    pieces = mmdit_pieces.Pieces(case, config)

    def outputs(subcase: Subcase) -> Outputs:
        if denoiser is None or "encoder_hidden_states" not in subcase.inputs:
            yield from pieces(subcase)
            return
        if any(name.startswith("target/") for name in subcase.inputs):
            yield from denoiser.gradients(subcase)
            return
        staged = any(name.startswith("blocks/") for name in subcase.outputs)
        result = denoiser(subcase, clips_of(subcase), subcase.input("timestep_ratio"), return_blocks=staged)
        if staged:
            result, states = result
            for block, (image, text) in enumerate(zip(states.image, states.text, strict=True)):
                yield f"blocks/{block}/image", image
                yield f"blocks/{block}/text", text
            yield f"blocks/{len(states.image)}/image", states.last_image
        yield from predictions(result)
        if denoiser.config.context_embedder:
            network = denoiser.definition.bind(denoiser.params)
            yield "context_embedder_out", network.context_embedder(jnp.asarray(subcase.input("encoder_hidden_states")))

    return outputs
