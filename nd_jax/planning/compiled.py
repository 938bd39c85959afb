"""Compiling for chips that are not here, and reading what came out."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from nd_jax.errors import UserError
from nd_jax.planning.bounds import Bounds, bounds
from nd_jax.planning.chips import Topology
from nd_jax.planning.hlo import parse
from nd_jax.planning.hlo_flops import kernels_flops, program_flops
from nd_jax.planning.hlo_memory import program_bytes
from nd_jax.planning.hlo_wire import by_kind, collectives

GIB = 1 << 30


class DoesNotFit(UserError):
    """A program that needs more memory than a chip has: ``needed`` and ``available`` GiB, where the compiler says."""

    def __init__(self, what: str, needed: float | None, available: float):
        self.needed, self.available = needed, available
        told = "more memory than a chip has" if needed is None else f"{needed:.2f} GiB a chip"
        over = "" if needed is None else f", {needed - available:.2f} GiB more than there is"
        super().__init__(
            f"{what} needs {told}{over} ({available:.2f} GiB); lower --batch, take more chips, or raise the recipe's "
            "microbatches or remat"
        )


def check_libtpu() -> None:
    """Raises UserError without libtpu, saying which extra to install."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(
            "plan compiles with libtpu, which is not installed; install nd-jax with the extra tpu: "
            "pip install 'nd-jax[tpu]'"
        ) from None


def topology_devices(topology: Topology) -> list[Any]:
    """The slice's devices, for ``make_mesh``. Raises UserError without libtpu."""
    check_libtpu()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    for name, value in (
        ("TPU_ACCELERATOR_TYPE", f"{topology.chip.name}-{topology.chips}"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
    ):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    with quiet():
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """libtpu writes to the process's standard error, past Python; what matters comes as exceptions all the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@dataclass(frozen=True)
class Reading:
    """What one execution of a compiled program costs a chip."""

    seconds_to_compile: float
    argument: float
    """GiB, as are the next three."""
    temporary: float
    peak: float
    code: float
    flops: float
    kernel_flops: float
    """What of them attention kernels compute, by formula."""
    hbm_bytes: float
    wire: dict[str, float]
    """Bytes received by kind of collective."""
    bounds: Bounds
    unknown_loops: int

    @property
    def held(self) -> float:
        """GiB that have to be free: what the compiler reserves for arguments and temporaries, and the code."""
        return max(self.argument + self.temporary, self.peak) + self.code


def read_program(
    what: str, compile: Callable[[], jax.stages.Compiled], topology: Topology, mesh: jax.sharding.Mesh
) -> Reading:
    """Compiles and reads. Raises ``DoesNotFit``."""
    began = time.monotonic()
    try:
        with quiet():
            program = compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(what, needed_gib(str(error)), topology.chip.hbm_gib) from None
    seconds = time.monotonic() - began
    memory, unknown = program.memory_analysis(), []
    module = parse(program.as_text())
    flops, moved, found = program_flops(module, unknown), program_bytes(module), collectives(module, mesh.size)
    coordinates = np.array([device.coords[: topology.chip.axes] for device in mesh.devices.flat])
    return Reading(
        seconds,
        memory.argument_size_in_bytes / GIB,
        memory.temp_size_in_bytes / GIB,
        memory.peak_memory_in_bytes / GIB,
        memory.generated_code_size_in_bytes / GIB,
        flops,
        kernels_flops(module),
        moved,
        by_kind(found),
        bounds(topology, flops, moved, found, coordinates),
        len(unknown),
    )


def needed_gib(message: str) -> float | None:
    """What a refusing compiler says the program would take."""
    found = re.search(r"Used (\d+(?:\.\d+)?)([KMGT]) of", message)
    return float(found[1]) * {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 1024.0}[found[2]] if found else None
