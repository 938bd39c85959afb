"""Sizes that clips are resized to. A size is (height, width) in pixels and is written HEIGHTxWIDTH."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from nd_jax.errors import UserError

Size = tuple[int, int]


def parse_size(text: str) -> Size:
    """``"64x128"`` as (64, 128). Raises UserError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise UserError(f"size {text!r}: expected HEIGHTxWIDTH in pixels, such as 320x512")
    return int(found[1]), int(found[2])


def size_name(size: Size) -> str:
    """HEIGHTxWIDTH."""
    return f"{size[0]}x{size[1]}"


def enlargement(shape: Size, size: Size) -> float:
    """By how much a clip of ``shape`` grows until it covers ``size``; below 1 it shrinks."""
    return max(size[0] / shape[0], size[1] / shape[1])


def nearest_size(shape: Size, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest to that of ``shape``, in logarithms: half and double are equally far.

    Among sizes of one aspect ratio, the largest that the clip covers without growing, else the smallest.
    """

    def rank(size: Size) -> tuple[float, float]:
        distance = abs(math.log(shape[1] / shape[0]) - math.log(size[1] / size[0]))
        growth = enlargement(shape, size)
        return round(distance, 6), growth if growth > 1 else -growth

    return min(sizes, key=rank)
