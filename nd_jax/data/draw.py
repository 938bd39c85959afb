"""Draw scenes of the shapes world: exact or one-pixel antialiasing, a few elementwise numpy operations per clip.

Only IEEE-exact elementwise operations are used, so that the same scene gives the same bytes on every machine.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from nd_jax.data.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Scene, World

CROSS_ARM = 0.4  # thickness of a cross's bars as a share of its width


def _overlap(low: np.ndarray, high: np.ndarray, pixels: int) -> Float[np.ndarray, "t pixels"]:
    """Length of [low, high] that falls into each pixel, for one interval per frame."""
    edges = np.arange(pixels + 1, dtype=np.float32)
    inside = np.clip(edges, low[:, None], high[:, None])
    return inside[:, 1:] - inside[:, :-1]


def _box(y: np.ndarray, x: np.ndarray, tall: float, wide: float, h: int, w: int) -> Float[np.ndarray, "t h w"]:
    rows = _overlap(y - np.float32(tall / 2), y + np.float32(tall / 2), h)
    columns = _overlap(x - np.float32(wide / 2), x + np.float32(wide / 2), w)
    return rows[:, :, None] * columns[:, None, :]


def coverage(
    shape: str, y: Float[np.ndarray, " t"], x: Float[np.ndarray, " t"], size: float, height: int, width: int
) -> Float[np.ndarray, "t h w"]:
    """Share of every pixel that the shape covers when its bounding box is centred at (y, x), in [0, 1].

    Boxes and crosses are exact; circles and triangles use the distance to the edge, right to a few percent.
    """
    y, x = np.asarray(y, np.float32), np.asarray(x, np.float32)
    half = np.float32(size / 2)
    if shape == "square":
        return _box(y, x, size, size, height, width)
    if shape == "cross":
        bar, arm = size, CROSS_ARM * size
        flat, upright = _box(y, x, arm, bar, height, width), _box(y, x, bar, arm, height, width)
        return flat + upright - _box(y, x, arm, arm, height, width)
    rows = (np.arange(height, dtype=np.float32) + np.float32(0.5))[None, :, None] - y[:, None, None]
    columns = (np.arange(width, dtype=np.float32) + np.float32(0.5))[None, None, :] - x[:, None, None]
    if shape == "circle":
        outside = np.sqrt(rows * rows + columns * columns) - half
    elif shape == "triangle":  # apex up, as tall as wide; each flank is the line |x| = (y + half) / 2
        flank = (np.abs(columns) - (rows + half) * np.float32(0.5)) * np.float32(0.8**0.5)
        outside = np.maximum(flank, rows - half)
    else:
        raise ValueError(f"unknown shape {shape!r}, expected one of {SHAPES}")
    return np.clip(np.float32(0.5) - outside, 0, 1)


def draw(world: World, scene: Scene) -> UInt8[np.ndarray, "t h w 3"]:
    """The scene's clip. Object 0 is drawn in the left half (the whole frame when it is alone), object 1 in the right.

    Positions are linear in time: frame 0 shows the start, the last frame the start plus the displacement.
    """
    progress = np.arange(world.frames, dtype=np.float32) / np.float32(max(world.frames - 1, 1))
    video = np.empty((world.frames, world.height, world.width, 3), np.uint8)
    video[:] = tuple(BACKGROUNDS.values())[scene.labels[0, 4]]
    for place, (colour, shape, size, motion, background) in enumerate(scene.labels.tolist()):
        diameter = tuple(SIZES.values())[size]
        ramp = _ramp(background, colour)
        travel = np.asarray(tuple(MOTIONS.values())[motion], np.float32) * np.float32(scene.displacements[place])
        centres = np.asarray(scene.starts[place], np.float32) + progress[:, None] * travel
        # Work in a window that moves along with the object: four times fewer pixels than the frame.
        corners = np.floor(centres - np.float32(diameter / 2 + 1)).astype(int)
        side = int(diameter) + 4
        alpha = coverage(SHAPES[shape], *(centres - corners).T, diameter, side, side)
        window = ramp[(alpha * np.float32(255) + np.float32(0.5)).astype(np.uint8)]
        corners[:, 1] += place * world.region_width
        for frame, (top, left) in enumerate(corners.tolist()):
            up, low = max(top, 0), min(top + side, world.height)
            near, far = max(left, 0), min(left + side, world.width)
            video[frame, up:low, near:far] = window[frame, up - top : low - top, near - left : far - left]
    return video


def _ramp(background: int, colour: int) -> UInt8[np.ndarray, "256 3"]:
    """Pixel value for each of 256 levels of coverage."""
    below = np.array(tuple(BACKGROUNDS.values())[background], np.int64)
    above = np.array(tuple(COLOURS.values())[colour], np.int64)
    level = np.arange(256)[:, None]
    return ((below * (255 - level) + above * level + 127) // 255).astype(np.uint8)
