"""Reading the text of a compiled program (XLA's HLO): computations, operations, shapes, and how often loops run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
NAME = re.compile(r"%([\w.\-]+)")
SIZES = {"pred": 1, "token": 0, "opaque": 0}
CALLS = re.compile(
    r"(calls|body|condition|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|[^,\s]+)"
)


class Array(NamedTuple):
    """One array of an operation's type."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool
    """In vector memory (memory space 1) rather than HBM."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Without padding of its tiles."""
        return self.elements * item_size(self.dtype)


def item_size(dtype: str) -> int:
    """Bytes of one element; below one byte counts as one."""
    if dtype in SIZES:
        return SIZES[dtype]
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 0


@dataclass
class Operation:
    """One line: what it makes, from what, and how."""

    name: str
    kind: str
    result: str
    operands: list[str]
    attributes: str
    inside: str
    """What stands between the parentheses; a parameter's number, a constant's value."""

    @property
    def arrays(self) -> list[Array]:
        """The arrays of its result, a tuple's one by one."""
        return arrays_of(self.result)

    def called(self, *names: str) -> list[str]:
        """Computations that it names under the given attributes."""
        found = []
        for attribute, value in CALLS.findall(self.attributes):
            if attribute in names:
                found += [each.strip().lstrip("%") for each in value.strip("{}").split(",") if each.strip()]
        return found if "branch_computations" in names else found[: len(names)]

    def setting(self, name: str) -> str | None:
        """The value of an attribute such as ``dim_labels``, braces taken off."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1].strip("{}") if found else None


@dataclass
class Computation:
    """Operations by name, in the order of the text."""

    name: str
    operations: dict[str, Operation] = field(default_factory=dict)
    root: str = ""

    def operand(self, operation: Operation, index: int = 0) -> Operation:
        return self.operations[operation.operands[index]]


@dataclass
class Module:
    """A program: its computations, and which one is the entry."""

    computations: dict[str, Computation]
    entry: str


def arrays_of(text: str) -> list[Array]:
    """Every array in the text of a type."""
    return [
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n), "S(1)" in (layout or ""))
        for dtype, sizes, layout in SHAPE.findall(text)
        if dtype not in ("token",)
    ]


def parse(text: str) -> Module:
    """The module of ``compiled.as_text()``.

    A line belongs to the last header above it: configurations of custom calls span lines and may hold braces of their
    own, so that closing braces say nothing. What follows on further lines belongs to the call's attributes.
    """
    computations: dict[str, Computation] = {}
    current, entry, last = Computation(""), "", None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header and not line.startswith("HloModule"):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
            last = None
            continue
        start = OPERATION.match(line)
        if start is None or not current.name:
            if last is not None and last.kind == "custom-call":
                last.attributes += line
            continue
        last = operation = _operation(start[2], line[start.end() :])
        if operation is not None:
            current.operations[operation.name] = operation
            if start[1]:
                current.root = operation.name
    return Module(computations, entry)


def _operation(name: str, rest: str) -> Operation | None:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if opening < 1:
        return None
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Operation(name, rest[:opening], result, NAME.findall(inside), rest[closing + 1 :], inside)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if not depth:
                return index
    return len(text)


class Visit(NamedTuple):
    """A computation, how often it runs in one execution of the program, and whether it is part of a fusion."""

    computation: Computation
    times: float
    fused: bool


def visits(module: Module, unknown: list[str] | None = None) -> Iterator[Visit]:
    """Every computation that runs, with loops multiplied by their trip counts; of branches the one that makes the most
    bytes. Names of loops that tell no count (taken as 1) go to ``unknown``.
    """

    def go(name: str, times: float, fused: bool) -> Iterator[Visit]:
        computation = module.computations.get(name)
        if computation is None:
            return
        yield Visit(computation, times, fused)
        for operation in computation.operations.values():
            if operation.kind == "while":
                count = trip_count(module, computation, operation)
                if count is None:
                    count = 1
                    if unknown is not None:
                        unknown.append(operation.name)
                yield from go(operation.called("body")[0], times * count, fused)
            elif operation.kind in ("fusion", "call", "async-start"):
                names = operation.called("calls") or operation.called("to_apply")
                for each in names:
                    yield from go(each, times, fused or operation.kind == "fusion")
            elif operation.kind == "conditional":
                branches = operation.called("branch_computations") or [
                    *operation.called("true_computation"),
                    *operation.called("false_computation"),
                ]
                yield from go(max(branches, key=made), times, fused)

    def made(name: str) -> float:
        inside = visits(Module(module.computations, name))
        return sum(
            v.times * array.bytes for v in inside for o in v.computation.operations.values() for array in o.arrays
        )

    yield from go(module.entry, 1.0, False)


def trip_count(module: Module, caller: Computation, loop: Operation) -> int | None:
    """How often a loop's body runs: what XLA notes, or ``(limit - start) / step`` of the counter that its condition
    compares; None where neither can be read."""
    noted = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.computations.get(loop.called("condition")[0])
    body = module.computations.get(loop.called("body")[0])
    found = _comparison(module, condition) if condition else None
    if found is None or body is None:
        return None
    index, limit, direction = found
    start = _constant(module, caller, _element(caller, caller.operand(loop), index)) or 0
    step = _step(module, body, index) or 1
    span = {
        "LT": limit - start,
        "LE": limit - start + 1,
        "GT": start - limit,
        "GE": start - limit + 1,
        "NE": limit - start,
    }
    return max(0, math.ceil(span.get(direction, 0) / abs(step)))


def _comparison(module: Module, condition: Computation) -> tuple[int, int, str] | None:
    """Index of the counter in the loop's tuple, the limit, and the direction in which they are compared."""
    root = condition.operations[condition.root]
    compare, place = root, list(root.operands)
    if root.kind == "fusion":
        inner = module.computations[root.called("calls")[0]]
        compare = inner.operations[inner.root]
        sources = []
        for name in compare.operands:
            source = inner.operations[name]
            sources.append(root.operands[int(source.inside)] if source.kind == "parameter" else None)
            if source.kind == "constant":
                condition.operations[source.name] = source
                sources[-1] = source.name
        place = [each for each in sources if each is not None]
    if compare.kind != "compare" or len(place) != 2:
        return None
    left, right = (condition.operations[name] for name in place)
    direction = compare.setting("direction") or ""
    if left.kind == "constant":
        left, right = right, left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    limit = _constant(module, condition, right)
    index = left.setting("index")
    if left.kind != "get-tuple-element" or limit is None or index is None:
        return None
    return int(index), limit, direction


def _element(computation: Computation, operation: Operation | None, index: int) -> Operation | None:
    """What stands at ``index`` of a tuple, looking through copies."""
    while operation is not None and operation.kind in ("copy", "bitcast", "opt-barrier"):
        operation = computation.operations.get(operation.operands[0])
    if operation is None or operation.kind != "tuple":
        return None
    return computation.operations.get(operation.operands[index])


def _constant(module: Module, computation: Computation, operation: Operation | None) -> int | None:
    while operation is not None and operation.kind in ("copy", "bitcast", "convert"):
        operation = computation.operations.get(operation.operands[0])
    if operation is None or operation.kind != "constant" or not re.fullmatch(r"-?\d+", operation.inside.strip()):
        return None
    return int(operation.inside)


def _step(module: Module, body: Computation, index: int) -> int | None:
    """By how much the counter grows: the constant of the addition that makes the tuple's new element."""
    new = _element(body, body.operations.get(body.root), index)
    if new is None:
        return None
    scope = body
    if new.kind == "fusion":
        scope = module.computations[new.called("calls")[0]]
        new = scope.operations[scope.root]
    if new.kind != "add":
        return None
    for name in new.operands:
        value = _constant(module, scope, scope.operations[name])
        if value is not None:
            return value
    return None
