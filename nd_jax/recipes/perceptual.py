"""LPIPS (arXiv 1801.03924): the distance of two pictures in the features of a pretrained network.

The weights are the user's own: a safetensors file with the names of the ``lpips`` package's state dict,

    net.slice{S}.{I}.weight, .bias   convolution I (its index in torchvision's ``features``), [out, in, k, k]; slices
                                     1 to 5 of VGG16 (13 convolutions) or of AlexNet (5)
    lin{K}.model.1.weight            K = 0 .. 4: how much each channel of slice K + 1 counts, [1, C, 1, 1], not negative
    scaling_layer.shift, .scale      optional, 3 numbers each; colours in [-1, 1] become (x - shift) / scale

which ``safetensors.torch.save_file(lpips.LPIPS(net="vgg").state_dict(), "vgg.safetensors")`` writes, once the doubled
names ``lins.*`` are left out (they are ignored here). Widths are read from the file, and have to follow each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.functional import Params

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of the colours, where the file does not have them; LPIPS's own."""
EPS = 1e-10
WIDEST = 4096
"""Channels of a convolution, at most: the file is somebody else's."""


@dataclass(frozen=True)
class Trunk:
    """Convolutions of one kind of network: ``slices`` of indices, (kernel, stride, padding) where not 3, 1, 1."""

    slices: tuple[tuple[int, ...], ...]
    pooled: tuple[int, ...]
    """Slices (from 0) that begin with a max-pooling of stride 2."""
    window: int
    special: Mapping[int, tuple[int, int, int]]
    smallest: int
    """Pixels a side needs for every slice to be left with something."""


TRUNKS = {
    "vgg16": Trunk(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), (1, 2, 3, 4), 2, {}, 16),
    "alexnet": Trunk(((0,), (3,), (6,), (8,), (10,)), (1, 2), 3, {0: (11, 4, 2), 3: (5, 1, 2)}, 31),
}


def lpips_params(tensors: Mapping[str, np.ndarray], where: str) -> Params:
    """Parameters for ``Lpips`` from the arrays of a file, by their names there.

    Raises UserError, naming the tensor, for what is missing, surplus, misshapen or not finite.
    """
    found = {name for name in tensors if not name.startswith(("lins.", "scaling_layer."))}
    kinds = {kind: _names(trunk) for kind, trunk in TRUNKS.items()}
    kind = max(kinds, key=lambda kind: len(found & kinds[kind]))
    wrong = [*sorted(kinds[kind] - found), *sorted(found - kinds[kind])]
    if wrong:
        state = "missing" if wrong[0] in kinds[kind] else "surplus"
        raise UserError(
            f"{where}: tensor {wrong[0][:80]!r} is {state}; expected the names of an lpips state dict for {kind}"
        )
    trunk, channels, convs, lins = TRUNKS[kind], 3, {}, {}
    for index, slice_ in enumerate(trunk.slices):
        for conv in slice_:
            name, size = f"net.slice{index + 1}.{conv}", trunk.special.get(conv, (3, 1, 1))[0]
            kernel = _array(tensors, f"{name}.weight", (None, channels, size, size), where)
            channels = kernel.shape[0]
            bias = _array(tensors, f"{name}.bias", (channels,), where)
            convs[str(conv)] = {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}
        lin = _array(tensors, f"lin{index}.model.1.weight", (1, channels, 1, 1), where).reshape(-1)
        if (lin < 0).any():
            raise UserError(f"{where}: lin{index}.model.1.weight has negative entries; expected weights of a distance")
        lins[str(index)] = {"scale": lin}
    colours = {}
    for name, usual in (("shift", SHIFT), ("scale", SCALE)):
        given = tensors.get(f"scaling_layer.{name}")
        value = np.array(usual, np.float32) if given is None else np.asarray(given, np.float32).reshape(-1)
        if value.shape != (3,) or not np.isfinite(value).all() or (name == "scale" and (value <= 0).any()):
            raise UserError(f"{where}: scaling_layer.{name} is not three finite numbers (scale: above 0)")
        colours[name] = {"scale": value}
    return {"conv": convs, "lin": lins, "colours": colours}


class Lpips:
    """LPIPS of pictures in [-1, 1]; which network it is follows from the parameters."""

    def __init__(self, params: Params):
        self.trunk = next(t for t in TRUNKS.values() if set(params["conv"]) == {str(i) for s in t.slices for i in s})

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError for pictures that are too small for the network."""
        if min(height, width) < self.trunk.smallest:
            raise UserError(
                f"LPIPS: pictures of {height}x{width}; this network needs sides of at least {self.trunk.smallest}"
            )

    def __call__(self, params: Params, a: Float[Array, "n h w 3"], b: Float[Array, "n h w 3"]) -> Float[Array, " n"]:
        """Distance of each pair, float32."""
        total = jnp.zeros(len(a), jnp.float32)
        features = self.features(params, jnp.concatenate([a, b]))
        for index, feature in enumerate(features):
            one, other = jnp.split(feature / jnp.sqrt(jnp.square(feature).sum(-1, keepdims=True) + EPS), 2)
            total += (jnp.square(one - other) * params["lin"][str(index)]["scale"]).sum(-1).mean((1, 2))
        return total

    def features(self, params: Params, x: Float[Array, "n h w 3"]) -> list[Array]:
        """What comes out of each slice, float32."""
        colours = params["colours"]
        x = (x.astype(jnp.float32) - colours["shift"]["scale"]) / colours["scale"]["scale"]
        outputs = []
        for index, slice_ in enumerate(self.trunk.slices):
            if index in self.trunk.pooled:
                window = (1, self.trunk.window, self.trunk.window, 1)
                x = lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 2, 2, 1), "VALID")
            for conv in slice_:
                _, stride, pad = self.trunk.special.get(conv, (3, 1, 1))
                layer = params["conv"][str(conv)]
                x = lax.conv_general_dilated(
                    x, layer["kernel"], (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = jax.nn.relu(x + layer["bias"])
            outputs.append(x)
        return outputs


def _names(trunk: Trunk) -> set[str]:
    convs = {f"net.slice{s + 1}.{i}" for s, slice_ in enumerate(trunk.slices) for i in slice_}
    lins = {f"lin{s}.model.1.weight" for s in range(len(trunk.slices))}
    return {f"{name}.{part}" for name in convs for part in ("weight", "bias")} | lins


def _array(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int | None, ...], where: str) -> np.ndarray:
    array = np.asarray(tensors[name], np.float32)
    told = re.sub("None", "any", str(list(shape)))
    fits = array.ndim == len(shape) and all(b in (None, a) for a, b in zip(array.shape, shape, strict=False))
    if not fits or not 0 < array.shape[0] <= WIDEST:
        raise UserError(f"{where}: tensor {name} has shape {list(array.shape)}, expected {told}")
    if not np.isfinite(array).all():
        raise UserError(f"{where}: tensor {name} holds numbers that are not finite")
    return array
