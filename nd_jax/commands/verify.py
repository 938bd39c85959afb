"""``nd-jax verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def verify(folder: Positional[Path], dtype: Literal["float32", "bfloat16"] = "float32") -> int:
    """Recompute every golden case found in a folder and compare; exits 1 when one fails.

    Args:
        folder: golden cases, one folder each.
        dtype: compute dtype of the networks; bfloat16 has tolerances of its own.
    """
    from nd_jax.verify import run

    return run(folder, dtype)
