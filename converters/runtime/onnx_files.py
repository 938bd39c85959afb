"""Where an ONNX file says that its weights lie, read without any ONNX library, before onnxruntime opens it.

Only what the protocol-buffer wire format needs: a model's graph, its tensors and their ``external_data``. Graphs of a
bundle have no subgraphs, functions or sparse tensors, so whatever could hide a tensor elsewhere is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .errors import BundleError
from .files import NAME, shown

LIMIT = 256 << 20
"""Bytes of an ONNX file without its weights."""
MODEL_GRAPH, MODEL_FUNCTIONS, MODEL_TRAINING = 7, 25, 20
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_SPARSE = 1, 5, 15
NODE_ATTRIBUTE, NODE_DOMAIN = 5, 7
ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH, ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS = 5, 6, 10, 11
ATTRIBUTE_SPARSE = (22, 23)
TENSOR_EXTERNAL, ENTRY_KEY, ENTRY_VALUE = 13, 1, 2


def external_files(path: Path) -> set[str]:
    """Names of the external-data files of a model. Raises BundleError for names that leave its folder, files that are
    not ONNX, and models with parts that no graph of a bundle has."""
    data = path.read_bytes() if path.stat().st_size <= LIMIT else None
    if data is None:
        raise BundleError(f"{path} has {path.stat().st_size} bytes; expected at most {LIMIT} without its weights")
    found: set[str] = set()
    try:
        graphs = 0
        for field, part in _fields(memoryview(data)):
            if field in (MODEL_FUNCTIONS, MODEL_TRAINING):
                raise BundleError(f"{path} has functions or training data; expected one plain graph")
            if field == MODEL_GRAPH:
                graphs += 1
                found |= set(_graph(path, part))
        if graphs != 1:
            raise BundleError(f"{path} has {graphs} graphs; expected one")
    except (IndexError, ValueError) as error:
        raise BundleError(f"{path} is not an ONNX file ({error}); copy the bundle again") from None
    for name in found:
        if not NAME.fullmatch(name):
            raise BundleError(f"{path} keeps weights in {shown(name)}; expected a plain name beside it")
    return found


def _graph(path: Path, graph: memoryview) -> Iterator[str]:
    for field, part in _fields(graph):
        if field == GRAPH_SPARSE:
            raise BundleError(f"{path} has sparse weights; expected dense ones")
        if field == GRAPH_INITIALIZER:
            yield from _tensor(part)
        if field == GRAPH_NODE:
            for inner, attribute in _fields(part):
                if inner == NODE_DOMAIN and bytes(attribute) not in (b"", b"ai.onnx"):
                    raise BundleError(f"{path} has an operator of {shown(bytes(attribute))}; expected standard ones")
                if inner == NODE_ATTRIBUTE:
                    yield from _attribute(path, attribute)


def _attribute(path: Path, attribute: memoryview) -> Iterator[str]:
    for field, part in _fields(attribute):
        if field in (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS, *ATTRIBUTE_SPARSE):
            raise BundleError(f"{path} has a graph inside a graph; expected none")
        if field in (ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS):
            yield from _tensor(part)


def _tensor(tensor: memoryview) -> Iterator[str]:
    for field, part in _fields(tensor):
        if field == TENSOR_EXTERNAL:
            entry = {inner: bytes(value) for inner, value in _fields(part)}
            if entry.get(ENTRY_KEY) == b"location":
                yield entry.get(ENTRY_VALUE, b"").decode("utf-8")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number has no end")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, content) of every field with a length; numbers are skipped."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = _varint(data, at)
            if length > len(data) - at:
                raise ValueError("it is cut off")
            yield field, data[at : at + length]
            at += length
        else:
            raise ValueError(f"a field of kind {kind}")
    if at > len(data):
        raise ValueError("it is cut off")
