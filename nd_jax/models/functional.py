"""Modules define, dicts run: the bridge between NNX modules and pure dicts of arrays.

A network is described by an NNX module, initialised once, and from then on is a ``Definition`` (static, hashable)
plus a nested ``dict`` of arrays whose keys are all strings. Everything that runs is ``jax.jit`` over that dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return tree


class Definition:
    """The structure of a network without its numbers.

    Built from a zero-argument-but-``rngs`` constructor, e.g. ``Definition(lambda rngs: MMDiT(config, rngs=rngs))``.
    Building allocates nothing: the module is only traced.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self._graphdef, state = nnx.split(module)
        self._variables = list(nnx.to_flat_state(state))

    def abstract(self) -> Params:
        """Shapes and dtypes of every parameter, as a nested dict of ``jax.ShapeDtypeStruct``."""
        tree: Params = {}
        for path, variable in self._variables:
            node = tree
            for key in path[:-1]:
                node = node.setdefault(str(key), {})
            node[str(path[-1])] = jax.ShapeDtypeStruct(variable.get_value().shape, variable.get_value().dtype)
        return tree

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters. Traceable, so it runs under ``jax.jit`` with ``out_shardings`` and ``jax.eval_shape``."""
        return _string_keys(nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key)))))

    def bind(self, params: Params) -> nnx.Module:
        """The module holding ``params``; call it inside a traced function.

        Leading (layer) axes may differ from ``abstract()``: stacked blocks read their depth from the arrays.
        """
        flat = []
        for path, variable in self._variables:
            node = params
            for key in path:
                node = node[str(key)]
            flat.append((path, variable.replace(node)))
        return nnx.merge(self._graphdef, nnx.from_flat_state(flat))

    def __call__(self, params: Params, *args, **kwargs) -> Any:
        return self.bind(params)(*args, **kwargs)


def count_parameters(params: Params) -> int:
    """Number of array elements in a tree of arrays or abstract arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
