"""A case's weights as parameters, through the tables that convert whole checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.converters import kinds
from nd_jax.converters.kinds import get_kind
from nd_jax.converters.safetensors_io import TensorFile
from nd_jax.converters.transfer import load_params
from nd_jax.models.functional import Params
from nd_jax.verification.cases import Case

WEIGHTS = "weights.safetensors"


def read_config(case: Case, network: str, content: dict[str, Any] | None = None) -> Any:
    """The network's config dataclass, from the case's config.json (or ``content``) and the names of its tensors.

    Raises:
        UserError: for values that are not supported.
    """
    names: set[str] = set()
    if case.file(WEIGHTS).is_file():
        with TensorFile(case.file(WEIGHTS)) as tensors:
            names = set(tensors)
    content = case.config if content is None else content
    return kinds.read_config(get_kind(network), content, str(case.file("config.json")), names)


def load(case: Case, network: str, config: Any, *, parts: Sequence[str] | None = None) -> Params:
    """Parameters, float32; only those under the top-level keys ``parts`` if given.

    Raises:
        UserError: for a damaged file, or names and shapes that do not belong to ``config``.
    """
    path = case.file(WEIGHTS)
    with TensorFile(path) as tensors:
        return load_params(get_kind(network).table(config), tensors, str(path), dtype="fp32", parts=parts)


def parts_in(case: Case, network: str, config: Any) -> list[str]:
    """Top-level keys of the parameter tree of which the case's weights have at least one tensor."""
    entries = get_kind(network).table(config).entries
    with TensorFile(case.file(WEIGHTS)) as tensors:
        return sorted({entry.path[0] for name, entry in entries.items() if name in tensors})


def same_weights(case: Case, other: Case) -> bool:
    """Whether the tensors that two cases have in common are equal."""
    with TensorFile(case.file(WEIGHTS)) as ours, TensorFile(other.file(WEIGHTS)) as theirs:
        common = ours.keys() & theirs.keys()
        return all(np.array_equal(ours[name].read(), theirs[name].read()) for name in common)


def with_zeros(params: Params, network: str, config: Any) -> Params:
    """``params`` completed by zeros, for a network of which only some parts are used."""
    abstract = get_kind(network).definition(config).abstract()
    zeros = {part: tree for part, tree in abstract.items() if part not in params}
    return params | jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), zeros)


def torch_tensors(network: str, config: Any, params: Params) -> dict[str, np.ndarray]:
    """Parameters (or anything of their shape, such as gradients) under the names and in the layout of torch."""
    found = {}
    for leaf, entries in get_kind(network).table(config).leaves.items():
        array: Any = params
        for key in leaf:
            array = array[key]
        array = np.asarray(array)
        for entry in entries:
            found[entry.name] = entry.layout.to_torch(array if entry.layer is None else array[entry.layer])
    return found
