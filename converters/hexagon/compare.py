"""What came back from a device: SNR against the bundle's vectors, and measured latencies for its manifest."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.checked_files import parse_json, read_bytes
from nd_jax.converters.bundle.targets import Target
from nd_jax.converters.hexagon.emulate import decibels
from nd_jax.converters.hexagon.ends import flat
from nd_jax.converters.hexagon.section import KEY, change_manifest, compiled
from nd_jax.converters.hexagon.vectors import open_vectors, vectors_of
from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.files import regular_size, shown
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.errors import UserError

LATENCIES, PROFILE, LIMIT, MOST_RUNS = "latency.json", "profile.csv", 16 << 20, 1 << 20
SLOWEST = 3.6e6
"""Milliseconds beyond which a number is no latency."""


def compare(folder: Path, pulled: Path, target: Target, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """SNR and latency of every graph that came back in ``pulled``; both go into the bundle's manifest.

    ``pulled`` holds GRAPH/Result_K/OUTPUT.raw (float32; a '/' in a name may be a folder or '_'), and for latencies
    GRAPH/profile.csv of qnn-profile-viewer or latency.json. Raises UserError and BundleError for links, files of other
    sizes, and where nothing came back.
    """
    if pulled.is_symlink() or not pulled.is_dir():
        raise UserError(f"{pulled} is not a folder; expected what push_and_run.sh or windows_run.py wrote")
    bundle = Bundle(folder)
    entries = compiled(bundle, target.name)
    vectors, timed, found = open_vectors(bundle, entries), read_latencies(pulled), {}
    for name in entries:
        place = pulled / name
        if place.is_symlink():
            raise BundleError(f"{place} is a link; expected the pulled folder itself")
        if not place.is_dir():
            say(f"{name}: nothing came back")
            continue
        references, outputs = [], []
        for k, (_, expected) in enumerate(vectors_of(vectors, name)):
            references.append(expected)
            outputs.append({value: read_output(pulled, f"{name}/Result_{k}", value, x.shape)
                            for value, x in expected.items()})  # fmt: skip
        told: dict[str, Any] = {"snr_to_fp32": decibels(name, references, outputs), "vectors": len(references)}
        times = timed.get(name) or read_profile(place)
        if times:
            told |= {"ms": round(statistics.median(times), 4), "runs": len(times)}
        found[name] = told
        emulated = entries[name].get("snr", {}).get("emulator_to_fp32")
        beside = "" if emulated is None else f" (emulator {emulated:.1f})"
        took = f", {told['ms']:.3f} ms over {told['runs']} runs" if times else ", not timed"
        say(f"{name}: {told['snr_to_fp32']:.1f} dB to float32{beside}{took}")
    if not found:
        raise UserError(f"{pulled} holds no output of {', '.join(entries)}; expected GRAPH/Result_0/OUTPUT.raw")

    def noted(content: dict[str, Any]) -> None:
        for name, told in found.items():
            content[KEY][target.name]["graphs"][name]["measured"] = told

    change_manifest(folder, noted)
    return found


def read_output(pulled: Path, place: str, value: str, shape: tuple[int, ...]) -> np.ndarray:
    """One output as it came back. Raises BundleError for links and other lengths than the shape's."""
    flat(value)
    names = [f"{place}/{value}.raw", f"{place}/{flat(value)}.raw"]
    there = [name for name in names if (pulled / name).is_symlink() or (pulled / name).exists()]
    name = there[0] if there else names[-1]
    size, expected = regular_size(pulled, name), 4 * math.prod(shape)
    if size != expected:
        raise BundleError(f"{pulled / name} has {size} bytes; expected {expected}: float32 of {list(shape)}")
    found = np.fromfile(pulled / name, "<f4", count=math.prod(shape)).reshape(shape)
    if not np.isfinite(found).all():
        raise BundleError(f"{pulled / name} holds values that are not finite; was the graph run to its end?")
    return found


def read_latencies(pulled: Path) -> Mapping[str, list[float]]:
    """Milliseconds by graph from ``latency.json``, where there is one."""
    path = pulled / LATENCIES
    if not path.is_symlink() and not path.exists():
        return {}
    content = parse_json(read_bytes(path, LIMIT, "latencies"), str(path))
    found = {}
    for name, entry in content.items():
        times = entry.get("ms") if isinstance(entry, dict) else None
        if not isinstance(times, list) or not all(type(t) in (int, float) and 0 < t < SLOWEST for t in times):
            raise UserError(f"{path}: {shown(name)}: expected milliseconds, a list of positive numbers under 'ms'")
        found[name] = [float(t) for t in times]
    return found


def read_profile(place: Path) -> list[float]:
    """Milliseconds of every execution in a ``profile.csv`` of qnn-profile-viewer: the accelerator's own where it tells
    them, the whole call's otherwise. Empty where there is no such file."""
    path = place / PROFILE
    if not path.is_symlink() and not path.exists():
        return []
    text = read_bytes(path, LIMIT, "profile").decode("utf-8", "replace")
    found: dict[str, list[float]] = {"accelerator": [], "call": []}
    for row in csv.reader(io.StringIO(text)):
        cells = [cell.strip() for cell in row]
        if "EXECUTE" not in cells or "US" not in cells[1:]:
            continue
        try:
            time = float(cells[cells.index("US") - 1]) / 1e3
        except ValueError:
            continue
        words = " ".join(cells).lower()
        if 0 < time < SLOWEST and sum(map(len, found.values())) < MOST_RUNS:
            if "accelerator (execute) time" in words and "excluding" not in words and "cycles" not in words:
                found["accelerator"].append(time)
            elif "root" in words or "netrun" in words:
                found["call"].append(time)
    return found["accelerator"] or found["call"]
