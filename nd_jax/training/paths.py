"""Names for the leaves of a tree: ``blocks/attn/to_q/kernel``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

Tree = Any


def name_of(path: tuple) -> str:
    """A tree path as text, its keys joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Every leaf with its name, in the tree's own order."""
    return [(name_of(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def map_named(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """The tree with each leaf replaced by ``function(name, leaf)``."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(name_of(path), leaf), tree)


def is_key(leaf: Any) -> bool:
    """Whether a leaf (array or abstract array) holds typed random keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
