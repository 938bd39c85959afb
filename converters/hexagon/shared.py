"""The denoiser's stages in one binary: their weights are the same bytes, so they are in it once.

The emulator crashes when it loads such a binary (onnxruntime-qnn 2.7.0), so it is compiled and never run here; every
stage's own binary, from the same files, is what the emulator checks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nd_jax.converters.bundle.targets import Target
from nd_jax.converters.hexagon.compile import check_size, deployed_form, target_entry, workspace
from nd_jax.converters.hexagon.extra import require
from nd_jax.converters.hexagon.jobs import run_worker
from nd_jax.converters.hexagon.section import FOLDER, KEY, check_files, compiled, compiler_of, plain, put, source_of
from nd_jax.converters.hexagon.wrapper import BINARY, SDK, check_wrapper, read_wrapper, rename
from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.errors import UserError

SHARED, STEP = "denoiser_shared", "denoise"


def stage_graphs(bundle: Bundle) -> list[str]:
    """The graphs that a bundle's schedule loads for denoising."""
    return [plain(name) for step in bundle["schedule"] if step.get("step") == STEP for name in step["load"]]


def compile_shared(
    folder: Path, target: Target, *, timeout: float, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Compile the stages into one binary and put it, with a wrapper for every stage, into the bundle; its entry.

    Raises UserError for compilers that write more than one binary, and UserError and BundleError as for single graphs.
    """
    versions, bundle = require(), Bundle(folder)
    names, what = stage_graphs(bundle), f"compile the stages for {target.name} in one binary"
    forms = {name: deployed_form(bundle, name) for name in names}
    with workspace(folder) as work:
        models = [(name, str(bundle.model(name, forms[name]).absolute())) for name in names]
        told = run_worker("share", {"models": models, "number": target.number}, work, timeout=timeout, what=what)
        found = {name: read_wrapper(work / f"{name}.onnx")[1] for name in names}
        binaries = {each[BINARY] for each in found.values()}
        if len(binaries) != 1:
            raise UserError(f"{what}: the compiler wrote {len(binaries)} binaries; expected one")
        binary = work / binaries.pop()
        size = binary.stat().st_size
        check_size(size, what)
        place = f"{FOLDER}/{target.name}"
        moved = {f"{place}/{SHARED}.bin": binary}
        for name in names:
            rename(work / f"{name}.onnx", work / f"{name}.renamed", f"{SHARED}.bin")
            moved[f"{place}/{name}.shared.onnx"] = work / f"{name}.renamed"
        separate = separate_bytes(bundle, target.name, names)
        entry = {
            "binary": f"{place}/{SHARED}.bin",
            "models": {name: f"{place}/{name}.shared.onnx" for name in names},
            "sources": {name: source_of(bundle, name, forms[name]) for name in names},
            "bytes": size,
            "separate_bytes": separate,
            "share": round(size / separate, 4) if separate else None,
            "seconds": told["seconds"],
            "peak_bytes": told["peak_bytes"],
            "run": False,
        }
        compiler = versions | {"sdk": found[names[0]][SDK]}

        def listed(content: dict[str, Any]) -> None:
            target_entry(content, target, compiler)["shared"] = entry

        put(folder, moved, listed)
    beside = f", {entry['share']:.1%} of {separate / 1e6:.2f} MB in separate ones" if separate else ""
    say(
        f"stages in one binary for {target.name}: {size / 1e6:.2f} MB{beside}, {entry['seconds']:.0f} s, "
        f"{entry['peak_bytes'] / 1e9:.2f} GB peak; compiled, not run: the emulator cannot load it"
    )
    return entry


def separate_bytes(bundle: Bundle, target: str, names: list[str]) -> int:
    """Bytes of the stages' own binaries, 0 unless all are there."""
    now = Bundle(bundle.folder)
    try:
        entries = compiled(now, target)
    except BundleError:
        return 0
    return sum(now.files[entries[name]["binary"]]["bytes"] for name in names) if set(names) <= set(entries) else 0


def shared_files(bundle: Bundle, target: str) -> list[Path]:
    """The shared binary and its wrappers, whole; empty where there is none. Raises BundleError for a damaged entry."""
    compiler_of(bundle, target)
    entry, where = bundle.content[KEY][target].get("shared"), f"{bundle.folder}: shared binary of {target}"
    if entry is None:
        return []
    models = entry.get("models") if isinstance(entry, dict) else None
    if not isinstance(models, dict) or not models:
        raise BundleError(f"{where} has no wrappers; compile it again")
    for name, model in models.items():
        check_files(bundle, {"model": model, "binary": entry.get("binary")}, where)
        source = entry["sources"].get(name) if isinstance(entry.get("sources"), dict) else None
        if name not in bundle.graphs or source != source_of(bundle, name, deployed_form(bundle, name)):
            raise BundleError(f"{where} was compiled from other graphs than the bundle has now; compile it again")
        check_wrapper(bundle.file(model), entry["binary"].rsplit("/", 1)[-1])
    return [bundle.file(entry["binary"]), *map(bundle.file, models.values())]
