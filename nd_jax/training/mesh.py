"""Device meshes: which axes there are, and how big each is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from nd_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
"""Every axis a rule may name. A mesh may lack some; rules then skip them."""

BATCH_AXES = ("data", "fsdp")
"""Axes that examples are split over."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. One of them may be -1: whatever the devices leave for it."""

    data: int = 1
    """Copies of the parameters; each copy sees other examples."""
    fsdp: int = -1
    """Ways that parameters, optimizer and EMA are split; also splits the examples."""
    tensor: int = 1
    """Ways that heads and hidden channels are split within a layer."""
    context: int = 1
    """Ways that the tokens of every example are split; also splits parameters, optimizer and EMA."""


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over ``devices`` (default: all of them, every process's included).

    Axes are always ``Auto``: the compiler places what the constraints leave open. Raises ``UserError`` naming the axis
    when the sizes do not multiply to the number of devices.
    """
    count = len(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh axis {axis}: size {size}, expected at least 1, or -1 for the remaining devices")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"mesh axes {' and '.join(open_axes)} are both -1: only one can take the remaining devices")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        if count % fixed:
            told = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "1"
            raise UserError(
                f"mesh axis {open_axes[0]}: {count} devices do not divide by {told}; choose a divisor of {count}"
            )
        sizes[open_axes[0]] = count // fixed
    elif fixed != count:
        told = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if axis in BATCH_AXES or size > 1)
        raise UserError(f"mesh {told} needs {fixed} devices, found {count}; set one axis to -1 to take what is left")
    sizes = {axis: size for axis, size in sizes.items() if axis in BATCH_AXES or size > 1}
    # Axes may share one of the torus, as fsdp=64 x context=2 of 4x4x8 chips do.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def batch_ways(mesh: Mesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def batch_entry(mesh: Mesh) -> tuple[str, ...]:
    """The ``PartitionSpec`` entry of an axis that counts examples."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape)


def check_batch(what: str, shape: tuple[int, ...], mesh: Mesh) -> None:
    """Raises ``UserError`` naming ``what`` and the axes unless axis 0 divides by the parts of a batch."""
    ways = batch_ways(mesh)
    if shape[0] % ways:
        told = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in batch_entry(mesh))
        raise UserError(f"{what} {list(shape)}: axis 0 does not divide by mesh axes {told}; use a multiple of {ways}")
