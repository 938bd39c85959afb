"""Files that run code when they are loaded: named, never opened."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from nd_jax.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def refuse_pickle(path: Path) -> NoReturn:
    """Refuse a PyTorch pickle and say how to convert it: unpickling runs code that the file brings along."""
    raise UserError(
        f"{path} is a PyTorch pickle, which can run code when it is loaded; expected safetensors: convert it once "
        f'where PyTorch is installed, python -c "import torch; from safetensors.torch import save_file; '
        f'save_file(torch.load({path.name!r}, weights_only=True), {path.with_suffix(".safetensors").name!r})"'
    )
