"""Puts a bundle together in a temporary folder: files are registered with size and checksum as they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.converters.graphs.builder import DataFile, Graph
from nd_jax.converters.runtime.files import MANIFEST, sha256
from nd_jax.converters.runtime.manifest import FORMAT

GRAPHS, TABLES = "graphs", "tables"


class BundleWriter:
    """``content`` is the manifest so far; ``finish`` writes it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.content: dict[str, Any] = {"format": FORMAT, "graphs": {}, "tables": {}, "files": {}}
        self._data: dict[str, DataFile] = {}
        for name in (GRAPHS, TABLES):
            (folder / name).mkdir(exist_ok=True)

    def table(self, name: str, array: np.ndarray) -> None:
        """A host table, as float16 where that loses nothing."""
        half = array.astype(np.float16)
        stored = half if np.array_equal(half.astype(np.float32), array) else np.asarray(array, np.float32)
        file = f"{TABLES}/{name.replace('/', '.')}.bin"
        stored.astype(stored.dtype.newbyteorder("<")).tofile(self.folder / file)
        self.content["tables"][name] = {"file": file, "dtype": stored.dtype.name, "shape": list(array.shape)}

    def tokenizer(self, name: str, files: Mapping[str, bytes]) -> None:
        """The files of a tokenizer, already read and checked."""
        (self.folder / name).mkdir()
        for file, content in files.items():
            (self.folder / name / file).write_bytes(content)

    def graph(self, graph: Graph, *, precision: str, data: str) -> Path:
        """A float32 graph; graphs with the same ``data`` share their weights. Flushed, so that it can be opened."""
        if data not in self._data:
            self._data[data] = DataFile(self.folder / GRAPHS / f"{data}.data")
        file = self._data[data]
        path = self.folder / GRAPHS / f"{graph.name}.onnx"
        graph.save(path, file)
        file.flush()
        self.content["graphs"][graph.name] = {
            "precision": precision,
            "files": {"fp32": {"model": f"{GRAPHS}/{path.name}", "data": [f"{GRAPHS}/{data}.data"]}},
            "inputs": {name: list(value.shape) for name, value in graph.inputs.items()},
            "outputs": {name: list(value.shape) for name, value in graph.outputs.items()},
            "snr": {},
        }
        return path

    def form(self, name: str, variant: str, model: str, data: Sequence[str]) -> None:
        """Another form of a graph, whose files are in the folder already."""
        self.content["graphs"][name]["files"][variant] = {"model": model, "data": list(data)}

    def finish(self) -> None:
        """Write the manifest, last of all, over every file of the folder."""
        for file in self._data.values():
            file.close()
        for path in (self.folder / GRAPHS).glob("*.data"):
            if not path.stat().st_size:  # all weights are small enough to be in the graphs
                path.unlink()
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and path.name != MANIFEST:
                name = path.relative_to(self.folder).as_posix()
                self.content["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for graph in self.content["graphs"].values():  # a graph without large weights has no data file to speak of
            for form in graph["files"].values():
                form["data"] = [name for name in form["data"] if name in self.content["files"]]
        text = json.dumps(self.content, indent=1, sort_keys=True, allow_nan=False)
        (self.folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
