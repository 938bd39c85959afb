"""Operations of matrix products and convolutions as a function asks for them, before any compiler: the count to compare
a compiled program's with. Includes what the backward pass recomputes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval

from nd_jax.models.kernel_work import kernel_flops


def traced_flops(function: Callable, *args: Any) -> float:
    """Of one call; the arguments may be abstract. Nothing is compiled or run. What nobody reads does not count: remat
    leaves such passes of a kernel behind."""
    traced = jax.make_jaxpr(function)(*args).jaxpr
    return jaxpr_flops(partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))[0])


def jaxpr_flops(jaxpr: Any, where: str = "") -> float:
    """Of one evaluation. Loops over a known length are multiplied out; of branches the largest counts, and of
    ``platform_dependent`` ones too. A ``while`` loop without a length counts once. Attention kernels count by the tiles
    that they visit, other kernels not at all; ``where`` is the scope around it all."""
    return sum(_equation_flops(equation, where) for equation in jaxpr.eqns)


def _equation_flops(equation: Any, where: str) -> float:
    name, params = equation.primitive.name, equation.params
    where = f"{where}/{equation.source_info.name_stack}"
    if name == "dot_general":
        left = equation.invars[0].aval.shape
        contracted = params["dimension_numbers"][0][0]
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[dim] for dim in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        features = kernel[numbers.rhs_spec[0]]
        holes = math.prod(params["lhs_dilation"])  # every so many-th input is data
        return 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / features / holes
    if name == "cond":
        return max(jaxpr_flops(branch.jaxpr, where) for branch in params["branches"])
    if name == "pallas_call":
        return kernel_flops(where)
    inner = sum(jaxpr_flops(getattr(each, "jaxpr", each), where) for each in _inside(params))
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":
        return params["mesh"].size * inner
    return inner


def _inside(params: dict[str, Any]) -> list[Any]:
    """Programs among an equation's parameters; of a custom derivative's only the one that is run."""
    names = ("jaxpr", "call_jaxpr", "body_jaxpr", "fun_jaxpr")
    return [params[name] for name in names if params.get(name) is not None]
