"""The header of a safetensors file, checked before a byte of data is read.

A file is an 8-byte little-endian length N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}`` with an optional
``__metadata__`` of strings, then the data. Offsets count from the end of the header; the tensors have to tile the data
without a hole or an overlap (safetensors' FORMAT specification).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nd_jax.checked_files import parse_json, shown
from nd_jax.converters.dtypes import STORED
from nd_jax.errors import UserError

HEADER_LIMIT = 100_000_000
_LARGEST = 1 << 48  # elements; far above any checkpoint, and small enough for every product below to stay cheap
_RANK = 16


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``offset`` counts bytes from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _tensor(name: str, entry: object, where: str) -> tuple[TensorInfo, int]:
    """One entry as (info with offset relative to the data, end relative to the data)."""
    what = f"{where}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{what} is described by {shown(entry)}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED:
        raise UserError(f"{what} has dtype {shown(dtype)}; expected one of {', '.join(STORED)}")
    if not isinstance(shape, list) or len(shape) > _RANK or not all(map(_natural, shape)):
        raise UserError(f"{what} has shape {shown(shape)}; expected at most {_RANK} integers, none negative")
    if math.prod(size for size in shape if size) > _LARGEST:
        raise UserError(f"{what} has shape {shown(shape)}, which is beyond any memory")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)) or offsets[0] > offsets[1]:
        raise UserError(f"{what} has data_offsets {shown(offsets)}; expected [begin, end] with 0 <= begin <= end")
    begin, end = offsets
    info = TensorInfo(STORED[dtype], tuple(shape), begin)
    if info.nbytes != end - begin:
        raise UserError(f"{what} spans {end - begin} bytes; expected {info.nbytes} for {dtype} of shape {shape}")
    return info, end


def read_header(descriptor: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name, and the metadata, of an open safetensors file.

    Raises:
        UserError: naming the file, the tensor, what was found and what was expected.
    """
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, 8, 0)
    if start == b"version ":
        raise UserError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if len(start) < 8:
        raise UserError(f"{path} is truncated: {size} bytes, shorter than a safetensors header; download it again")
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT:
        raise UserError(
            f"{path} announces a header of {length} bytes; expected at most {HEADER_LIMIT}: not a safetensors file"
        )
    data_start = 8 + length
    if data_start > size:
        raise UserError(
            f"{path} is truncated: {size} bytes, but its header alone needs {data_start}; download it again"
        )
    header = bytearray()
    while len(header) < length:
        piece = os.pread(descriptor, length - len(header), 8 + len(header))
        if not piece:
            raise UserError(f"{path} became shorter while it was read")
        header += piece
    if not header.startswith(b"{"):
        raise UserError(f"{path}: the safetensors header does not start with '{{'; the file is damaged")
    entries = parse_json(bytes(header), f"{path}: the safetensors header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: __metadata__ is {shown(metadata)}; expected strings only")

    infos, spans = {}, []
    for name, entry in entries.items():
        info, end = _tensor(name, entry, str(path))
        infos[name] = TensorInfo(info.dtype, info.shape, data_start + info.offset)
        spans.append((info.offset, end, name))
    position, before = 0, "the header"
    for begin, end, name in sorted(spans):
        if data_start + end > size:
            raise UserError(
                f"{path}: tensor {shown(name)} ends at byte {data_start + end}, but the file has {size}; "
                "it is truncated or damaged: download it again"
            )
        if begin != position:
            kind = "overlaps" if begin < position else f"leaves a hole of {begin - position} bytes after"
            raise UserError(f"{path}: tensor {shown(name)} {kind} {before}; expected it to begin at {position}")
        position, before = end, shown(name)
    if data_start + position != size:
        raise UserError(f"{path} has {size - data_start - position} bytes after its last tensor; the file is damaged")
    return infos, metadata
