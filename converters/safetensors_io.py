"""Read safetensors files: whole tensors or slices of them, by ``pread``, so that nothing else enters memory.

Nothing is mapped into memory, so resident memory is what the caller keeps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nd_jax.checked_files import regular_file, shown
from nd_jax.converters.pickles import PICKLES, refuse_pickle
from nd_jax.converters.safetensors_header import TensorInfo, read_header
from nd_jax.errors import UserError

Index = tuple[slice, ...]

_PAGE = 4096  # bytes; shorter runs are read together with their gaps, since the disk reads whole pages anyway
_BUFFER = 4 << 20  # bytes; the most that is read at once for such runs


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open file. ``shape``, ``dtype`` and ``nbytes`` as NumPy; ``read`` brings it in."""

    file: TensorFile
    name: str
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> np.dtype:
        return self.info.dtype

    @property
    def nbytes(self) -> int:
        return self.info.nbytes

    def read(self, index: Index | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor, or the part of it that ``index`` selects: one slice of step 1 per leading axis.

        ``out``, contiguous and of the part's shape and the tensor's dtype, is filled instead of a new array.

        Raises:
            UserError: if the file has changed since it was opened, or a BOOL byte is neither 0 nor 1.
        """
        index = tuple(index or ()) + (slice(None),) * (len(self.shape) - len(index or ()))
        bounds = [part.indices(size) for part, size in zip(index, self.shape, strict=True)]
        if any(step != 1 for _, _, step in bounds):
            raise ValueError("only slices of step 1 can be read")
        bounds = [(start, max(start, stop)) for start, stop, _ in bounds]
        shape = tuple(stop - start for start, stop in bounds)
        out = np.empty(shape, self.dtype) if out is None else out
        if out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}; expected contiguous {self.dtype} {shape}")
        if out.size:
            self.file.fill(out.reshape(-1).view(np.uint8), self.info.offset, self.shape, bounds, self.dtype.itemsize)
        if self.dtype == bool and (out.view(np.uint8) > 1).any():
            raise UserError(f"{self.file.path}: tensor {shown(self.name)} is BOOL but has bytes other than 0 and 1")
        return out


class TensorFile(Mapping[str, StoredTensor]):
    """An open safetensors file: a mapping from name to ``StoredTensor``. Close it, or use it as a context manager.

    Args:
        path: the file. A symbolic link is followed only if ``follow``.

    Raises:
        UserError: if the file is missing, a pickle, truncated, or damaged in any way the format can be.
    """

    def __init__(self, path: str | os.PathLike, *, follow: bool = False):
        self.path = Path(path)
        if self.path.suffix.lower() in PICKLES:
            refuse_pickle(self.path)
        regular_file(self.path, "safetensors file", follow=follow)
        nofollow = 0 if follow else getattr(os, "O_NOFOLLOW", 0)
        self._descriptor: int | None = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | nofollow)
        self.bytes_read = 0
        try:
            self._infos, self.metadata = read_header(self._descriptor, self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> StoredTensor:
        return StoredTensor(self, name, self._infos[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def _pread(self, out: np.ndarray, offset: int) -> None:
        """Fill the byte array ``out`` from ``offset``."""
        view, done = memoryview(out), 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise UserError(f"{self.path} became shorter while it was read; download it again")
            done += count
        self.bytes_read += done

    def fill(self, out: np.ndarray, offset: int, shape: tuple[int, ...], bounds: list, itemsize: int) -> None:
        """Read the part of a tensor at ``offset`` inside ``bounds`` into the flat byte array ``out``."""
        run = itemsize  # bytes that are contiguous both in the file and in the part
        for size, (start, stop) in zip(reversed(shape), reversed(bounds), strict=True):
            run *= stop - start
            if stop - start < size:
                break
        if run == len(out):
            for size, (start, _) in zip(reversed(shape), reversed(bounds), strict=True):
                offset += start * itemsize
                itemsize *= size
            return self._pread(out, offset)
        row = itemsize * int(np.prod(shape[1:], dtype=np.int64))
        start, stop = bounds[0]
        if run < _PAGE and row <= _BUFFER:
            inner = tuple(slice(*bound) for bound in bounds[1:])
            wanted = out.reshape(*(end - begin for begin, end in bounds), itemsize)
            step = max(1, _BUFFER // row)
            for first in range(start, stop, step):
                rows = min(step, stop - first)
                block = np.empty((rows, *shape[1:], itemsize), np.uint8)
                self._pread(block.reshape(-1), offset + first * row)
                wanted[first - start : first - start + rows] = block[:, *inner]
            return None
        for number, piece in enumerate(out.reshape(stop - start, -1)):
            self.fill(piece, offset + (start + number) * row, shape[1:], bounds[1:], itemsize)
        return None


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every tensor of one safetensors file, in memory. bfloat16 comes as ``ml_dtypes.bfloat16``.

    Raises:
        UserError: as ``TensorFile``.
    """
    with TensorFile(path, follow=True) as file:
        return {name: tensor.read() for name, tensor in file.items()}
