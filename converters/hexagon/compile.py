"""Context binaries of a bundle's graphs: a process for every graph and target, results in the manifest."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nd_jax.converters.bundle.targets import LARGEST, Target
from nd_jax.converters.hexagon.extra import require
from nd_jax.converters.hexagon.jobs import run_worker
from nd_jax.converters.hexagon.section import FOLDER, KEY, plain, put, source_of
from nd_jax.converters.hexagon.trace import read_facts
from nd_jax.converters.hexagon.worker import CONTEXT, TRACE
from nd_jax.converters.hexagon.wrapper import BINARY, SDK, read_wrapper, rename
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.errors import UserError

Say = Callable[[str], None]


@contextmanager
def workspace(bundle: Path) -> Iterator[Path]:
    """A private folder on the bundle's disk, gone afterwards."""
    folder = bundle / f".{FOLDER}.partial-{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def deployed_form(bundle: Bundle, name: str) -> str:
    """The form of a graph that is compiled. Raises UserError where a graph's integers are missing."""
    graph = bundle.graph(name)
    if graph.get("precision") == "fp16":
        return "fp32"  # HTP computes the floats of a float32 graph in fp16
    if "w8a16" not in graph["files"]:
        raise UserError(
            f"{bundle.folder}: graph {name} has no w8a16 form; build the bundle without --float-only, so that it is "
            "quantised"
        )
    return "w8a16"


def chosen_graphs(bundle: Bundle, names: Sequence[str]) -> list[str]:
    """Graphs by name; none given: all. Raises UserError for others, before anything is compiled."""
    unknown = [name for name in names if name not in bundle.graphs]
    if unknown:
        raise UserError(f"{bundle.folder} has no graph {unknown[0]!r}; it has {', '.join(bundle.graphs)}")
    found = list(dict.fromkeys(names)) or list(bundle.graphs)
    for name in found:
        plain(name)
        deployed_form(bundle, name)
    return found


def compile_graphs(
    folder: Path, targets: Sequence[Target], names: Sequence[str] = (), *, timeout: float, say: Say = lambda line: None
) -> None:
    """Compile a bundle's graphs (``names``, or all) for every target, each put into the bundle as it is done.

    ``timeout`` is of one graph, in seconds; ``say`` receives a line for each. Raises UserError without the compiler and
    for graphs that it does not take whole.
    """
    versions, bundle = require(), Bundle(folder)
    for target in targets:
        for name in chosen_graphs(bundle, names):
            entry = compile_graph(bundle, name, target, versions, timeout)
            told = f"{name} for {target.name}: {entry['bytes'] / 1e6:.2f} MB, {entry['qnn_ops']} QNN operators"
            say(f"{told}, {entry['transposes']} transposes, {entry['seconds']:.0f} s, {gigabytes(entry)} GB peak")


def gigabytes(entry: dict[str, Any]) -> str:
    """Peak memory for people."""
    return f"{entry['peak_bytes'] / 1e9:.2f}"


def compile_graph(
    bundle: Bundle, name: str, target: Target, versions: dict[str, str], timeout: float
) -> dict[str, Any]:
    """Compile one graph for one target and put it into the bundle; its entry in the manifest."""
    form, what = deployed_form(bundle, name), f"compile {name} for {target.name}"
    model = bundle.model(name, form)
    with workspace(bundle.folder) as work:
        job = {"model": str(model.absolute()), "number": target.number}
        told = run_worker("compile", job, work, timeout=timeout, what=what)
        found = read_facts(work / TRACE, what)
        if found.unsupported:
            raise UserError(
                f"{what}: the NPU does not take {len(found.unsupported)} nodes, first {found.unsupported[0]}"
            )
        about = read_wrapper(work / CONTEXT)[1]
        size = (work / about[BINARY]).stat().st_size
        check_size(size, what)
        made = {"model": f"{FOLDER}/{target.name}/{name}.onnx", "binary": f"{FOLDER}/{target.name}/{name}.bin"}
        rename(work / CONTEXT, work / "renamed.onnx", f"{name}.bin")
        entry = {
            **made,
            **found.entry(),
            "form": form,
            "source": source_of(bundle, name, form),
            "bytes": size,
            "seconds": told["seconds"],
            "peak_bytes": told["peak_bytes"],
        }

        def listed(content: dict[str, Any]) -> None:
            target_entry(content, target, versions | {"sdk": about[SDK]})["graphs"][name] = entry

        put(bundle.folder, {made["model"]: work / "renamed.onnx", made["binary"]: work / about[BINARY]}, listed)
    return entry


def check_size(size: int, what: str) -> None:
    """Raises UserError for a binary that no Hexagon process can map."""
    if size >= LARGEST:
        raise UserError(f"{what}: the binary has {size} bytes; a target takes less than {LARGEST}: split the graph")


def target_entry(content: dict[str, Any], target: Target, compiler: dict[str, str]) -> dict[str, Any]:
    """The manifest's entry of a target, new if it is not there or was made by another compiler."""
    section = content.setdefault(KEY, {})
    entry = section.get(target.name)
    if not isinstance(entry, dict) or entry.get("compiler") != compiler:
        old = [name for name in content["files"] if name.startswith(f"{FOLDER}/{target.name}/")]
        for name in old:
            content["files"].pop(name)
        about = {"soc_model": target.number, "arch": target.arch, "compiler": compiler}
        entry = section[target.name] = about | {"graphs": {}}
    return entry
