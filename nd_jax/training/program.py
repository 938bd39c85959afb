"""A recipe as compiled programs on a mesh: shapes, shardings, the initial state and the step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nd_jax.errors import UserError
from nd_jax.training.metrics import metric_names, pack_metrics
from nd_jax.training.paths import Tree, named_leaves
from nd_jax.training.recipe import Recipe
from nd_jax.training.sharding import batch_shardings, state_shardings


@dataclass(frozen=True, eq=False)
class Program:
    """Everything about a run that is known before it starts. Nothing is allocated until asked for."""

    recipe: Recipe
    mesh: Mesh
    key: jax.Array
    given: tuple = ()

    @cached_property
    def state(self) -> Tree:
        """The abstract state: ``jax.ShapeDtypeStruct`` leaves with shardings."""
        shapes = jax.eval_shape(self.recipe.init, self.key, *self.given)
        shardings = state_shardings(shapes, self.recipe.rules, self.mesh)
        return jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
        )

    @cached_property
    def batch(self) -> Tree:
        """The abstract global batch, with shardings."""
        spec = self.recipe.batch_spec()
        shardings = batch_shardings(spec, self.mesh)
        return jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), spec, shardings
        )

    @cached_property
    def metric_names(self) -> list[str]:
        """Names of the step's metrics, in packed order.

        Raises ``TypeError`` naming the leaf when the step changes the shape or dtype of the state.
        """
        after, metrics = jax.eval_shape(self.recipe.step, self.state, self.batch)
        old, new = ({name: (x.shape, x.dtype) for name, x in named_leaves(tree)} for tree in (self.state, after))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise TypeError(f"the step turns state leaf {name} from {old.get(name)} into {new.get(name)}")
        return metric_names(metrics)

    def initial_state(self) -> Tree:
        """The state before the first step, born sharded."""
        shardings = jax.tree.map(lambda s: s.sharding, self.state)
        # It runs once: on CPU, optimising the many random draws takes seven times as long as all else.
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 0} if cpu else None
        return jax.jit(self.recipe.init, out_shardings=shardings, compiler_options=options)(self.key, *self.given)

    def compile_step(self) -> jax.stages.Compiled:
        """``step(state, batch) -> (state, packed metrics)``, compiled; the state is donated.

        Compiled ahead of time, with input and output shardings pinned, so it cannot compile again: other shapes or
        shardings are an error.
        """
        names = self.metric_names

        def step(state: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
            state, metrics = self.recipe.step(state, batch)
            assert metric_names(metrics) == names
            return state, pack_metrics(metrics)

        shardings = jax.tree.map(lambda s: s.sharding, (self.state, self.batch))
        whole = NamedSharding(self.mesh, P())
        program = jax.jit(step, in_shardings=shardings, out_shardings=(shardings[0], whole), donate_argnums=0)
        return program.lower(self.state, self.batch).compile()

    def put(self, batch: Tree) -> Tree:
        """This process's examples (numpy) as its share of the global batch on the devices.

        Raises ``UserError`` naming the leaf when the batch is not what ``batch_spec`` promised.
        """
        wanted, found = (dict(named_leaves(tree)) for tree in (self.batch, batch))
        for name in sorted(wanted.keys() | found.keys()):
            expected = self._local(wanted[name]) if name in wanted else None
            got = (np.shape(found[name]), np.asarray(found[name]).dtype) if name in found else None
            if expected != got:
                raise UserError(
                    f"batch leaf {name or '(the batch itself)'}: found {_told(got)}, expected {_told(expected)} "
                    "on this process; the data pipeline and the recipe's batch_spec disagree"
                )
        leaves = jax.tree.leaves(batch)
        placed = [
            _place(np.asarray(leaf), spec) for leaf, spec in zip(leaves, jax.tree.leaves(self.batch), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(self.batch), placed)

    def _local(self, spec: jax.ShapeDtypeStruct) -> tuple[tuple[int, ...], Any]:
        if spec.sharding.is_fully_replicated and (not spec.shape or spec.shape[0] == 1):
            return spec.shape, spec.dtype
        return (spec.shape[0] // jax.process_count(), *spec.shape[1:]), spec.dtype


def _spread(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _place(leaf: np.ndarray, spec: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.process_count() == 1:
        # Copied, so that a pipeline may reuse its buffers while the step is still under way.
        return jax.device_put(leaf, spec.sharding, may_alias=False)
    return jax.make_array_from_process_local_data(spec.sharding, leaf, spec.shape)


def _told(form: tuple | None) -> str:
    return "nothing" if form is None else f"{form[1]} {list(form[0])}"
