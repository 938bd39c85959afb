"""The manifest of a bundle: what is in it, checked before anything else is opened."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BundleError
from .files import check_file, check_name, read_manifest, shown
from .onnx_files import external_files

FORMAT = 1
DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
MOST_ELEMENTS = 1 << 31
"""Of one tensor."""
KEYS = {
    "files": dict,
    "video": dict,
    "text": dict,
    "latent": dict,
    "denoiser": dict,
    "sampling": dict,
    "codec": dict,
    "graphs": dict,
    "tables": dict,
    "schedule": list,
}
OPTIONAL = ("picture", "upscaler")
"""Sections that a manifest may have: how a first frame is made, how frames are enlarged."""


class Bundle:
    """A bundle's folder and its checked manifest; files are read, and their checksums compared, when they are needed.

    Raises BundleError for whatever is missing, damaged, or not as this version writes it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.content = read_manifest(self.folder)
        self._checked: set[str] = set()
        if self.content.get("format") != FORMAT:
            raise BundleError(f"{folder}: bundle format {shown(self.content.get('format'))}; expected {FORMAT}")
        for key, kind in KEYS.items():
            if not isinstance(self.content.get(key), kind):
                raise BundleError(f"{folder}: the manifest's {key!r} is missing or not {kind.__name__}")
        for key in OPTIONAL:
            if not isinstance(self.content.get(key, {}), dict):
                raise BundleError(f"{folder}: the manifest's {key!r} is not an object")
        for name, stated in self.files.items():
            check_name(name, f"{folder}: the manifest's files")
            whole = isinstance(stated, dict) and type(stated.get("bytes")) is int and stated["bytes"] >= 0
            if not whole or not re.fullmatch("[0-9a-f]{64}", str(stated.get("sha256"))):
                raise BundleError(f"{folder}: the manifest's entry of {name} lacks its size or checksum")
        for name, graph in self.graphs.items():
            self._check_graph(name, graph)
        for name, table in self.content["tables"].items():
            self._check_table(name, table)

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    @property
    def files(self) -> Mapping[str, Any]:
        return self.content["files"]

    @property
    def graphs(self) -> Mapping[str, Any]:
        return self.content["graphs"]

    def _check_graph(self, name: str, graph: Any) -> None:
        where = f"{self.folder}: graph {shown(name)}"
        if not isinstance(graph, dict) or not isinstance(graph.get("files"), dict) or not graph["files"]:
            raise BundleError(f"{where} names no files")
        for variant, entry in graph["files"].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("data"), list):
                raise BundleError(f"{where}, {shown(variant)}: expected a model and a list of data files")
            for file in (entry.get("model"), *entry["data"]):
                self._stated(file, where)
        for side in ("inputs", "outputs"):
            shapes = graph.get(side)
            if not isinstance(shapes, dict) or not shapes:
                raise BundleError(f"{where} has no {side}")
            for value, shape in shapes.items():
                self._check_shape(shape, f"{where}, {shown(value)}")

    def _check_shape(self, shape: Any, where: str) -> None:
        sizes = isinstance(shape, list) and 1 <= len(shape) <= 4 and all(type(n) is int and n > 0 for n in shape)
        if not sizes or math.prod(shape) > MOST_ELEMENTS:
            raise BundleError(f"{where}: shape {shown(shape)}; expected one to four sizes and at most 2^31 elements")

    def _check_table(self, name: str, table: Any) -> None:
        where = f"{self.folder}: table {shown(name)}"
        if not isinstance(table, dict) or table.get("dtype") not in DTYPES:
            kind = table.get("dtype") if isinstance(table, dict) else table
            raise BundleError(f"{where} is of {shown(kind)}; expected plain numbers: {' or '.join(DTYPES)}")
        self._check_shape(table.get("shape"), where)
        stated = self._stated(table.get("file"), where)["bytes"]
        expected = math.prod(table["shape"]) * DTYPES[table["dtype"]].itemsize
        if stated != expected:
            raise BundleError(f"{where} has {stated} bytes; its shape {table['shape']} takes {expected}")

    def _stated(self, file: Any, where: str) -> dict[str, Any]:
        check_name(file, where)
        if file not in self.files:
            raise BundleError(f"{where}: {file} is not among the manifest's files")
        return self.files[file]

    def file(self, name: str) -> Path:
        """The path of a file whose size and checksum have been compared."""
        if name not in self._checked:
            check_file(self.folder, name, self._stated(name, str(self.folder)))
            self._checked.add(name)
        return self.folder / name

    def table(self, name: str) -> np.ndarray:
        """A host table, mapped read-only."""
        table = self.content["tables"].get(name)
        if table is None:
            raise BundleError(f"{self.folder} has no table {shown(name)}")
        path = self.file(table["file"])
        return np.memmap(path, DTYPES[table["dtype"]], "r", shape=tuple(table["shape"]))

    def graph_files(self, name: str, variant: str) -> list[str]:
        """The model and then the data files of a graph."""
        entry = self.graph(name)["files"].get(variant)
        if entry is None:
            have = ", ".join(self.graph(name)["files"])
            raise BundleError(f"{self.folder}: graph {name} has no {shown(variant)} form; it has {have}")
        return [entry["model"], *entry["data"]]

    def graph(self, name: str) -> Mapping[str, Any]:
        """A graph's entry."""
        if name not in self.graphs:
            raise BundleError(f"{self.folder} has no graph {shown(name)}; it has {', '.join(self.graphs)}")
        return self.graphs[name]

    def model(self, name: str, variant: str) -> Path:
        """The model file of a graph, all of whose files are whole and whose weights lie where the manifest says."""
        model, *data = self.graph_files(name, variant)
        path = self.file(model)
        outside = external_files(path) - {file.rsplit("/", 1)[-1] for file in data}
        folders = {file.rpartition("/")[0] for file in (model, *data)}
        if outside or len(folders) > 1:
            raise BundleError(f"{path} keeps weights in {shown(sorted(outside))}, which the manifest does not list")
        for file in data:
            self.file(file)
        return path

    def check_all(self) -> None:
        """Compare every file's size and checksum, and look where every model keeps its weights."""
        for name in self.files:
            self.file(name)
        for name, graph in self.graphs.items():
            for variant in graph["files"]:
                self.model(name, variant)
