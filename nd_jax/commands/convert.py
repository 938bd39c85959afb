"""``nd-jax convert import`` and ``nd-jax convert export``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from nd_jax.commands.console import warn

Dtype = Literal["fp32", "bf16", "fp16"]


def convert_import(
    source: Positional[Path],
    destination: Positional[Path],
    dtype: Dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Official PyTorch folder (or one component of it) to nd-jax's own form.

    Args:
        source: official folder, Pyramid-Flow folder, or one component.
        destination: new folder.
        dtype: of the parameters; default: as stored.
        overwrite: replace an existing folder.
    """
    from nd_jax.converters.convert import convert_import as run

    for line in run(source, destination, dtype, overwrite=overwrite):
        warn(line)
    print(destination)


def convert_export(
    source: Positional[Path],
    destination: Positional[Path],
    dtype: Dtype | None = None,
    overwrite: bool = False,
) -> None:
    """nd-jax's own form to an official PyTorch folder.

    Args:
        source: folder written by `nd-jax convert import`.
        destination: new folder.
        dtype: of the parameters; default: as stored.
        overwrite: replace an existing folder.
    """
    from nd_jax.converters.convert import convert_export as run

    for line in run(source, destination, dtype, overwrite=overwrite):
        warn(line)
    print(destination)
