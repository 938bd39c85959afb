"""Bytes that a compiled program sends to each chip over the interconnect, by kind of collective."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nd_jax.planning.hlo import Computation, Module, Operation, visits

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """All executions of one collective in one run of the program."""

    kind: str
    bytes: float
    """That every chip receives."""
    times: float
    members: tuple[int, ...]
    """Devices of the first group, as places in the mesh; of a permutation the first pair."""


def collectives(module: Module, devices: int) -> list[Collective]:
    """Every collective once: those in flight stand in the text several times under one channel."""
    found: dict[object, Collective] = {}
    for computation, times, _ in visits(module):
        scattered = computation.name.startswith("all-reduce-scatter")
        for operation in computation.operations.values():
            kind = operation.kind.removesuffix("-start")
            if kind not in KINDS:
                continue
            members = group(operation, devices)
            if len(members) == 1:
                continue
            sent = sum(a.bytes for name in operation.operands for a in _arrays(computation, name))
            kind = "reduce-scatter" if scattered and kind == "all-reduce" else kind
            each = Collective(kind, times * wire(kind, sent, len(members)), times, members)
            channel = operation.setting("channel_id")
            key = (computation.name, operation.name) if channel is None else channel
            if key not in found or found[key].bytes < each.bytes:
                found[key] = each
    return list(found.values())


def by_kind(found: Sequence[Collective]) -> dict[str, float]:
    """Bytes per kind, kinds that do not occur left out."""
    sums = {kind: sum(c.bytes for c in found if c.kind == kind) for kind in KINDS}
    return {kind: value for kind, value in sums.items() if value}


def wire(kind: str, given: float, ways: int) -> float:
    """Bytes received by each of ``ways`` chips when each gives ``given`` bytes, by the best algorithm on a ring."""
    return (
        given
        * {
            "all-gather": ways - 1,
            "reduce-scatter": (ways - 1) / ways,
            "all-to-all": (ways - 1) / ways,
            "all-reduce": 2 * (ways - 1) / ways,
            "collective-permute": 1,
        }[kind]
    )


def _arrays(computation: Computation, name: str) -> list:
    operation = computation.operations.get(name)
    return operation.arrays if operation else []


def group(operation: Operation, devices: int) -> tuple[int, ...]:
    """The first group of devices that work together."""
    text = operation.attributes
    if operation.kind.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text)
        return (int(pairs[1]), int(pairs[2])) if pairs else (0, 1)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(([^{}]*)\))?\s*\{([^}]*)\}", text)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        order = np.arange(math.prod(sizes.values()))
        turned = re.fullmatch(r"\[([\d,]+)\]T\(([\d,]+)\)", (named[2] or "").strip())
        if turned:
            dims, permutation = (tuple(map(int, part.split(","))) for part in turned.groups())
            order = order.reshape(dims).transpose(permutation)
        places = order.reshape(tuple(sizes.values()))
        chosen = re.findall(r"'([^']+)'", named[3])
        return tuple(places[tuple(slice(None) if name in chosen else 0 for name in sizes)].ravel().tolist())
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        dims = tuple(map(int, iota[3].split(",")))
        places = np.arange(math.prod(dims)).reshape(dims)
        if iota[4]:
            places = places.transpose(tuple(map(int, iota[4].split(","))))
        return tuple(places.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return tuple(map(int, listed[1].split(","))) if listed else tuple(range(devices))
