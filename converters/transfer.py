"""Arrays through a table: a checkpoint into a parameter tree, and a parameter tree into tensors to be written.

Import holds the tree and one tensor of the file at a time; with shardings, every process reads its own slices only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nd_jax.checked_files import shown
from nd_jax.converters.dtypes import STORED, TORCH_NAME, parameter_dtype
from nd_jax.converters.safetensors_io import StoredTensor
from nd_jax.converters.safetensors_write import Pending
from nd_jax.converters.tables import Buffer, Entry, Path, Table, flatten, unflatten
from nd_jax.errors import UserError

_BLOCK = 8 << 20  # bytes read at once of a tensor that is converted or transposed on the way
_STRIP = 16  # rows

Shardings = jax.sharding.Sharding | Mapping[str, Any]


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary, which JAX on a CPU takes over without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, value: np.ndarray) -> None:
    """``out[...] = value``, rounding to nearest even."""
    if out.ndim < 2 or (out.flags.c_contiguous and value.flags.c_contiguous):
        np.copyto(out, value, casting="unsafe")
        return
    # A transposition in strips as wide as a cache line is several times faster than in one go.
    for row in range(0, len(out), _STRIP):
        np.copyto(out[row : row + _STRIP], value[row : row + _STRIP], casting="unsafe")


def _put(out: np.ndarray, value: np.ndarray, name: str, where: str) -> None:
    """``_copy``; an overflow to infinity is an error."""
    with np.errstate(over="ignore"):
        _copy(out, value)
    narrowed = value.dtype != out.dtype and out.dtype == STORED["F16"]
    if narrowed and not np.isfinite(out).all() and np.isfinite(value[~np.isfinite(out)]).any():
        raise UserError(f"{where}: {shown(name)} holds numbers beyond 65504, the largest of fp16; use bf16 or fp32")


class _Source:
    """The checkpoint as the table sees it: tensors by their first names."""

    def __init__(self, table: Table, tensors: Mapping[str, StoredTensor], where: str):
        self.where = where
        self._tensors = dict(tensors)
        for second, first in table.extras.twins.items():
            if second in tensors:
                self._tensors.setdefault(first, tensors[second])

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def leaf_dtype(self, entries: list[Entry], dtype: np.dtype | None) -> np.dtype:
        """The dtype a leaf gets: the one asked for, or the one all of its tensors are stored in."""
        stored = {self[entry.name].dtype: entry.name for entry in entries}
        for kind, name in stored.items():
            if kind not in TORCH_NAME and not (dtype is not None and kind == STORED["F64"]):
                raise UserError(
                    f"{self.where}: key {shown(name)} is stored as {kind}; expected float32, bfloat16 or float16"
                    + ("; name a dtype to convert it" if kind == STORED["F64"] else "")
                )
        if dtype is None and len(stored) > 1:
            (one, name), (other, second) = list(stored.items())[:2]
            raise UserError(
                f"{self.where}: {shown(name)} is {one} and {shown(second)} is {other}, but they are layers of one "
                "parameter; name a dtype to convert them"
            )
        return dtype or next(iter(stored))

    def read(self, entries: list[Entry], shape: tuple[int, ...], dtype: np.dtype, index: tuple | None) -> np.ndarray:
        """The part ``index`` (JAX order, slices) of the leaf that ``entries`` make up."""
        index = index or (slice(None),) * len(shape)
        sizes = [len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)]
        out = aligned_empty(sizes, dtype)
        if entries and entries[0].layer is not None:
            places, inner = zip(entries[index[0]], out, strict=True), index[1:]
        else:
            places, inner = [(entries[0], out)] if entries else [], index
        for entry, place in places:
            self._fill(entry.layout.to_torch(place), entry, entry.layout.torch_order(inner))
        return out

    def _fill(self, place: np.ndarray, entry: Entry, index: tuple) -> None:
        """Bring the part ``index`` (torch order) of one tensor into ``place``, a view in torch order."""
        tensor = self[entry.name]
        if tensor.dtype == place.dtype and place.flags.c_contiguous:
            tensor.read(index, out=place)
        elif place.ndim == 0:
            _put(place, tensor.read(), entry.name, self.where)
        elif place.size:
            start = index[0].indices(tensor.shape[0])[0]
            rows = max(1, _BLOCK * len(place) // (place.size * tensor.dtype.itemsize))
            for row in range(0, len(place), rows):
                block = place[row : row + rows]
                part = slice(start + row, start + row + len(block))
                _put(block, tensor.read((part, *index[1:])), entry.name, self.where)


def _check_buffer(name: str, buffer: Buffer, tensor: StoredTensor, where: str, *, sample: int | None) -> None:
    """Compare a stored buffer with what the config says; of ``sample`` blocks only, if given."""
    position, columns = 0, buffer.shape[-1]
    tolerance = max(buffer.tolerance, float(np.finfo(np.float32).eps))
    if tensor.dtype in TORCH_NAME and tensor.dtype != STORED["F32"]:
        tolerance = 2.0**-8 if TORCH_NAME[tensor.dtype] == "bfloat16" else 2.0**-11
    total = buffer.shape[1]
    for number, block in enumerate(buffer.blocks()):
        rows = len(block)
        if sample is None or number % max(1, total // rows // sample) == 0:
            index = (slice(None), slice(position, position + rows), slice(0, columns))
            found = tensor.read(index)[0].astype(np.float32)
            difference = np.abs(found - block).max(initial=0.0)
            if not difference <= tolerance:
                raise UserError(
                    f"{where}: key {shown(name)} differs from {buffer.what} by {difference:.3g} in rows {position} to "
                    f"{position + rows - 1}; check that config.json belongs to these weights"
                )
        position += rows


def _check_twin(first: StoredTensor, second: StoredTensor, where: str) -> None:
    """A tensor that is saved twice has to be the same twice; compared in blocks of rows."""
    rows = max(1, (4 << 20) // max(1, first.nbytes // max(1, first.shape[0])))
    for start in range(0, first.shape[0], rows):
        part = (slice(start, start + rows),)
        if first.dtype != second.dtype or first.read(part).tobytes() != second.read(part).tobytes():
            raise UserError(
                f"{where}: keys {shown(first.name)} and {shown(second.name)} are one tensor in the network, but "
                "differ in this checkpoint; remove the one that is not meant"
            )


def _sharding_of(sharding: Shardings, path: Path) -> jax.sharding.Sharding:
    node: Any = sharding
    for key in path:
        if isinstance(node, jax.sharding.Sharding):
            return node
        node = node[key]
    return node


def load_params(
    table: Table,
    tensors: Mapping[str, StoredTensor],
    where: str,
    *,
    dtype: object | None = None,
    sharding: Shardings | None = None,
    parts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The parameter tree of a checkpoint.

    Args:
        table: names, shapes and layouts.
        tensors: an open checkpoint.
        where: how messages call it.
        dtype: "fp32", "bf16" or "fp16"; ``None`` keeps what is stored.
        sharding: one ``Sharding`` for every leaf, or a nested dict of them; each process then reads only the slices
            that its devices hold. ``None`` puts everything on the default device.
        parts: only these top-level keys of the tree.

    Returns:
        Nested dict of ``jax.Array``.

    Raises:
        UserError: for keys that are missing, surplus, misshapen or of the wrong dtype, for a buffer that does not
            belong to the config, and for numbers that fp16 cannot hold.
    """
    dtype = parameter_dtype(dtype)
    table.check({name: tensor.shape for name, tensor in tensors.items()}, where, parts=parts)
    source = _Source(table, tensors, where)
    for name, buffer in table.extras.buffers.items():
        if name in tensors:
            _check_buffer(name, buffer, tensors[name], where, sample=None if sharding is None else 16)
    for second, first in table.extras.twins.items():
        if sharding is None and second in tensors and first in tensors:
            _check_twin(tensors[first], tensors[second], where)

    leaves = []
    for path in table.wanted(parts):
        entries, shape = table.leaves[path], table.abstract[path].shape
        leaf_dtype = source.leaf_dtype(entries, dtype) if entries else dtype or STORED["F32"]
        if sharding is None:
            leaf = jax.device_put(source.read(entries, shape, leaf_dtype, None))
        else:
            parts_read: dict[tuple, np.ndarray] = {}

            def piece(index, entries=entries, shape=shape, leaf_dtype=leaf_dtype, parts_read=parts_read):
                key = tuple((part.start, part.stop) for part in index)
                if key not in parts_read:
                    parts_read[key] = source.read(entries, shape, leaf_dtype, index)
                return parts_read[key]

            leaf = jax.make_array_from_callback(shape, _sharding_of(sharding, path), piece, dtype=leaf_dtype)
        leaves.append((path, leaf))
    return unflatten(leaves)


def _host(leaf: Any, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of a stack, as NumPy array: a view where possible, else a copy that JAX does not keep."""
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            raise UserError("parameters live on several hosts; export on one host, from a saved checkpoint")
        (device, *others) = leaf.devices()
        if others or device.platform != "cpu":
            return np.asarray(leaf.copy() if layer is None else leaf[layer])
    return np.asarray(leaf) if layer is None else np.asarray(leaf)[layer]


def pending_tensors(table: Table, params: Mapping[str, Any], *, dtype: object | None = None) -> Iterator[Pending]:
    """The tensors of a checkpoint, leaf by leaf, made only when they are written.

    Args:
        table: names, shapes and layouts.
        params: nested dict of arrays with exactly the table's paths.
        dtype: "fp32", "bf16" or "fp16"; ``None`` keeps each leaf's own.

    Raises:
        UserError: for missing, surplus or misshapen leaves, and for numbers that fp16 cannot hold.
    """
    dtype = parameter_dtype(dtype)
    found = dict(flatten(params))
    for path, leaf in table.abstract.items():
        if path not in found:
            raise UserError(f"parameter {'/'.join(path)} is missing; expected shape {list(leaf.shape)}")
        if tuple(found[path].shape) != tuple(leaf.shape):
            raise UserError(
                f"parameter {'/'.join(path)} has shape {list(found[path].shape)}; "
                f"its config asks for {list(leaf.shape)}"
            )
    if surplus := sorted(found.keys() - table.abstract.keys()):
        raise UserError(f"parameter {'/'.join(surplus[0])} is not one of its config's {len(table.abstract)} parameters")

    def content(leaf: Any, entry: Entry, kind: np.dtype) -> Iterator[np.ndarray]:
        value = entry.layout.to_torch(_host(leaf, entry.layer))
        if (value.dtype == kind and value.flags.c_contiguous) or value.ndim == 0:
            yield value
            return
        rows = max(1, _BLOCK * len(value) // max(1, value.size * value.dtype.itemsize))
        for row in range(0, len(value), rows):
            part = value[row : row + rows]
            block = np.empty(part.shape, kind)
            _put(block, part, entry.name, "export")
            yield block

    kinds = set()
    for path, entries in table.leaves.items():
        leaf = found[path]
        kind = dtype or parameter_dtype(np.dtype(leaf.dtype))
        kinds.add(kind)
        for entry in entries:
            yield Pending(
                entry.name, entry.shape, kind, lambda leaf=leaf, entry=entry, kind=kind: content(leaf, entry, kind)
            )
    # As torch's Module.to does, a buffer has the dtype of the parameters; float32 if they are of several.
    kind = kinds.pop() if len(kinds) == 1 else STORED["F32"]
    for name, buffer in table.extras.buffers.items():
        yield Pending(name, buffer.shape, kind, buffer.blocks)
