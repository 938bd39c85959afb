"""What an attention kernel multiplies, written into the names of a program's operations.

A kernel is a black box in a traced or compiled program. The scope around it says how many multiplications and additions
one product of its tiles takes, and the kernel's own name which pass it is; both survive compilation as ``op_name``.
"""

from __future__ import annotations

import re

SCOPE = "attention_work_"
PRODUCTS = {"_dkv": 4, "_dq": 3}
"""Products of the backward kernels: both compute scores and the gradients of probabilities again, one then those of
keys and values, the other those of queries. Forward: scores, and the weighted sum of values."""
FORWARD = 2


def scope(work: int) -> str:
    """The scope's name for ``work`` = examples x heads x pairs in computed tiles x channels of a head."""
    return f"{SCOPE}{work}"


def kernel_flops(name: str) -> float:
    """Multiplications and additions of the kernel with this full name; 0 for kernels that do not tell."""
    found = re.findall(rf"{SCOPE}(\d+)", name)
    if not found:
        return 0.0
    products = next((count for phase, count in PRODUCTS.items() if phase in name), FORWARD)
    return 2.0 * products * int(found[-1])
