"""CLIP text tower cases: hidden states, both pooling rules, projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from nd_jax.models import clip
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.weights import load, parts_in, read_config


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """Load the weights once; the function returned recomputes one subcase."""
    config = dataclasses.replace(read_config(case, "clip"), with_projection=True)
    with_projection = "text_projection" in parts_in(case, "clip", config)
    config = dataclasses.replace(config, with_projection=with_projection)
    params = load(case, "clip", config)

    def outputs(subcase: Subcase) -> Outputs:
        # Some subcases replace the legacy eos id of the config by the tokenizer's.
        eos = subcase.about.get("eos_token_id", config.eos_token_id)
        run = jax.jit(
            clip.definition(dataclasses.replace(config, eos_token_id=eos), dtype=case.dtype),
            static_argnames="return_hidden_states",
        )
        ids, mask = subcase.input("input_ids"), subcase.inputs.get("attention_mask")
        result = run(params, ids, mask, return_hidden_states=True)._asdict()
        for layer, states in enumerate(result.pop("hidden_states")):
            yield f"hidden_states/{layer}", states
        yield from ((name, value) for name, value in result.items() if value is not None)

    return outputs
