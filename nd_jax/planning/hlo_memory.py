"""Bytes that a compiled program moves to and from HBM: an estimate.

Every operation outside a fusion reads its operands and writes its result once, where they lie in HBM and not in vector
memory. A fusion (or one inside it) that only slices an operand reads the slice, one that updates a slice in place
writes the slice.
"""

from __future__ import annotations

from nd_jax.planning.hlo import Array, Computation, Module, Operation, visits

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "iota", "async-start", "async-update", "async-done", "copy-done"),
    *("slice-done", "all-gather-done", "all-reduce-done", "collective-permute-done", "domain", "add-dependency"),
}


def program_bytes(module: Module) -> float:
    """Of one execution on one device."""
    return sum(
        visit.times * _moved(module, visit.computation, operation)
        for visit in visits(module)
        if not visit.fused
        for operation in visit.computation.operations.values()
        if operation.kind not in FREE
    )


def _moved(module: Module, computation: Computation, operation: Operation) -> int:
    inner = _fused(module, operation)
    total = sum(_read(module, computation, inner, name, place) for place, name in enumerate(operation.operands))
    results = _results(operation)
    if operation.kind in ("dynamic-slice", "slice", "gather", "slice-start"):
        total = 0 if computation.operand(operation).arrays[0].on_chip else results[0].bytes
    if operation.kind == "dynamic-update-slice":
        return 2 * computation.operand(operation, 1).arrays[0].bytes
    if inner is None:
        return total + sum(array.bytes for array in results if not array.on_chip)
    root = inner.operations.get(inner.root)
    parts = [] if root is None else [root]
    if root is not None and root.kind == "tuple":
        parts = [inner.operations.get(name) for name in root.operands]
    if len(parts) != len(results):
        parts = [None] * len(results)
    return total + sum(
        _written(inner, part, array) for part, array in zip(parts, results, strict=True) if not array.on_chip
    )


def _fused(module: Module, operation: Operation) -> Computation | None:
    """What a fusion consists of; None for any other operation."""
    return module.computations.get((operation.called("calls") or [""])[0]) if operation.kind == "fusion" else None


def _written(inner: Computation, part: Operation | None, array: Array) -> int:
    """Of one result of a fusion, made by ``part``: all of it, or the slice that is updated."""
    if part is not None and part.kind == "bitcast":
        part = inner.operations.get(part.operands[0])
    if part is not None and part.kind == "dynamic-update-slice" and len(part.operands) > 1:
        return min(array.bytes, inner.operand(part, 1).arrays[0].bytes)
    return array.bytes


def _results(operation: Operation) -> list[Array]:
    """What an operation writes. The start of an asynchronous one tells its operand and a context as well."""
    if not operation.kind.endswith("-start"):
        return operation.arrays
    place = 0 if operation.kind in ("copy-start", "all-reduce-start") else 1
    return operation.arrays[place : place + 1]


def _read(module: Module, computation: Computation, inner: Computation | None, name: str, place: int) -> int:
    source = computation.operations.get(name)
    arrays = [] if source is None else [array for array in source.arrays if not array.on_chip]
    whole = sum(array.bytes for array in arrays)
    return whole if inner is None or not whole else _used(module, inner, place, whole)


def _used(module: Module, inner: Computation, place: int, whole: int) -> int:
    """Bytes of a fusion's parameter, ``whole`` bytes, that its operations read."""
    parameter = next(
        (o.name for o in inner.operations.values() if o.kind == "parameter" and o.inside.strip() == str(place)), None
    )
    users, total = [o for o in inner.operations.values() if parameter in o.operands], 0
    for user in users:
        called = _fused(module, user)
        if user.kind in ("dynamic-slice", "slice"):
            total += user.arrays[0].bytes
        elif called is not None:
            places = [n for n, name in enumerate(user.operands) if name == parameter]
            total += sum(_used(module, called, n, whole) for n in places)
        elif not (user.kind == "dynamic-update-slice" and user.operands[0] == parameter):
            return whole
    return min(whole, total) if users else whole
