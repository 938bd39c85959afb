"""Time and peak memory of the parts of a long computation."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Part:
    """One part. ``peak``: bytes of this process resident at once while it ran; ``own`` is whether that is the part's
    own peak, or (where the system cannot forget earlier ones) that of everything so far."""

    name: str
    seconds: float
    peak: int
    own: bool

    def __str__(self) -> str:
        return f"{self.name:<28}{self.seconds:9.1f} s {'' if self.own else '<='}{self.peak / 2**20:9,.0f} MiB"


def release() -> None:
    """Give memory that nobody refers to any more back to the system, as far as it takes it."""
    gc.collect()
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library
            return


def peak_bytes() -> int:
    """Most bytes resident at once since the start, or since ``forget_peak`` worked."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10


def forget_peak() -> bool:
    """Begin a new peak at what is resident now; whether the system can."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


@dataclass
class Meter:
    """Collects parts, telling each when it is done."""

    parts: list[Part] = field(default_factory=list)
    tell: Callable[[Part], None] = lambda part: None
    """Called with every part when it is done."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what the block does; memory that it leaves unused is released first and afterwards."""
        release()
        own, began = forget_peak(), time.monotonic()
        yield
        part = Part(name, time.monotonic() - began, peak_bytes(), own)
        self.parts.append(part)
        self.tell(part)
        release()

    def table(self) -> str:
        """A line per part, and the sum."""
        seconds, peak = sum(part.seconds for part in self.parts), max((part.peak for part in self.parts), default=0)
        total = Part("all", seconds, peak, True)
        return "\n".join(map(str, [*self.parts, total]))
