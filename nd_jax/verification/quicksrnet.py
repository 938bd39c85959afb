"""Super-resolution cases."""

from __future__ import annotations

from collections.abc import Callable

import jax

from nd_jax.models import quicksrnet
from nd_jax.verification.cases import Case, Outputs, Subcase
from nd_jax.verification.layouts import from_torch, to_torch
from nd_jax.verification.weights import load, read_config


def recompute(case: Case) -> Callable[[Subcase], Outputs]:
    """Load the weights once; the function returned recomputes one subcase."""
    config = read_config(case, "quicksrnet")
    params, run = load(case, "quicksrnet", config), jax.jit(quicksrnet.definition(config, dtype=case.dtype))

    def outputs(subcase: Subcase) -> Outputs:
        yield "image", to_torch(run(params, from_torch(subcase.input("image"))))

    return outputs
