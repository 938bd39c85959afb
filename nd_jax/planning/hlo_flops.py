"""Operations of matrix products and convolutions in a compiled program, loops multiplied out.

Elementwise work is left out, as in every published utilisation figure. XLA's own ``cost_analysis`` counts the body of
a loop once. What a kernel (custom call) computes does not stand in the text: of attention kernels the operations of the
tiles that they visit are counted, which their names tell (``nd_jax.models.kernel_work``); of others nothing.
"""

from __future__ import annotations

import math
import re

from nd_jax.models.kernel_work import kernel_flops
from nd_jax.planning.hlo import Computation, Module, Operation, visits

KERNEL = 'custom_call_target="tpu_custom_call"'


def program_flops(module: Module, unknown: list[str] | None = None) -> float:
    """Multiplications and additions of one execution on one device, kernels included."""
    return sum(
        visit.times * operation_flops(visit.computation, operation)
        for visit in visits(module, unknown)
        for operation in visit.computation.operations.values()
    )


def kernels_flops(module: Module) -> float:
    """The part of ``program_flops`` that kernels compute: known by formula, not read from the program."""
    return sum(
        visit.times * operation_flops(visit.computation, operation)
        for visit in visits(module)
        for operation in visit.computation.operations.values()
        if operation.kind == "custom-call"
    )


def operation_flops(computation: Computation, operation: Operation) -> float:
    """Of one dot, convolution or attention kernel; 0 for anything else."""
    if operation.kind == "custom-call":
        found = re.search(r'op_name="([^"]*)"', operation.attributes)
        is_kernel = KERNEL in operation.attributes and found is not None
        return kernel_flops(found[1]) if is_kernel else 0
    if operation.kind == "dot":
        left = computation.operand(operation).arrays[0]
        dims = [int(n) for n in (operation.setting("lhs_contracting_dims") or "").split(",") if n]
        return 2 * operation.arrays[0].elements * math.prod(left.shape[dim] for dim in dims)
    if operation.kind == "convolution":
        return convolution_flops(computation, operation)
    return 0


def convolution_flops(computation: Computation, operation: Operation) -> int:
    """Two for every pair of an output and a kernel element that meets data rather than padding or a dilation's hole.

    Dots become convolutions on a TPU, batched ones by such holes, so that all pairs would be far too many.
    """
    (left, right), out = (computation.operand(operation, i).arrays[0] for i in (0, 1)), operation.arrays[0]
    labels = operation.setting("dim_labels")
    lhs, rhs, result = re.split("_|->", labels)
    window = _window(operation.attributes, sum(c.isdigit() for c in rhs))
    pairs = 1
    for dim, each in enumerate(window):
        size = left.shape[lhs.index(str(dim))]
        outputs = out.shape[result.index(str(dim))]
        pairs *= _meeting(size, outputs, **each)
    groups = int(operation.setting("batch_group_count") or 1)
    batch = left.shape[lhs.index("b")] // groups
    features = right.shape[rhs.index("o")] * right.shape[rhs.index("i")]
    return 2 * pairs * batch * features


def _window(attributes: str, count: int) -> list[dict[str, int]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    given = dict(part.split("=") for part in found[1].split()) if found else {}

    def numbers(name: str, default: str) -> list[str]:
        return given[name].split("x") if name in given else [default] * count

    rows = zip(
        *(numbers("size", "1"), numbers("stride", "1"), numbers("pad", "0_0")),
        *(numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1")),
        strict=True,
    )
    names = ("kernel", "stride", "before", "spread", "reach")
    return [
        dict(zip(names, (int(s), int(t), int(p.split("_")[0]), int(x), int(y)), strict=True)) for s, t, p, x, y in rows
    ]


def _meeting(size: int, outputs: int, kernel: int, stride: int, before: int, spread: int, reach: int) -> int:
    """Pairs of output and kernel positions of one dimension that meet an element."""
    if stride == spread == reach == kernel == 1 and not before:
        return min(size, outputs)
    end, count = (size - 1) * spread, 0
    for position in range(kernel):
        first = position * reach - before
        if spread == 1:
            low = max(0, math.ceil(-first / stride))
            high = min(outputs - 1, (end - first) // stride)
            count += max(0, high - low + 1)
        else:
            count += sum(0 <= (at := first + n * stride) <= end and at % spread == 0 for n in range(outputs))
    return count
