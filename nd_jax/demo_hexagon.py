"""The demonstration's bundle on Hexagon: compiled and emulated where the extra is installed, "not run here" if not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nd_jax.converters.bundle.targets import TARGETS
from nd_jax.converters.hexagon.compile import compile_graphs
from nd_jax.converters.hexagon.emulate import emulate_graphs
from nd_jax.converters.hexagon.extra import licence_line, require
from nd_jax.converters.hexagon.section import compiled
from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.errors import UserError
from nd_jax.report import Table

TARGET, TIMEOUT = TARGETS["sm8750"], 1800
COLUMNS = ["graph", "QNN operators", "transposes", "MB", "emulator", "CPU, same integers"]


def hexagon_figures(bundle: Path, say: Callable[[str], None]) -> dict[str, Any] | str:
    """The manifest's entries of the compiled and emulated graphs, or why there are none."""
    try:
        require()
    except UserError as error:
        say(f"  Hexagon: not run here ({error})")
        return f"not run here: {error}"
    say(f"  {licence_line()}")
    try:
        compile_graphs(bundle, [TARGET], timeout=TIMEOUT, say=lambda line: say(f"  {line}"))
        emulate_graphs(bundle, TARGET, timeout=TIMEOUT, say=lambda line: say(f"  {line}"))
    except (UserError, BundleError) as error:
        say(f"  Hexagon: failed ({error})")
        return f"failed: {error}"
    return dict(compiled(Bundle(bundle), TARGET.name))


def hexagon_section(found: dict[str, Any] | str) -> Table:
    """For the report; a single row that says why where there are no figures."""
    title = f"The student's graphs on {TARGET.title}'s NPU, emulated"
    if isinstance(found, str):
        return Table(title, ["Hexagon"], [[found]], "`make demo-npu` installs the extra, compiles and emulates.")
    rows = [
        [
            name,
            str(entry["qnn_ops"]),
            str(entry["transposes"]),
            f"{entry['bytes'] / 1e6:.2f}",
            f"{entry['snr']['emulator_to_fp32']:.1f}",
            f"{entry['snr']['cpu_to_fp32']:.1f}",
        ]
        for name, entry in found.items()
    ]
    return Table(title, COLUMNS, rows, "dB to the float32 graphs on recorded inputs. Compiled here, never on a device.")
