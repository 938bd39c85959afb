"""What the compiler says of a graph: QNN operators by kind, layout copies, and nodes that it could not take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nd_jax.checked_files import read_json
from nd_jax.errors import UserError

TRACE, LIMIT = "qnn_op_trace.json", 1 << 30
LAYOUT = ("Transpose", "Reshape")


class Facts(NamedTuple):
    """``operators``: QNN operators by kind; ``nodes``: ONNX nodes that went into them; ``unsupported``: names of those
    that did not; ``layout``: names of the transposes."""

    operators: dict[str, int]
    nodes: int
    unsupported: list[str]
    layout: list[str]

    def entry(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "qnn_ops": sum(self.operators.values()),
            "operators": self.operators,
            "onnx_nodes": self.nodes,
            "unsupported": len(self.unsupported),
            "transposes": self.operators.get("Transpose", 0),
            "transposed": self.layout[:64],
        }


def read_facts(folder: Path, what: str) -> Facts:
    """Of the trace that a compilation left in ``folder``. Raises UserError if there is none, or the graph was cut."""
    if not (folder / TRACE).is_file():
        raise UserError(f"{what}: the compiler left no trace of its operators; is it onnxruntime-qnn 2.7 or later?")
    return facts(read_json(folder / TRACE, LIMIT, "operator trace"), what)


def facts(trace: Mapping[str, Any], what: str) -> Facts:
    """The same, of a trace's content."""
    try:
        subgraphs, summary = trace["subgraph_traces"], trace["summary"]
        mappings = [each for subgraph in subgraphs for each in subgraph["op_mappings"]]
        kinds = Counter(each["dst_qnn_op_type"] for each in mappings)
        unsupported = [str(node.get("name", node)) for node in trace["unsupported_nodes"]]
        copies = [each["dst_name"] for each in mappings if each["dst_qnn_op_type"] == "Transpose"]
        found = Facts(dict(sorted(kinds.items())), int(summary["total_onnx_nodes"]), unsupported, copies)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{what}: the compiler's operator trace has no {error}; expected schema 2") from None
    if len(subgraphs) != 1 and not unsupported:
        raise UserError(f"{what}: the compiler cut the graph into {len(subgraphs)} parts; expected one")
    return found
