"""What a phone engineer gets for one target: binaries, wrappers, raw vectors with expected outputs, scripts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.converters.bundle.targets import Target
from nd_jax.converters.hexagon import scripts, windows_run
from nd_jax.converters.hexagon.ends import ends_of, metadata
from nd_jax.converters.hexagon.section import compiled, compiler_of, context_files
from nd_jax.converters.hexagon.shared import shared_files
from nd_jax.converters.hexagon.vectors import open_vectors, vectors_of
from nd_jax.converters.runtime.files import sha256
from nd_jax.converters.runtime.manifest import Bundle

INFO = "handover.json"
CONTEXTS, SHARED, VECTORS = "contexts", "shared", "vectors"


def hand_over(source: Path, target: Target, folder: Path) -> list[str]:
    """Fill an existing empty ``folder`` with everything compiled for ``target``; the graphs' names.

    Nothing of Qualcomm's is copied: the scripts take the libraries from the user's own QAIRT.
    """
    bundle = Bundle(source)
    entries = compiled(bundle, target.name)
    vectors, graphs = open_vectors(bundle, entries), {}
    for each in (CONTEXTS, VECTORS):
        (folder / each).mkdir()
    for name, entry in entries.items():
        for path in context_files(bundle, entry):
            shutil.copyfile(path, folder / CONTEXTS / path.name)
        graphs[name] = ends_of(bundle, name, entry["form"])
        graphs[name]["precision"] = bundle.graph(name)["precision"]
        graphs[name]["vectors"] = write_raw(folder / VECTORS / name, graphs[name], vectors_of(vectors, name))
        graphs[name]["snr"] = entry.get("snr", {})
        graphs[name]["bytes"] = bundle.files[entry["binary"]]["bytes"]
    shared = shared_files(bundle, target.name)
    if shared:
        (folder / SHARED).mkdir()
        for path in shared:
            shutil.copyfile(path, folder / SHARED / path.name)
    files = {name: f"{CONTEXTS}/{name}.bin" for name in graphs}
    (folder / "metadata.yaml").write_text(metadata(graphs, files), encoding="utf-8")
    (folder / "io.json").write_text(json.dumps(graphs, indent=1) + "\n", encoding="utf-8")
    compiler = compiler_of(bundle, target.name)
    if not target.windows:
        script = folder / "push_and_run.sh"
        outputs, counts = ({name: ends[key] for name, ends in graphs.items()} for key in ("outputs", "vectors"))
        script.write_text(scripts.push_and_run(target, outputs, counts, compiler["sdk"]), encoding="utf-8")
        script.chmod(0o755)
    shutil.copyfile(windows_run.__file__, folder / "windows_run.py")
    (folder / "README.md").write_text(scripts.readme(target, compiler, graphs, bool(shared)), encoding="utf-8")
    stated = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    info = {"target": target.name, "soc_model": target.number, "arch": target.arch, "files": stated}
    (folder / INFO).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    return list(graphs)


def write_raw(folder: Path, ends: Mapping[str, Any], runs: Any) -> int:
    """``K/INPUT.raw``, ``K/expected/OUTPUT.raw`` and ``input_list.txt``, little-endian float32; how many vectors."""
    folder.mkdir()
    lines = []
    for k, (inputs, outputs) in enumerate(runs):
        place = folder / str(k)
        (place / "expected").mkdir(parents=True)
        for name, x in inputs.items():
            np.ascontiguousarray(x, "<f4").tofile(place / ends["inputs"][name]["file"])
        for name, x in outputs.items():
            np.ascontiguousarray(x, "<f4").tofile(place / "expected" / ends["outputs"][name]["file"])
        lines.append(" ".join(f"{name}:={folder.name}/{k}/{entry['file']}" for name, entry in ends["inputs"].items()))
    (folder / "input_list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
