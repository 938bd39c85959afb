"""QuickSRNet (arXiv 2303.04336): plain convolutions with clipping, then depth to space. Images [B, H, W, 3] in [0, 1].

3x3 convolution and clip to [0, 1], repeated; a last convolution to the pixels of the larger image, with or without a
trainable convolution of the input added to it; clip; depth to space with channel order (colour, row, column).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nd_jax.errors import UserError
from nd_jax.models.functional import Definition, Params
from nd_jax.models.image_blocks import Conv

COLOURS = 3
SCALES = (1.5, 2, 3, 4)
MARGIN = 4
"""Pixels that ``enlarge`` adds on every side; even, for 1.5x."""


@dataclasses.dataclass(frozen=True)
class QuickSRNetConfig:
    """Shape of a QuickSRNet; medium 2x by default (50,604 parameters)."""

    num_channels: int = 32
    num_intermediate_layers: int = 5
    scaling_factor: float = 2
    """Output over input size: 1.5, 2, 3 or 4."""
    use_ito_connection: bool = False
    """Add a trainable convolution of the input before the last clip (large does)."""

    class_name: ClassVar[str] = "QuickSRNet"

    def __post_init__(self) -> None:
        if self.scaling_factor not in SCALES:
            told = ", ".join(f"{scale:g}" for scale in SCALES)
            raise UserError(f"config key 'scaling_factor' is {self.scaling_factor!r}; supported: {told}")
        if self.num_channels < COLOURS or self.num_intermediate_layers < 0:
            raise UserError(
                f"config has num_channels {self.num_channels} and num_intermediate_layers "
                f"{self.num_intermediate_layers}; expected at least {COLOURS} and 0"
            )

    @property
    def ratio(self) -> Fraction:
        """Size of the depth-to-space step over that of the space-to-depth step before it: 3/2, 2/1, 3/1 or 4/1."""
        return Fraction(self.scaling_factor)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> QuickSRNetConfig:
        """Read config.json; unknown keys are ignored."""
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config})

    def to_dict(self) -> dict[str, Any]:
        """Content of config.json. The class name is ours: the model zoo has none."""
        return {"_class_name": self.class_name, **dataclasses.asdict(self)}


def quicksrnet(size: str, scale: float = 2) -> QuickSRNetConfig:
    """The published sizes: "small", "medium" (both 32 channels) and "large" (64 channels, with input connection).

    Raises ``UserError`` for another size or scale.
    """
    sizes = {"small": (32, 2, False), "medium": (32, 5, False), "large": (64, 11, True)}
    if size not in sizes:
        raise UserError(f"QuickSRNet size {size!r} does not exist; expected one of {', '.join(sizes)}")
    channels, layers, connection = sizes[size]
    return QuickSRNetConfig(channels, layers, scale, connection)


def depth_to_space(x: Float[Array, "b h w c*r*r"], factor: int) -> Float[Array, "b h*r w*r c"]:
    """Channels (colour, row, column) to pixels."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, c // factor**2, factor, factor)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * factor, w * factor, -1)


def space_to_depth(x: Float[Array, "b h*r w*r c"], factor: int) -> Float[Array, "b h w c*r*r"]:
    """The inverse of ``depth_to_space``."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // factor, w // factor, -1)


class _Anchor(nnx.Module):
    """The input's own branch: 1x1, or 3x3 with stride 2 for 1.5x."""

    def __init__(self, outputs: int, down: int, *, dtype, rngs: nnx.Rngs):
        size = 3 if down > 1 else 1
        self.net = Conv(COLOURS, outputs, size, down, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 o"]:
        return self.net(x)


class QuickSRNet(nnx.Module):
    """``network(image)``: [B, H, W, 3] to [B, sH, sW, 3], both in [0, 1]."""

    def __init__(self, config: QuickSRNetConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw, width, ratio = {"dtype": dtype, "rngs": rngs}, config.num_channels, config.ratio
        self.config = config
        layers = range(config.num_intermediate_layers + 1)
        # Numbered as in the official files, where every other entry is an activation.
        self.cnn = nnx.Dict({str(2 * n): Conv(width if n else COLOURS, width, **kw) for n in layers})
        outputs, down = COLOURS * ratio.numerator**2, ratio.denominator
        self.conv_last = Conv(width * down**2, outputs, 1 if down > 1 else 3, **kw)
        self.anchor = _Anchor(outputs, down, **kw) if config.use_ito_connection else None

    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b sh sw 3"]:
        x, ratio = image, self.config.ratio
        if image.shape[1] % ratio.denominator or image.shape[2] % ratio.denominator:
            raise UserError(f"super-resolution by {float(ratio):g}: image of {image.shape[1:3]}, expected even sides")
        for name in sorted(self.cnn, key=int):
            x = jnp.clip(self.cnn[name](x), 0, 1)
        if ratio.denominator > 1:
            x = space_to_depth(x, ratio.denominator)
        x = self.conv_last(x)
        if self.anchor is not None:
            x = x + self.anchor(image)
        return depth_to_space(jnp.clip(x, 0, 1), ratio.numerator)


def definition(config: QuickSRNetConfig, *, dtype=jnp.float32) -> Definition:
    """The network that computes in ``dtype``."""
    return Definition(lambda rngs: QuickSRNet(config, dtype=dtype, rngs=rngs))


def enlarge(
    network: Definition, params: Params, image: Float[Array, "b h w 3"], config: QuickSRNetConfig
) -> Float[Array, "b sh sw 3"]:
    """``network`` on a picture whose edge pixels are repeated outwards, and that margin cut off again.

    The convolutions take everything outside a picture for black, which shows in its outermost pixels: on small frames
    that costs more PSNR than the network gains over interpolation.
    """
    margin, cut = ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), round(MARGIN * config.scaling_factor)
    large = network(params, jnp.pad(image, margin, mode="edge"))
    return large[:, cut:-cut, cut:-cut]


def near_identity(config: QuickSRNetConfig, params: Params) -> Params:
    """Fresh parameters that begin as nearest upsampling, with +1 identities (arXiv 2303.04336, section 3.2).

    Every convolution gets one added at its centre from channel k to channel k, and the last one repeats each colour
    over the pixels it becomes; with an input connection that does the repeating instead. Ours: the first three channels
    carry the colours with nothing else added, nothing of the other channels reaches the result at first, and their
    biases keep a grey picture in the middle of [0, 1], where clipping lets gradients through. With the random part
    everywhere, a network starts some 10 dB lower and takes thousands of steps to get back.

    Raises ``UserError`` for 1.5x without input connection, whose last layer sees 2x2 pixels at once.
    """
    ratio, connection = config.ratio, config.use_ito_connection
    if ratio.denominator > 1 and not connection:
        raise UserError("super-resolution by 1.5: starting as identity needs use_ito_connection")
    params = jax.tree.map(jnp.asarray, params)
    cnn = {}
    for name, layer in params["cnn"].items():
        kernel = layer["kernel"].at[..., :COLOURS].set(0.0)
        index = jnp.arange(kernel.shape[2])
        kernel = kernel.at[1, 1, index, index].add(1.0)
        middle = 0.5 - 0.5 * kernel.sum((0, 1, 2))
        cnn[name] = {"kernel": kernel, "bias": jnp.where(jnp.arange(len(middle)) < COLOURS, 0.0, middle)}
    branch = params["anchor"]["net"] if connection else params["conv_last"]
    kernel = jnp.zeros_like(branch["kernel"])
    outputs, centre = jnp.arange(kernel.shape[-1]), kernel.shape[0] // 2
    repeat = kernel.at[centre, centre, outputs // ratio.numerator**2, outputs].set(1.0)
    changed = {"kernel": repeat, "bias": jnp.zeros_like(branch["bias"])}
    if not connection:
        return params | {"cnn": cnn, "conv_last": changed}
    silent = jax.tree.map(jnp.zeros_like, params["conv_last"])
    return params | {"cnn": cnn, "conv_last": silent, "anchor": {"net": changed}}
