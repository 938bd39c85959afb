"""EPContext models: one node that stands for a compiled graph and names the binary beside it."""

from __future__ import annotations

from pathlib import Path

from nd_jax.converters.graphs.builder import onnx  # with a word to people who have not installed it
from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.files import NAME, shown

DOMAIN, OPERATOR, LIMIT = "com.microsoft", "EPContext", 16 << 20
BINARY, EMBED, MAIN, SDK = "ep_cache_context", "embed_mode", "main_context", "ep_sdk_version"
FOREIGN = ("onnx_model_filename",)
"""Attributes that would tell where a graph was compiled."""


def read_wrapper(path: Path) -> tuple[onnx.ModelProto, dict]:
    """The model and its node's attributes. Raises BundleError for anything but one node that names a file beside it."""
    if path.stat().st_size > LIMIT:
        raise BundleError(f"{path} has {path.stat().st_size} bytes; expected a small model that names a binary")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's own errors share no public base
        raise BundleError(f"{path} is not an ONNX file ({error}); compile it again") from None
    graph = model.graph
    kinds = {(node.domain, node.op_type) for node in graph.node}
    if kinds != {(DOMAIN, OPERATOR)} or len(graph.node) != 1 or model.functions or graph.initializer:
        raise BundleError(f"{path} holds {shown(sorted(kinds))}; expected one {OPERATOR} and nothing beside it")
    found = {each.name: onnx.helper.get_attribute_value(each) for each in graph.node[0].attribute}
    name = found.get(BINARY, b"").decode("utf-8", "replace")
    if found.get(EMBED, 1) != 0 or not NAME.fullmatch(name):
        raise BundleError(f"{path} keeps its binary in {shown(name)}; expected a plain name beside it")
    return model, found | {BINARY: name, SDK: found.get(SDK, b"").decode("utf-8", "replace")}


def check_wrapper(path: Path, binary: str) -> None:
    """Raises BundleError unless ``path`` names ``binary``."""
    _, found = read_wrapper(path)
    if found[BINARY] != binary:
        raise BundleError(f"{path} names the binary {shown(found[BINARY])}; expected {binary}")


def rename(path: Path, target: Path, binary: str) -> None:
    """Write the wrapper ``path`` to ``target``, naming ``binary``, without traces of the machine that made it."""
    model, _ = read_wrapper(path)
    node = model.graph.node[0]
    kept = [each for each in node.attribute if each.name not in (BINARY, *FOREIGN)]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(BINARY, binary)])
    target.write_bytes(model.SerializeToString())
