"""Weights that come with the package, in the official layout: small, and trained on the shapes world alone."""

from __future__ import annotations

from pathlib import Path

SHIPPED = "shapes_base"
"""The system that commands use when no other is named."""


def shipped_folder(checkpoint: str | Path) -> Path:
    """The folder that a checkpoint's name stands for: a folder as it is, or weights of the package by their name."""
    path = Path(checkpoint)
    inside = Path(__file__).parent / path
    return inside if str(path) == SHIPPED and not path.exists() else path
