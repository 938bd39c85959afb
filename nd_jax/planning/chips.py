"""TPU generations and slices: the one table of peaks, and which slices are wired into rings.

Sources: Google Cloud documentation, "TPU v5e", "TPU v5p" and "TPU v6e" (system architecture pages: bf16 peak, HBM
bandwidth, interconnect per chip) and "TPU architecture" (wrap-around links). ``hbm_gib`` is what the compiler of
libtpu 0.0.42 lets a program use.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nd_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One generation. Peaks are per chip."""

    name: str
    flops: float
    """bf16 operations per second."""
    hbm_gib: float
    hbm_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second of one link in one direction; a chip has two links along each axis of the torus."""
    axes: int
    """Axes of the torus."""
    wraps_at: int
    """2-D: an axis of this length is a ring. 3-D: a slice whose every axis is a multiple of this is a torus."""
    most: int
    """Chips of the largest slice."""
    per_host: int = 4


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75, 819e9, 50e9, 2, 16, 256),
        Chip("v5p", 459e12, 95.74, 2765e9, 100e9, 3, 4, 8960),
        Chip("v6e", 918e12, 31.25, 1600e9, 100e9, 2, 16, 256),
    )
}

EXAMPLES = {
    "v5e": ("v5e:2x2", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    "v5p": ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8", "v5p:8x8x8"),
    "v6e": ("v6e:2x2", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16"),
}
"""Slices one can rent, for messages; 3-D slices of larger multiples of four exist too."""


@dataclass(frozen=True)
class Topology:
    """A slice: so many chips along each axis of the torus."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As the command line spells it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        return max(1, self.chips // self.chip.per_host)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Per axis, whether its ends are linked."""
        if self.chip.axes == 3:
            return (all(size % self.chip.wraps_at == 0 for size in self.shape),) * 3
        return tuple(size == self.chip.wraps_at for size in self.shape)

    def bandwidth(self, extents: tuple[int, ...] | None = None) -> float:
        """Bytes per second that a chip can receive in a collective over a box of ``extents`` chips (default: all).

        Along a ring both links bring new data; along a line the busiest link carries everything one way, so that an
        end chip receives over one. Axes of length 1 have nobody to talk to.
        """
        extents = self.shape if extents is None else extents
        links = 0
        for extent, size, ring in zip(extents, self.shape, self.rings, strict=True):
            links += 0 if extent == 1 else 2 if ring and extent == size else 1
        return links * self.chip.link_bandwidth


def parse_topology(name: str) -> Topology:
    """``v5p:4x4x8`` as a topology. Raises ``UserError`` listing those there are."""
    found = re.fullmatch(r"(v\w+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(found[1]) if found else None
    if chip is None:
        known = ", ".join(each for some in EXAMPLES.values() for each in some)
        raise UserError(f"unknown topology {name!r}, expected one of {known}")
    shape = tuple(map(int, found[2].split("x")))
    if name not in EXAMPLES[chip.name]:
        large = chip.axes == 3 and len(shape) == 3 and all(n and n % 4 == 0 for n in shape)
        if not large or math.prod(shape) > chip.most:
            raise UserError(f"unknown topology {name!r}, expected one of {', '.join(EXAMPLES[chip.name])}")
    return Topology(chip, shape)
