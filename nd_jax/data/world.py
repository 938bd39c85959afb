"""The shapes world: which scenes exist, which of them are held out, and how a scene is drawn at random.

A scene is a plain background and one object (or two, side by side) that moves along a straight line or stands still.
Every object has five attributes, written as one row of integers in the order of ``ATTRIBUTES``. Whole combinations of
(colour, shape, motion) are held out, in every size and over every background, while every pair of values is seen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from nd_jax.errors import UserError

COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 70),
    "blue": (45, 90, 235),
    "yellow": (245, 220, 50),
    "purple": (190, 60, 210),
    "cyan": (40, 205, 220),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 20.0, "medium": 25.0, "large": 30.0}  # width of the bounding box in pixels
_H = 0.5**0.5
MOTIONS = {  # unit vector (down, right)
    "still": (0.0, 0.0),
    "right": (0.0, 1.0),
    "down right": (_H, _H),
    "down": (1.0, 0.0),
    "down left": (_H, -_H),
    "left": (0.0, -1.0),
    "up left": (-_H, -_H),
    "up": (-1.0, 0.0),
    "up right": (-_H, _H),
}
BACKGROUNDS = {
    "black": (15, 15, 15),
    "grey": (125, 125, 125),
    "white": (240, 240, 240),
    "brown": (120, 70, 30),
    "navy": (20, 30, 100),
}
ATTRIBUTES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "motion": tuple(MOTIONS),
    "background": tuple(BACKGROUNDS),
}
CHANCE = {name: 1 / len(values) for name, values in ATTRIBUTES.items()}
DISPLACEMENT = (12.0, 14.0)  # pixels over the whole clip
MARGIN = 1.0  # pixels that stay free at the border, wherever an object goes
FPS = 24
SPLITS = ("train", "seen", "heldout_combinations", "heldout_templates")


@dataclass(frozen=True)
class World:
    """Size of the clips and number of objects. With two objects the frame is cut into a left and a right half."""

    height: int = 64
    width: int = 64
    frames: int = 33
    objects: int = 1

    def __post_init__(self):
        if self.frames < 1 or (self.frames - 1) % 8:
            raise UserError(f"shapes world: frames is {self.frames}, expected 1 + 8 k: try {self.frames // 8 * 8 + 1}")
        if self.objects not in (1, 2):
            raise UserError(f"shapes world: objects is {self.objects}, expected 1 or 2")
        least = int(max(SIZES.values()) + 2 * (DISPLACEMENT[1] + MARGIN))
        if self.height < least or self.region_width < least:
            raise UserError(
                f"shapes world: each object has {self.height} x {self.region_width} pixels, expected at least "
                f"{least} x {least} so that every start allows every direction"
            )

    @property
    def region_width(self) -> int:
        """Columns that belong to one object."""
        return self.width // self.objects


WORLDS = {
    "64x64": World(),
    "64x128": World(width=128),
    "two_objects": World(width=128, objects=2),
}


def world_named(name: str) -> World:
    """The preset of that name. Raises UserError listing the presets for any other name."""
    if name not in WORLDS:
        raise UserError(f"unknown shapes world {name!r}, expected one of {', '.join(WORLDS)}")
    return WORLDS[name]


@dataclass(frozen=True)
class Scene:
    """What `draw` needs. Pixel (0, 0) covers [0, 1) x [0, 1); coordinates are (down, right)."""

    labels: Int[np.ndarray, "objects 5"]
    starts: Float[np.ndarray, "objects 2"]  # centre of the bounding box in frame 0, in the object's own half
    displacements: Float[np.ndarray, " objects"]  # pixels over the clip; not used by objects that stand still


@functools.cache
def held_out_triples() -> frozenset[tuple[int, int, int]]:
    """The (colour, shape, motion) triples that training never shows: one colour for each (shape, motion), 1 in 6.

    Spread so that each colour is held out equally often and no (colour, shape) or (colour, motion) more than twice,
    hence every pair of values of any two attributes is seen.
    """
    rng = np.random.Generator(np.random.Philox(2024))
    shapes, motions, colours = len(SHAPES), len(MOTIONS), len(COLOURS)
    deck = np.repeat(np.arange(colours), shapes * motions // colours)
    while True:
        table = rng.permutation(deck).reshape(shapes, motions)
        counts = np.eye(colours, dtype=int)[table]
        if counts.sum(0).max() <= 2 and counts.sum(1).max() <= 2:
            return frozenset((int(table[s, m]), s, m) for s in range(shapes) for m in range(motions))


@functools.cache
def combinations(held_out: bool) -> Int[np.ndarray, "n 5"]:
    """All combinations that are (or are not) held out, one row of attribute indices each."""
    grids = np.meshgrid(*(np.arange(len(values)) for values in ATTRIBUTES.values()), indexing="ij")
    rows = np.stack([grid.ravel() for grid in grids], axis=1).astype(np.int32)
    triples = held_out_triples()
    mask = np.array([(row[0], row[1], row[3]) in triples for row in rows.tolist()])
    chosen = rows[mask == held_out]
    chosen.setflags(write=False)
    return chosen


def sample_labels(world: World, count: int, *, held_out: bool, seed: int) -> Int[np.ndarray, "count objects 5"]:
    """``count`` rows of labels: all the combinations in random order, again and again.

    Every nine rows in a row hold each motion once, so that small sets are balanced where chance is lowest.
    The first rows do not depend on ``count``. Two objects share their background.
    """
    rows = combinations(held_out)
    by_motion = [rows[rows[:, 3] == motion] for motion in range(len(MOTIONS))]
    rounds = -(-count // len(rows)) if count else 0
    labels = np.empty((count, world.objects, 5), np.int32)
    for place in range(world.objects):
        rng = np.random.Generator(np.random.Philox([seed, int(held_out), place]))
        parts = []
        for _ in range(rounds):
            table = np.stack([group[rng.permutation(len(group))] for group in by_motion], axis=1)
            parts += [block[rng.permutation(len(block))] for block in table]
        labels[:, place] = np.concatenate(parts)[:count] if parts else 0
    labels[:, :, 4] = labels[:, :1, 4]
    return labels


def sample_scene(world: World, labels: Int[np.ndarray, "objects 5"], rng: np.random.Generator) -> Scene:
    """Starts and displacements for given labels. The start knows the size but never the motion."""
    sizes = np.array(list(SIZES.values()))[labels[:, 2]]
    reach = sizes / 2 + DISPLACEMENT[1] + MARGIN
    low = np.stack([reach, reach], axis=1)
    high = np.array([world.height, world.region_width]) - low
    starts = low + (high - low) * rng.random((world.objects, 2))
    displacements = rng.uniform(*DISPLACEMENT, size=world.objects)
    return Scene(np.asarray(labels, np.int32), starts, displacements)


def label_names(labels: Int[np.ndarray, "attribute=5"]) -> dict[str, str]:
    """One row of labels in words; an attribute that could not be read (-1) is called "none"."""
    return {
        name: values[index] if index >= 0 else "none"
        for (name, values), index in zip(ATTRIBUTES.items(), np.asarray(labels).tolist(), strict=True)
    }
