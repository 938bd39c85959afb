"""The constraints that keep the compiler honest inside a network (see ``nd_jax.models.hooks``).

Without them it splits matrix products in ways nobody asked for and moves twice the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nd_jax.errors import UserError
from nd_jax.models.attention import Placed
from nd_jax.models.hooks import ShardingHooks
from nd_jax.training.mesh import batch_entry, check_batch
from nd_jax.training.sharding import DEFAULT_RULES, PARAM_AXES, Rules, axes_of

Attention = Literal["auto", "dense", "splash"]


def sharding_hooks(mesh: Mesh, rules: Rules = DEFAULT_RULES, *, attention: Attention = "auto") -> ShardingHooks:
    """Hooks for networks trained on ``mesh``; on a single device there is nothing to constrain.

    Between blocks activations are split over examples (axis 0) and, along ``context``, over tokens (axis 1); inside
    attention over heads instead, which takes an all-to-all before and one after (DeepSpeed-Ulysses, arXiv 2309.14509).
    Where heads do not divide, heads of zeros fill up; pixels are split over ``context`` by lines of the picture.
    Prompts in text encoders are split over as many axes as divide them.
    Weights, already in the compute dtype, are gathered where a layer reads them, except for the dimension that a rule
    gives to ``tensor``; their gradients go straight back to the parameters' slices (a reduce-scatter, where plain
    constraints would ask for an all-reduce).
    Raises ``UserError`` while tracing when examples, tokens, heads or lines do not divide, or when a device would have
    a single line, naming the axis.
    """
    chosen = attention == "splash" or (attention == "auto" and on_tpu(mesh))
    kernel = splash_on(mesh) if chosen else None
    if mesh.size == 1:
        return ShardingHooks(attention=kernel)
    inner = tuple(axis for axis in ("tensor", "context") if mesh.shape.get(axis, 1) > 1)

    def activation(x: jax.Array, name: str) -> jax.Array:
        if name == "prompts":
            axes = (*batch_entry(mesh), *inner)
            while axes and x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
                axes = axes[:-1]
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(axes or None)))
        dims = _dims(name, x, inner)
        if x.shape[0] == 1 or dims is None:
            return x
        check_batch(f"activation {name!r}", x.shape, mesh)
        for dim, axes in enumerate(dims, start=1):
            ways = math.prod(mesh.shape[axis] for axis in axes)
            if name == "pixels" and x.shape[dim] == ways > 1:
                raise UserError(
                    f"activation {name!r} {list(x.shape)}: {ways} lines over mesh axis context={ways} are one for each "
                    "device, where XLA counts gradients of convolutions twice; expected two at least: choose a smaller "
                    "context or larger pictures"
                )
            if x.shape[dim] % ways:
                told = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
                what = "heads" if name in ("heads", "projected") else "channels"
                what = "lines" if name == "pixels" else "tokens" if dim == 1 else what
                raise UserError(
                    f"activation {name!r} {list(x.shape)}: {x.shape[dim]} {what} do not divide by mesh axes {told}; "
                    f"choose sizes that divide {x.shape[dim]}"
                )
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, P(batch_entry(mesh), *(d or None for d in dims)))
        )

    def gather(w: jax.Array, name: str) -> jax.Array:
        there, back = _places(w, name, rules, mesh)

        @jax.custom_vjp
        def gathered(w: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, there))

        def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
            return (jax.lax.with_sharding_constraint(grad, NamedSharding(mesh, back)),)

        gathered.defvjp(lambda w: (gathered(w), None), backward)
        return gathered(w)

    ways = mesh.shape.get("tensor", 1), mesh.shape.get("context", 1)
    return ShardingHooks(activation=activation, weights=gather, attention=kernel, head_ways=ways)


def on_tpu(mesh: Mesh) -> bool:
    """Whether the mesh's devices are TPUs."""
    return mesh.devices.flat[0].platform == "tpu"


def splash_on(mesh: Mesh) -> Callable[..., jax.Array]:
    """Splash attention (``nd_jax.models.splash``) with examples and heads where the constraints put them.

    The compiler cannot divide a kernel, so that every device is told its part. Elsewhere than on a TPU it is
    interpreted.
    """
    from nd_jax.models.splash import splash_attention  # Pallas is slow to import

    batch = batch_entry(mesh)
    inner = tuple(axis for axis in ("tensor", "context") if axis in mesh.shape) or None
    interpret = not on_tpu(mesh)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, asked: Placed, known: Placed) -> jax.Array:
        heads, rows = P(batch, None, inner, None), P(batch, None)
        segments = [jax.numpy.broadcast_to(ids, (q.shape[0], ids.shape[1])) for ids in (asked.segments, known.segments)]

        def part(q: jax.Array, k: jax.Array, v: jax.Array, asking: jax.Array, reading: jax.Array) -> jax.Array:
            placed = asked._replace(segments=asking), known._replace(segments=reading)
            return splash_attention(q, k, v, *placed, interpret=interpret)

        places = {"in_specs": (heads, heads, heads, rows, rows), "out_specs": P(batch, None, inner)}
        return jax.shard_map(part, mesh=mesh, check_vma=False, **places)(q, k, v, *segments)

    return attend


def _dims(name: str, x: jax.Array, inner: tuple[str, ...]) -> list[tuple[str, ...]] | None:
    """Mesh axes of every dimension behind the first; None where nothing is asked for."""
    context, tensor = (tuple(axis for axis in inner if axis == wanted) for wanted in ("context", "tensor"))
    if name == "heads":
        return [(), inner, ()] if inner else None
    if name == "whole":
        return [(), ()] if inner else None
    if name == "projected":
        return [context, tensor, ()] if inner else None
    if name == "seen":
        return [context, tensor] if inner else None
    if name == "pixels":
        return [*((),) * (x.ndim - 4), context, (), ()] if context else None
    return [context if x.ndim > 2 else (), *((),) * (x.ndim - 2)]


def _places(w: jax.Array, name: str, rules: Rules, mesh: Mesh) -> tuple[P, P]:
    """Where a layer reads one of its weights, and where the gradient goes. Vectors stay whole in both."""
    if w.ndim < 2:
        return P(), P()
    back = rules.spec(name or "kernel", w.shape, mesh)
    kept = [None if set(axes_of(entry)) & set(PARAM_AXES) else entry for entry in back]
    return (P(*kept) if any(kept) else P()), back
