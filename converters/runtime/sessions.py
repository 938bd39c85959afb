"""Graphs in memory: loaded and unloaded as the bundle's schedule says, with the bytes that are resident."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .errors import BundleError
from .manifest import Bundle

Arrays = dict[str, np.ndarray]
Watch = Callable[[str, Mapping[str, np.ndarray], Mapping[str, np.ndarray]], None]


class Sessions:
    """onnxruntime sessions of a bundle's graphs on the CPU provider.

    ``precision`` chooses a graph's form: "fp32", or "deployed" for what each graph is meant to run in, where it is in
    the bundle. ``watch``, if set, sees every run: graph, inputs, outputs. ``opener(graph)``, if given, opens what
    stands in for a graph's session: an NPU's, or its emulator's.
    """

    def __init__(
        self,
        bundle: Bundle,
        precision: str = "deployed",
        threads: int = 0,
        opener: Callable[[str], Any] | None = None,
    ):
        self.bundle, self.precision, self.threads, self.opener = bundle, precision, threads, opener
        self.watch: Watch | None = None
        self.peak = 0
        """Most bytes of weights that were resident at once."""
        self._open: dict[str, Any] = {}

    def variant(self, name: str) -> str:
        """The form of a graph that is run."""
        graph = self.bundle.graph(name)
        wanted = graph.get("precision", "fp32") if self.precision == "deployed" else self.precision
        return wanted if wanted in graph["files"] else "fp32"

    def resident(self) -> int:
        """Bytes of the files of all loaded graphs, shared ones counted once."""
        files = {file for name in self._open for file in self.bundle.graph_files(name, self.variant(name))}
        return sum(self.bundle.files[file]["bytes"] for file in files)

    def load(self, name: str) -> None:
        """Open a graph. Raises BundleError if its inputs and outputs are not the manifest's."""
        if name in self._open:
            return
        session = self._cpu(name) if self.opener is None else self.opener(name)
        for side, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            shapes = {each.name: list(each.shape) for each in found}
            if shapes != dict(self.bundle.graph(name)[side]):
                raise BundleError(f"{self.bundle.folder}, graph {name}: its {side} are not those of the manifest")
        self._open[name] = session
        self.peak = max(self.peak, self.resident())

    def _cpu(self, name: str) -> Any:
        try:
            import onnxruntime
        except ImportError:
            raise BundleError("graphs need the package onnxruntime: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        path = self.bundle.model(name, self.variant(name))
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # whatever the library meets in a broken file, the file is at fault
            raise BundleError(f"{path} does not load ({error})") from None
        if session.get_providers() != ["CPUExecutionProvider"]:
            raise BundleError(f"{path} runs on {session.get_providers()}; expected the CPU provider")
        return session

    def unload(self, name: str) -> None:
        """Close a graph and free its memory."""
        self._open.pop(name, None)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step of the schedule: its graphs are loaded for as long as it takes, and no others."""
        found = [step for step in self.bundle["schedule"] if step.get("step") == name]
        if not found:
            raise BundleError(f"{self.bundle.folder}: the schedule has no step {name!r}")
        graphs = found[0].get("load", [])
        for graph in [name for name in self._open if name not in graphs]:
            self.unload(graph)
        for graph in graphs:
            self.load(graph)
        try:
            yield
        finally:
            for graph in found[0].get("unload", graphs):
                self.unload(graph)

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Outputs by name. Raises BundleError for inputs of other names or shapes."""
        if name not in self._open:
            self.load(name)
        expected = self.bundle.graph(name)["inputs"]
        feed = {key: np.ascontiguousarray(x, np.float32) for key, x in inputs.items()}
        if {key: list(x.shape) for key, x in feed.items()} != dict(expected):
            wrong = [key for key in expected.keys() | feed.keys() if key not in feed or key not in expected
                     or list(feed[key].shape) != expected[key]]  # fmt: skip
            raise BundleError(f"graph {name}: inputs {', '.join(sorted(wrong)[:3])} do not fit the manifest")
        names = list(self.bundle.graph(name)["outputs"])
        outputs = dict(zip(names, self._open[name].run(names, feed), strict=True))
        if self.watch is not None:
            self.watch(name, feed, outputs)
        return outputs
