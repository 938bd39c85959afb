"""How fast a compiled program can be on a slice, at best and without any overlap. Bounds, not predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nd_jax.planning.chips import Topology
from nd_jax.planning.hlo_wire import Collective


@dataclass(frozen=True)
class Bounds:
    """Seconds that one execution takes each part of a chip at its peak."""

    compute: float
    memory: float
    wire: float

    @property
    def overlapped(self) -> float:
        """All three at once: nothing can be faster."""
        return max(self.compute, self.memory, self.wire)

    @property
    def serial(self) -> float:
        """One after the other."""
        return self.compute + self.memory + self.wire

    @property
    def limit(self) -> str:
        """The part that is busiest."""
        return max(("compute", "memory", "wire"), key=lambda name: getattr(self, name))

    def derated(self, efficiency: float) -> Bounds:
        """With matrix units that reach this share of their peak."""
        return Bounds(self.compute / efficiency, self.memory, self.wire)

    def __add__(self, other: Bounds) -> Bounds:
        return Bounds(self.compute + other.compute, self.memory + other.memory, self.wire + other.wire)

    def times(self, count: float) -> Bounds:
        """Of ``count`` executions."""
        return Bounds(self.compute * count, self.memory * count, self.wire * count)


def extents(members: Sequence[int], coordinates: np.ndarray) -> tuple[int, ...]:
    """How many chips a group spans along each axis; ``coordinates`` [devices, axes] by place in the mesh."""
    chosen = coordinates[list(members)]
    return tuple(len(set(column.tolist())) for column in chosen.T)


def bounds(
    topology: Topology, flops: float, hbm_bytes: float, found: Sequence[Collective], coordinates: np.ndarray
) -> Bounds:
    """Of one execution, from what each chip computes and moves.

    Every collective has the links of the box of chips that its group spans, wrapped around where that box is a whole
    ring. Permutations are steps of a ring in both directions at once: two links.
    """
    wire = 0.0
    for each in found:
        if each.kind == "collective-permute":
            rate = min(2 * topology.chip.link_bandwidth, topology.bandwidth() or math.inf)
        else:
            rate = topology.bandwidth(extents(each.members, coordinates))
        wire += each.bytes / rate if rate else 0.0
    return Bounds(flops / topology.chip.flops, hbm_bytes / topology.chip.hbm_bandwidth, wire)
