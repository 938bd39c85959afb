"""One row per compared array."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import numpy as np

from nd_jax.verification.tolerances import Tolerance


class Status(enum.Enum):
    """What became of an output."""

    PASS = "pass"
    FAIL = "FAIL"
    NOT_COMPARED = "not compared"
    NO_NETWORK = "no network yet"


@dataclasses.dataclass(frozen=True)
class Row:
    """``error`` is the largest absolute difference, or the relative one if the tolerance is; infinite for another
    shape or NaN, ``None`` where not compared."""

    case: str
    subcase: str
    output: str
    status: Status
    error: float | None = None
    tolerance: Tolerance | None = None
    note: str = ""


def compare(case: str, subcase: str, output: str, value: Any, expected: np.ndarray, allowed: Tolerance) -> Row:
    """The difference, taken in float64 (integers exactly), against the tolerance."""
    value = np.asarray(value)
    if value.shape != expected.shape:
        note = f"shape {value.shape}, expected {expected.shape}"
        return Row(case, subcase, output, Status.FAIL, float("inf"), allowed, note)
    if value.dtype.kind in "biu" and expected.dtype.kind in "biu":
        difference = np.abs(value.astype(np.int64) - expected.astype(np.int64)).astype(np.float64)
    else:
        difference = np.abs(value.astype(np.float64) - expected.astype(np.float64))
    error = float(difference.max(initial=0.0))
    if allowed.relative:
        error = float(np.linalg.norm(difference) / max(np.linalg.norm(expected.astype(np.float64)), 1e-30))
    note = ""
    if np.isnan(error):
        error, note = float("inf"), "not finite"
    status = Status.PASS if error <= allowed.limit else Status.FAIL
    return Row(case, subcase, output, status, error, allowed, note)
