"""Read a clip of the shapes world back into its attributes. Nothing here is learned.

Per object's region: the background is the median of the border ring; the object is what differs from it; its colour is
the median of what differs most; coverage is each pixel's position on the line from background to object colour; shape
and size are the template nearest to the coverage, centred on its centroid and averaged over frames; motion is the
straight line fitted to the centroids. Coverage keeps its sum and centroid under symmetric blur, so a codec's softness
moves the reading little. What cannot be read is -1 and never counts as right.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from nd_jax.data.draw import coverage
from nd_jax.data.world import ATTRIBUTES, BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, World
from nd_jax.errors import UserError

CONTRAST = 45.0  # an object differs from the background by at least this much (the palette's least is 110)
LEAST_AREA = 60.0  # pixels per frame below which there is no object (the smallest drawn one has 200)
STILL_BELOW = 6.0  # pixels over the whole clip: half of the least displacement
_HALF = 21  # half the side of the window around an object's centroid


@dataclass(frozen=True)
class Reading:
    """Attributes read from one clip (-1: not readable) and, per object, what they were read from."""

    labels: Int[np.ndarray, "objects 5"]
    displacement: Float[np.ndarray, "objects 2"]  # (down, right) in pixels, scaled to the world's full length
    template_error: Float[np.ndarray, " objects"]  # squared distance to the best template over its own square


def to_float255(video: np.ndarray) -> Float[np.ndarray, "t h w 3"]:
    """A clip as float32 in [0, 255]. Accepts uint8, or floats in [-1, 1]. Raises UserError for anything else."""
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UserError(f"judge: a clip of shape {video.shape}, expected [frames, height, width, 3]")
    if video.dtype == np.uint8:
        return video.astype(np.float32)
    if not np.issubdtype(video.dtype, np.floating):
        raise UserError(f"judge: a clip of {video.dtype}, expected uint8 or floats in [-1, 1]")
    return np.clip(np.nan_to_num(video.astype(np.float32)) * 127.5 + 127.5, 0, 255)


def read(video: np.ndarray, world: World) -> Reading:
    """Read one clip [T, H, W, 3]. T may be less than the world's (one frame alone always reads as standing still)."""
    video = to_float255(video)
    if video.shape[1:3] != (world.height, world.width):
        raise UserError(
            f"judge: a clip of {video.shape[1]} x {video.shape[2]} pixels, expected {world.height} x {world.width}"
        )
    width = world.region_width
    parts = [_read_region(video[:, :, k * width : (k + 1) * width], world.frames) for k in range(world.objects)]
    labels, displacement, errors = zip(*parts, strict=True)
    return Reading(np.array(labels, np.int32), np.array(displacement), np.array(errors))


def read_labels(videos: Iterable[np.ndarray], world: World) -> Int[np.ndarray, "n objects 5"]:
    """The labels read from each of many clips."""
    return np.array([read(video, world).labels for video in videos], np.int32).reshape(-1, world.objects, 5)


def _nearest(value: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> int:
    return int(np.argmin(np.linalg.norm(np.array(list(palette.values())) - value, axis=1)))


def _read_region(video: Float[np.ndarray, "t h w 3"], full_frames: int) -> tuple[list[int], tuple[float, float], float]:
    frames, height, width, _ = video.shape
    ring = np.ones((height, width), bool)
    ring[1:-1, 1:-1] = False
    ground = np.median(video[:, ring].reshape(-1, 3), axis=0)
    background = _nearest(ground, BACKGROUNDS)
    difference = video - ground
    strength = np.sqrt(np.einsum("thwc,thwc->thw", difference, difference))
    strong = strength > CONTRAST
    if strong.sum() < LEAST_AREA * frames:
        return [-1, -1, -1, -1, background], (0.0, 0.0), 1.0
    core = strength >= 0.8 * np.quantile(strength[strong], 0.75)
    paint = np.median(difference[core], axis=0)
    colour = _nearest(paint + ground, COLOURS)
    cover = np.clip(difference @ (paint / (paint @ paint)), 0, 1)
    cover[cover < 0.2] = 0  # codec noise far from the object would pull the centroid
    centroids, areas = _centroids(cover)
    seen = areas > LEAST_AREA / 2
    if not seen.any():
        return [colour, -1, -1, -1, background], (0.0, 0.0), 1.0
    shape, size, error = _nearest_template(cover[seen], centroids[seen])
    down, right = _displacement(np.arange(frames)[seen], centroids[seen], full_frames)
    return [colour, shape, size, _motion(down, right), background], (down, right), error


def _centroids(cover: Float[np.ndarray, "t h w"]) -> tuple[Float[np.ndarray, "t 2"], Float[np.ndarray, " t"]]:
    """Centre of mass (down, right) and area of each frame's coverage; the window's middle where there is none."""
    _, height, width = cover.shape
    rows, columns = cover.sum(2), cover.sum(1)
    areas = rows.sum(1)
    weight = np.maximum(areas, 1e-6)
    down = rows @ (np.arange(height) + 0.5) / weight
    right = columns @ (np.arange(width) + 0.5) / weight
    return np.stack([down, right], axis=1), areas


def _displacement(times: np.ndarray, centroids: np.ndarray, full_frames: int) -> tuple[float, float]:
    """Least-squares velocity times the length of a full clip; zero for a single frame."""
    offsets = times - times.mean()
    spread = float(offsets @ offsets)
    if not spread:
        return 0.0, 0.0
    down, right = offsets @ (centroids - centroids.mean(0)) / spread * (full_frames - 1)
    return float(down), float(right)


def _motion(down: float, right: float) -> int:
    """Index of the motion: standing still, or the direction with the largest projection."""
    if np.hypot(down, right) < STILL_BELOW:
        return 0
    directions = np.array(list(MOTIONS.values())[1:])
    return 1 + int(np.argmax(directions @ np.array([down, right])))


def _window(cover: Float[np.ndarray, "h w"], centre: Float[np.ndarray, "axis=2"]) -> Float[np.ndarray, "n n"]:
    """The coverage around a centre, moved by bilinear interpolation so that the centre is the window's."""
    padded = np.pad(cover, _HALF + 1)
    corner = centre + 1  # the window starts _HALF before the centre; padding adds _HALF + 1
    (top, left), (a, b) = corner.astype(int), corner - corner.astype(int)
    part = padded[top : top + 2 * _HALF + 1, left : left + 2 * _HALF + 1]
    part = part[:-1] * (1 - a) + part[1:] * a
    return part[:, :-1] * (1 - b) + part[:, 1:] * b


@functools.cache
def _templates() -> Float[np.ndarray, "templates pixels"]:
    """Every (shape, size) as it looks in the window around its centroid, shape varying slowest."""
    side = 64
    middle = np.array([side / 2])
    rows = []
    for shape in SHAPES:
        for size in SIZES.values():
            cover = coverage(shape, middle, middle, size, side, side)
            rows.append(_window(cover[0], _centroids(cover)[0][0]).ravel())
    return np.array(rows)


def _nearest_template(cover: np.ndarray, centroids: np.ndarray) -> tuple[int, int, float]:
    """Shape, size and relative error of the template with the least squared distance, summed over frames."""
    templates = _templates()
    windows = np.array([_window(frame, centre).ravel() for frame, centre in zip(cover, centroids, strict=True)])
    own = np.einsum("kn,kn->k", templates, templates)
    distance = own - 2 * templates @ windows.mean(0) + np.einsum("tn,tn->t", windows, windows).mean()
    best = int(np.argmin(distance))
    return best // len(SIZES), best % len(SIZES), float(distance[best] / own[best])


@dataclass(frozen=True)
class Scores:
    """Shares in [0, 1]. ``chance`` is what the same readings score against captions in random order: (mean, standard
    deviation), exact over all orders."""

    count: int
    accuracy: dict[str, float]  # by attribute, over all objects
    mean: float  # of the five attributes
    all_right: float  # objects with all five attributes right
    chance: dict[str, tuple[float, float]]  # by attribute, and "mean"


def score(read: Int[np.ndarray, "n objects 5"], wanted: Int[np.ndarray, "n objects 5"]) -> Scores:
    """Compare labels read from clips with the labels that their captions name, object by object.

    Raises UserError when there are no clips or the shapes differ.
    """
    read, wanted = np.asarray(read), np.asarray(wanted)
    if read.shape != wanted.shape or read.ndim != 3 or not len(read):
        raise UserError(
            f"judge: labels of shapes {read.shape} and {wanted.shape}, expected the same [n > 0, objects, 5]"
        )
    right = read == wanted
    return Scores(
        count=len(read),
        accuracy={name: float(right[:, :, k].mean()) for k, name in enumerate(ATTRIBUTES)},
        mean=float(right.mean()),
        all_right=float(right.all(-1).mean()),
        chance=permutation_chance(read[None], wanted),
    )


def permutation_chance(
    read: Int[np.ndarray, "seeds n objects 5"], wanted: Int[np.ndarray, "n objects 5"]
) -> dict[str, tuple[float, float]]:
    """``Scores.chance`` of several videos per caption: their captions change places together."""
    # agreement[i, j]: how well the clips of caption i would match caption j
    agreement = {
        name: (read[:, :, None, :, k] == wanted[None, None, :, :, k]).mean((0, -1)) for k, name in enumerate(ATTRIBUTES)
    }
    agreement["mean"] = sum(agreement.values()) / len(ATTRIBUTES)
    return {name: _permutation_moments(matrix) for name, matrix in agreement.items()}


def _permutation_moments(matrix: Float[np.ndarray, "n n"]) -> tuple[float, float]:
    """Mean and standard deviation of mean_i matrix[i, p(i)] over all permutations p (Hoeffding 1951, theorem 2)."""
    count = len(matrix)
    centred = matrix - matrix.mean(0, keepdims=True) - matrix.mean(1, keepdims=True) + matrix.mean()
    variance = float((centred**2).sum()) / max(count - 1, 1) / count**2
    return float(matrix.mean()), variance**0.5
