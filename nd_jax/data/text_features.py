"""Computed targets for text distillation, so that training need not run the teacher: valid tokens only.

A folder of three files: ``targets.bin``, [tokens, width] as raw numbers of one of ``DTYPES``; ``ids.bin``, int32
[tokens]; and ``info.json``: ``prompts``, ``tokens``, ``width``, ``text_length``, ``dtype``, ``counts`` (of tokens, a
prompt each) and a CRC-32 of both files.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from nd_jax.checked_files import read_json, regular_file, shown
from nd_jax.errors import UserError
from nd_jax.outputs import new_folder

TARGETS, IDS, INFO = "targets.bin", "ids.bin", "info.json"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
INFO_LIMIT = 1 << 28
"""Bytes of info.json."""
READ_LIMIT = 1 << 32
"""Bytes of targets up to which opening a folder compares their CRC-32."""
REMEDY = "make the folder again with nd-jax data features, or copy it again"

Part = tuple[Int[np.ndarray, "n s"], Int[np.ndarray, "n s"], Float[np.ndarray, "n s d"]]


def write_features(
    folder: str | Path,
    parts: Iterable[Part],
    *,
    dtype: str = "float32",
    info: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write prompts' ids, masks and targets, batch after batch, into ``folder``; it appears whole or not at all.

    A prompt's valid tokens come first. Raises UserError for an existing folder without ``overwrite``, for no prompts,
    and for targets that are not finite in ``dtype``.
    """
    if dtype not in DTYPES:
        raise UserError(f"text features: dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    with new_folder(folder, overwrite=overwrite) as part:
        counts, width, length = [], 0, 0
        with (part / TARGETS).open("wb") as targets_file, (part / IDS).open("wb") as ids_file:
            for ids, mask, targets in parts:
                valid, (_, length), width = mask > 0, mask.shape, targets.shape[-1]
                with np.errstate(over="ignore"):
                    kept = np.ascontiguousarray(targets[valid], DTYPES[dtype])
                if not np.isfinite(kept).all():
                    raise UserError(
                        f"text features: a target of prompts {len(counts)} and later is not finite in {dtype}"
                    )
                targets_file.write(kept.tobytes())
                ids_file.write(np.ascontiguousarray(ids[valid], np.int32).tobytes())
                counts += valid.sum(1).tolist()
        if not counts:
            raise UserError("text features: there are no prompts, expected at least one")
        content = {
            **(info or {}),
            "prompts": len(counts),
            "tokens": sum(counts),
            "width": width,
            "text_length": length,
            "dtype": dtype,
            "counts": counts,
            "crc32": {name: _checksum(part / name) for name in (TARGETS, IDS)},
        }
        (part / INFO).write_text(json.dumps(content))
    return Path(folder)


class FeatureSource:
    """Random access to a folder of ``write_features``.

    ``source[i]`` is ``{"t5_ids": int32 [S], "t5_mask": int32 [S], "target": float32 [S, width]}``, zero at padding.
    Raises UserError for a folder that does not hold what was written there.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        info = read_json(self.folder / INFO, INFO_LIMIT, "text features: description")
        self.width, self.text_length, counts = _check_info(self.folder / INFO, info)
        self.embedded = True  # always what the denoiser's blocks read
        tokens = info["tokens"]
        self._targets = _open(self.folder / TARGETS, np.dtype(DTYPES[info["dtype"]]), (tokens, self.width))
        self._ids = _open(self.folder / IDS, np.dtype(np.int32), (tokens,))
        for name in (TARGETS, IDS) if self._targets.nbytes <= READ_LIMIT else (IDS,):
            if _checksum(self.folder / name) != info["crc32"].get(name):
                raise UserError(f"text features: {self.folder / name} was changed since it was written; {REMEDY}")
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"text features: prompt {index} of {len(self)}")
        tokens = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        count = tokens.stop - tokens.start
        ids, mask = np.zeros((2, self.text_length), np.int32)
        target = np.zeros((self.text_length, self.width), np.float32)
        ids[:count], mask[:count], target[:count] = self._ids[tokens], 1, self._targets[tokens]
        if not np.isfinite(target).all():
            raise UserError(f"text features: prompt {index} of {self.folder} has a target that is not finite; {REMEDY}")
        return {"t5_ids": ids, "t5_mask": mask, "target": target}


def _check_info(path: Path, info: dict[str, Any]) -> tuple[int, int, np.ndarray]:
    numbers = [info.get(name) for name in ("prompts", "tokens", "width", "text_length")]
    sound = all(type(n) is int and 0 < n < 1 << 40 for n in numbers)
    sound = sound and info.get("dtype") in list(DTYPES) and isinstance(info.get("crc32"), dict)
    counts = info.get("counts")
    sound = sound and isinstance(counts, list) and all(type(n) is int and 0 <= n <= numbers[3] for n in counts)
    if not sound or len(counts) != numbers[0] or sum(counts) != numbers[1]:
        told = shown({name: info.get(name) for name in ("prompts", "tokens", "width", "text_length", "dtype")})
        raise UserError(f"text features: {path} says {told}, expected what nd-jax data features wrote; {REMEDY}")
    return numbers[2], numbers[3], np.asarray(counts, np.int64)


def _open(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    size, expected = regular_file(path, "text features: file"), math.prod(shape) * dtype.itemsize
    if size != expected:
        raise UserError(f"text features: {path} has {size} bytes, expected {expected}; {REMEDY}")
    return np.memmap(path, dtype, "r", shape=shape)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
