"""T5 encoder cases: token ids to hidden states and their projection, and the relative position buckets."""

from __future__ import annotations

from collections.abc import Callable

import jax

from nd_jax.models import t5
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.weights import load, read_config


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """Load the weights once; the function returned recomputes one subcase."""
    config = read_config(case, "t5")
    params, run = load(case, "t5", config), jax.jit(t5.definition(config, dtype=case.dtype))

    def outputs(subcase: Subcase) -> Outputs:
        if "relative_position" in subcase.inputs:
            yield (
                "bucket",
                t5.relative_position_bucket(
                    subcase.input("relative_position"),
                    config.relative_attention_num_buckets,
                    config.relative_attention_max_distance,
                ),
            )
        else:
            result = run(params, subcase.input("input_ids"), subcase.inputs.get("attention_mask"))
            yield "encoder_last_hidden_state", result.last_hidden_state
            if result.prompt_embeds is not None:
                yield "prompt_embeds", result.prompt_embeds

    return outputs
