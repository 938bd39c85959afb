"""One ordered table of path rules: how parameters are split over the mesh and which optimizer group they join."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nd_jax.errors import UserError
from nd_jax.training.mesh import AXES, batch_entry, check_batch
from nd_jax.training.paths import Tree, is_key, map_named, named_leaves

STACKED = r"(^|/)(blocks|encoder/block|encoder/layers)/(?!\d)"
"""Paths whose axis 0 is the ``layers`` axis. (A digit there would mean a list of separate modules.)"""


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a ``PartitionSpec`` names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


@dataclass(frozen=True)
class Rule:
    """What happens to parameters whose path matches ``pattern``.

    Raises ``UserError`` for an axis that does not exist or stands in two dimensions (a collision).
    """

    pattern: str
    """Regular expression searched in the path (``^`` and ``$`` anchor it)."""
    dims: tuple[str | tuple[str, ...] | None, ...] = ()
    """Mesh axes of the trailing dimensions, the last one last; the ``layers`` axis is not counted and never split."""
    whole: bool = False
    """Keep away from ``PARAM_AXES``. Otherwise the largest dimension still free that divides goes to them (or to fsdp
    alone, if only that divides), in slices of whole tiles if there are such."""
    label: str = "main"
    """Optimizer group, for learning rates; ``frozen`` parameters are not trained."""
    decay: bool = True
    """Whether weight decay applies."""

    def __post_init__(self):
        named = [axis for entry in self.dims for axis in axes_of(entry)]
        for axis in named:
            if axis not in AXES:
                raise UserError(f"sharding rule {self.pattern!r}: unknown mesh axis {axis!r}, expected one of {AXES}")
            if named.count(axis) > 1:
                raise UserError(f"sharding rule {self.pattern!r}: mesh axis {axis!r} stands in more than one dimension")


PARAM_AXES = ("fsdp", "context")
"""Axes over which parameters, optimizer and averages lie in slices: both work on other tokens with the same weights."""

SLICES = 16
"""Ways of fsdp from which on ``context`` holds copies: a chip's memory is enough then, and slices stay many tiles high,
which compilers gather and reduce without detours."""

DEFAULT_TABLE = (
    Rule(r"(^|/)(bias|scale)$", whole=True, decay=False),
    # The two halves of a layer's products, so that one sum over ``tensor`` ends each pair (Megatron-LM, 1909.08053).
    Rule(r"(^|/)(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|ff(_context)?/up)/kernel$", (None, "tensor")),
    Rule(r"(^|/)(to_out|to_add_out|ff(_context)?/down)/kernel$", ("tensor", None)),
    Rule(r"(^|/)embedding$", decay=False),
    Rule(r"(^|/)kernel$"),
)
"""Enough for every network here: matrices are split and decayed, vectors stay whole."""


@dataclass(frozen=True)
class Rules:
    """An ordered table: the first rule that matches a path decides, and a path that none matches is an error."""

    table: tuple[Rule, ...] = DEFAULT_TABLE
    stacked: str = STACKED
    minimum: int = 8192
    """Arrays with fewer elements (per layer) are not split by fsdp: the latency would cost more than the memory."""

    def find(self, path: str) -> Rule:
        """The rule for a path. Raises ``UserError`` naming the path when there is none."""
        for rule in self.table:
            if re.search(rule.pattern, path):
                return rule
        raise UserError(f"parameter {path}: no sharding rule matches it; add a rule to the recipe's table")

    def spec(self, path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
        """The partition of one parameter. Axes the mesh lacks are skipped.

        Raises ``UserError`` naming path and axis when a rule asks for a split that does not divide.
        """
        rule = self.find(path)
        lead = 1 if re.search(self.stacked, path) else 0
        free = len(shape) - lead
        if len(rule.dims) > free:
            raise UserError(f"parameter {path} {list(shape)}: rule {rule.pattern!r} names {len(rule.dims)} dimensions")
        entries: list[Any] = [None] * (len(shape) - len(rule.dims))
        for dim, entry in enumerate(rule.dims, start=len(entries)):
            present = tuple(axis for axis in axes_of(entry) if axis in mesh.shape)
            for axis in present:
                if shape[dim] % mesh.shape[axis]:
                    raise UserError(
                        f"parameter {path} {list(shape)}: dimension {dim} does not divide by mesh axis "
                        f"{axis}={mesh.shape[axis]} (rule {rule.pattern!r})"
                    )
            entries.append(present[0] if len(present) == 1 else present or None)
        if not rule.whole and all("fsdp" not in axes_of(entry) for entry in rule.dims):
            named = {axis for entry in entries for axis in axes_of(entry)}
            slices = tuple(axis for axis in PARAM_AXES if mesh.shape.get(axis, 1) > 1 and axis not in named)
            if mesh.shape.get("fsdp", 1) >= SLICES:
                slices = tuple(axis for axis in slices if axis == "fsdp")
            tries = [(axes, aligned) for aligned in (True, False) for axes in dict.fromkeys((slices, slices[:1]))]
            for axes, aligned in tries:
                dim = largest_free(shape[lead:], entries[lead:], mesh, self.minimum, axes, aligned=aligned)
                if dim is not None:
                    entries[lead + dim] = axes[0] if len(axes) == 1 else axes
                    break
        return P(*entries)

    def labels(self, params: Tree) -> Tree:
        """The optimizer group of every parameter."""
        return map_named(lambda path, _: self.find(path).label, params)

    def decays(self, params: Tree) -> Tree:
        """True where weight decay applies."""
        return map_named(lambda path, _: self.find(path).decay, params)


DEFAULT_RULES = Rules()


def param_shardings(params: Tree, rules: Rules, mesh: Mesh) -> Tree:
    """A ``NamedSharding`` for every parameter of a (possibly abstract) tree."""
    return map_named(lambda path, leaf: NamedSharding(mesh, rules.spec(path, leaf.shape, mesh)), params)


def state_shardings(state: Tree, rules: Rules, mesh: Mesh) -> Tree:
    """A ``NamedSharding`` for every leaf of an abstract state (``jax.eval_shape`` of a recipe's ``init``).

    ``params`` and ``frozen`` follow the rules. Any other leaf that is shaped like a parameter and whose path ends as
    that parameter's does (EMA, Adam's moments) is split like it; scalars and keys are replicated; what remains must
    be covered by a rule.
    """
    like: dict[tuple[str, tuple[int, ...]], P] = {}
    for name, leaf in named_leaves(state):
        root, _, path = name.partition("/")
        if root == "params":
            spec = rules.spec(path, leaf.shape, mesh)
            parts = path.split("/")
            for start in range(len(parts)):
                like.setdefault(("/".join(parts[start:]), leaf.shape), spec)

    def decide(name: str, leaf: Any) -> NamedSharding:
        root, _, path = name.partition("/")
        if root in ("params", "frozen"):
            return NamedSharding(mesh, rules.spec(path, leaf.shape, mesh))
        if is_key(leaf) or leaf.ndim == 0:
            return NamedSharding(mesh, P())
        parts = path.split("/")
        for start in range(len(parts)):
            spec = like.get(("/".join(parts[start:]), leaf.shape))
            if spec is not None:
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, rules.spec(name, leaf.shape, mesh))

    return map_named(decide, state)


def batch_shardings(spec: Tree, mesh: Mesh) -> Tree:
    """Axis 0 over the data and fsdp axes; scalars and leaves with axis 0 of length 1 replicated.

    Raises ``UserError`` naming leaf and axes when the number of examples does not divide.
    """

    def decide(name: str, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0 or leaf.shape[0] == 1:
            return NamedSharding(mesh, P())
        check_batch(f"batch leaf {name or '(the batch itself)'}", leaf.shape, mesh)
        return NamedSharding(mesh, P(batch_entry(mesh)))

    return map_named(decide, spec)


TILE = (8, 128)
"""Rows and lanes of a TPU's tiles."""


def largest_free(
    shape: tuple[int, ...],
    entries: list[Any],
    mesh: Mesh,
    minimum: int,
    axes: tuple[str, ...] = ("fsdp",),
    *,
    aligned: bool = False,
) -> int | None:
    """The largest free dimension that ``axes`` divide (the first of equals: its slices are contiguous), or None.

    ``aligned`` wants slices of whole tiles: a TPU's compiler gathers others by an all-reduce, at twice the bytes.
    """
    ways = math.prod(mesh.shape.get(axis, 1) for axis in axes)
    tile = (*(1,) * (len(shape) - 2), *TILE)[-len(shape) :] if aligned else (1,) * len(shape)
    fits = [dim for dim, n in enumerate(shape) if entries[dim] is None and n % (ways * tile[dim]) == 0]
    if ways == 1 or math.prod(shape) < minimum or not fits:
        return None
    return max(fits, key=lambda dim: shape[dim])
