"""Write safetensors files, one tensor in memory at a time, in one file or in shards with an index."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nd_jax.converters.dtypes import STORED_NAME
from nd_jax.converters.safetensors_header import HEADER_LIMIT
from nd_jax.errors import UserError

SHARD_SIZE = 10_000_000_000  # bytes, diffusers' default


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: ``pieces()`` makes its content when its turn comes, in C order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def pending(name: str, array: np.ndarray) -> Pending:
    """A tensor that is in memory already."""
    return Pending(name, array.shape, array.dtype, lambda: [array])


def _header(tensors: Sequence[Pending], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        stored = STORED_NAME.get(np.dtype(tensor.dtype))
        if stored is None:
            raise UserError(
                f"{tensor.name} has dtype {tensor.dtype}; expected one of {', '.join(STORED_NAME.values())}"
            )
        entries[tensor.name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise UserError(
            f"{len(tensors)} tensors need a header of {len(text)} bytes; at most {HEADER_LIMIT} are allowed"
        )
    return len(text).to_bytes(8, "little") + text


def _write_file(path: Path, tensors: Sequence[Pending], metadata: dict[str, str]) -> None:
    with open(path, "xb") as file:
        file.write(_header(tensors, metadata))
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                data = np.ascontiguousarray(piece, dtype=tensor.dtype).reshape(-1).view(np.uint8)
                file.write(data)
                written += data.nbytes
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes made, {tensor.nbytes} announced")
        file.flush()
        os.fsync(file.fileno())


def _shards(tensors: Iterable[Pending], shard_size: int) -> Iterator[list[Pending]]:
    shard: list[Pending] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > shard_size:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def write_checkpoint(
    folder: Path,
    stem: str,
    tensors: Iterable[Pending],
    *,
    shard_size: int = SHARD_SIZE,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write ``stem.safetensors``, or ``stem-00001-of-0000N.safetensors`` with ``stem.safetensors.index.json``.

    ``folder`` is expected to be a temporary one (``new_folder``): nothing is renamed here.

    Args:
        folder: an existing folder without these files.
        stem: file name without ending.
        tensors: written in this order, wider dtypes first, which keeps every tensor aligned.
        shard_size: bytes of data after which a new file begins; a larger tensor gets a file of its own.
        metadata: strings for the header; the default is what PyTorch's readers look for.

    Raises:
        UserError: for a dtype that safetensors does not have.
    """
    metadata = {"format": "pt"} if metadata is None else metadata
    ordered = sorted(tensors, key=lambda tensor: -np.dtype(tensor.dtype).itemsize)
    shards = list(_shards(ordered, shard_size))
    if len(shards) == 1:
        return _write_file(folder / f"{stem}.safetensors", shards[0], metadata)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, metadata)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in ordered)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return None
