"""Which blocks of the original denoiser a pruned system still has: one small JSON file in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nd_jax.checked_files import read_json, shown
from nd_jax.errors import UserError

RECORD = "pruning.json"
"""Ours; the official loader ignores it."""


def record(kept: tuple[int, ...]) -> dict[str, Any]:
    """The file's content. The last block always stays, so its number tells how many there were."""
    return {"kept_blocks": list(kept), "original_blocks": kept[-1] + 1}


def read_record(folder: Path, blocks: int) -> tuple[int, ...] | None:
    """Original indices of the ``blocks`` blocks that a folder's denoiser has, or None where nothing was pruned.

    Raises UserError unless they are ascending, as many as there are blocks, and end with the last one.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    content = read_json(path, what="pruning record")
    kept, original = content.get("kept_blocks"), content.get("original_blocks")
    whole = isinstance(kept, list) and all(type(k) is int for k in kept) and type(original) is int
    if not whole or len(kept) != blocks or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] != original - 1:
        raise UserError(
            f"{path}: kept blocks {shown(kept)} of {shown(original)}; expected {blocks} ascending numbers for the "
            f"{blocks} blocks of the denoiser beside it, the last one the last of all; prune again"
        )
    return tuple(kept)
