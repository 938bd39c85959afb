"""``nd-jax verify``."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional


def verify(folder: Positional[Path]) -> int:
    """Recompute every golden case found in a folder and compare; exits 1 when one fails.

    Args:
        folder: golden cases, one folder each.
    """
    from nd_jax.verify import run

    return run(folder)
