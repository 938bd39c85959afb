"""The part of a manifest that lists context binaries: read with checks, changed whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from nd_jax.converters.bundle.targets import TARGETS
from nd_jax.converters.hexagon.wrapper import check_wrapper
from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.files import MANIFEST, NAME, check_name, read_manifest, sha256, shown
from nd_jax.converters.runtime.manifest import Bundle

KEY, FOLDER = "hexagon", "hexagon"
VERSION = re.compile(r"[0-9A-Za-z_.+-]{1,60}")
Content = dict[str, Any]


def plain(name: str) -> str:
    """A graph's or target's name that may become part of a file's. Raises BundleError for others."""
    if not NAME.fullmatch(name):
        raise BundleError(f"{shown(name)} cannot name a file; expected letters, digits, '_', '-' and '.'")
    return name


def compiled(bundle: Bundle, target: str) -> dict[str, Content]:
    """Entries of the graphs that are compiled for a target, by name. Raises BundleError for a damaged manifest, and
    where nothing is compiled for it."""
    section = bundle.content.get(KEY, {})
    entry = section.get(target) if isinstance(section, dict) else None
    if entry is None:
        known = ", ".join(name for name in section if name in TARGETS) if isinstance(section, dict) else ""
        raise BundleError(
            f"{bundle.folder} has nothing compiled for {target}{f' (only for {known})' if known else ''}; run "
            f"`nd-jax npu compile {bundle.folder} --target {target}` first"
        )
    graphs = entry.get("graphs") if isinstance(entry, dict) else None
    if not isinstance(graphs, dict) or not graphs:
        raise BundleError(f"{bundle.folder}: the manifest's {KEY} entry of {target} lists no graphs; compile it again")
    for name, graph in graphs.items():
        where = f"{bundle.folder}: {KEY} entry of {target}, {shown(name)}"
        if plain(name) not in bundle.graphs or not isinstance(graph, dict):
            raise BundleError(f"{where} is not a graph of this bundle; compile it again")
        check_files(bundle, graph, where)
        snr = graph.get("snr", {})
        if not isinstance(snr, dict) or not all(type(each) in (int, float) for each in snr.values()):
            raise BundleError(f"{where}: its SNR are not numbers; run `nd-jax npu emulate` again")
        if graph.get("source") != source_of(bundle, name, form_of(graph, where)):
            raise BundleError(f"{where} was compiled from another graph than the bundle has now; compile it again")
    return graphs


def compiler_of(bundle: Bundle, target: str) -> dict[str, str]:
    """Versions of what compiled for a target. Raises BundleError for words that are no versions."""
    found = bundle.content[KEY][target].get("compiler")
    whole = isinstance(found, dict) and {"onnxruntime-qnn", "onnxruntime", "sdk"} <= set(found)
    if not whole or not all(isinstance(each, str) and VERSION.fullmatch(each) for each in found.values()):
        raise BundleError(
            f"{bundle.folder}: the {KEY} entry of {target} does not say what compiled it; compile it again"
        )
    return found


def source_of(bundle: Bundle, name: str, form: str) -> str:
    """Checksum over the checksums of a graph's files: what a binary was compiled from."""
    files = bundle.graph_files(name, form)
    return hashlib.sha256(" ".join(bundle.files[file]["sha256"] for file in files).encode()).hexdigest()


def form_of(entry: Mapping[str, Any], where: str) -> str:
    """Which of a graph's forms was compiled."""
    if entry.get("form") not in ("fp32", "w8a16"):
        raise BundleError(f"{where} was compiled from {shown(entry.get('form'))}; expected fp32 or w8a16")
    return entry["form"]


def check_files(bundle: Bundle, entry: Mapping[str, Any], where: str) -> None:
    """Raises BundleError unless an entry's wrapper and binary are listed files in one folder."""
    for key in ("model", "binary"):
        check_name(entry.get(key), where)
        if entry[key] not in bundle.files:
            raise BundleError(f"{where}: {entry[key]} is not among the manifest's files")
    if entry["model"].rpartition("/")[0] != entry["binary"].rpartition("/")[0]:
        raise BundleError(f"{where}: wrapper and binary are in different folders")


def context_files(bundle: Bundle, entry: Mapping[str, Any]) -> tuple[Path, Path]:
    """A compiled graph's wrapper and binary, whole, the wrapper naming that binary and nothing else."""
    model, binary = bundle.file(entry["model"]), bundle.file(entry["binary"])
    check_wrapper(model, binary.name)
    return model, binary


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One change at a time: several targets may be compiled into a bundle by commands of their own. The lock is on the
    folder, so that no file is left in it; the operating system drops it with the process.

    Raises BundleError where there is no such folder, and where its file system knows no locks.
    """
    with ExitStack() as stack:
        try:
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, held)
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError as error:
            raise BundleError(
                f"cannot lock {folder} ({error.strerror}); expected a bundle's folder on a file system with locks"
            ) from None
        yield


def change_manifest(folder: Path, change: Callable[[Content], None]) -> None:
    """Edit a bundle's manifest; it is the old one or the new one at any moment, and waits for other commands' edits."""
    with _alone(folder):
        _write(folder, change)


def _write(folder: Path, change: Callable[[Content], None]) -> None:
    content = read_manifest(folder)
    change(content)
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    temporary = folder / f".{MANIFEST}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, folder / MANIFEST)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def put(folder: Path, made: Mapping[str, Path], change: Callable[[Content], None]) -> None:
    """Move finished files (``made``: name in the bundle -> where it is, on the same disk) into a bundle and list them.

    The manifest never lists a file that is not there whole: it forgets files of these names, they are moved, and then
    it lists them, changed by ``change`` as well. Raises BundleError where a folder on the way is a link.
    """
    for name in made:
        for parent in [folder / part for part in list(Path(check_name(name, str(folder))).parents)[:-1]]:
            if parent.is_symlink():
                raise BundleError(f"{parent} is a link; expected a folder: copy the bundle with cp -rL")
    stated = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in made.items()}

    def listed(content: Content) -> None:
        change(content)
        content["files"] |= stated

    with _alone(folder):
        if any(name in read_manifest(folder)["files"] for name in made):
            _write(folder, lambda content: [content["files"].pop(name, None) for name in made])
        for name, path in made.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, folder / name)
        _write(folder, listed)
