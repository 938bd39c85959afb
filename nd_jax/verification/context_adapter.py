"""ContextAdapter cases."""

from __future__ import annotations

from collections.abc import Callable

import jax

from nd_jax.models import context_adapter
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.weights import load, read_config


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """Load the weights once; the function returned recomputes one subcase."""
    config = read_config(case, "context_adapter")
    params, run = load(case, "context_adapter", config), jax.jit(context_adapter.definition(config, dtype=case.dtype))

    def outputs(subcase: Subcase) -> Outputs:
        yield "y", run(params, subcase.input("x"))

    return outputs
