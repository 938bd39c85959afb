"""Clips of the shapes world by index: the one definition behind the TFDS builder, endless drawing and prompt lists."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from nd_jax.data.captions import caption, plain_caption
from nd_jax.data.draw import draw
from nd_jax.data.world import SPLITS, World, sample_labels, sample_scene
from nd_jax.errors import UserError


@dataclass(frozen=True)
class ShapesSource:
    """Random access to a split of the shapes world; example ``i`` depends on nothing but world, split, seed and ``i``.

    ``source[i]`` is ``{"video": uint8 [T, H, W, 3], "caption": str, "labels": int32 [objects, 5], "index": int}``.
    Splits: ``train`` and ``seen`` (same combinations and templates, other starts), ``heldout_combinations`` and
    ``heldout_templates``. Drawing takes about a millisecond, so training may draw instead of reading: a large ``size``
    never repeats a clip. Raises UserError for an unknown split or a negative size.
    """

    world: World
    split: str
    size: int
    seed: int = 0
    labels: Int[np.ndarray, "size objects 5"] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.split not in SPLITS:
            raise UserError(f"shapes: unknown split {self.split!r}, expected one of {', '.join(SPLITS)}")
        if self.size < 0:
            raise UserError(f"shapes: {self.size} clips, expected at least 0")
        held_out = self.split == "heldout_combinations"
        seed = self.seed * len(SPLITS) + SPLITS.index(self.split)
        object.__setattr__(self, "labels", sample_labels(self.world, self.size, held_out=held_out, seed=seed))

    def __len__(self) -> int:
        return self.size

    def _random(self, index: int, purpose: int) -> np.random.Generator:
        key = [self.seed, SPLITS.index(self.split), index, purpose]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))

    def caption(self, index: int, *, held_out: bool | None = None) -> str:
        """The caption alone, without drawing. ``held_out`` words it in the other templates.

        The synonyms stay, but for a motion's, which go with the verb's form.
        """
        held_out = self.split == "heldout_templates" if held_out is None else held_out
        return caption(self.labels[index], self._random(index, 0), held_out=held_out)

    def video(self, index: int) -> np.ndarray:
        """The clip alone, uint8 [T, H, W, 3]."""
        return draw(self.world, sample_scene(self.world, self.labels[index], self._random(index, 1)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"shapes: index {index} of {self.size} clips")
        return {
            "video": self.video(index),
            "caption": self.caption(index),
            "labels": self.labels[index].copy(),
            "index": index,
        }


def prompts(
    world: World, split: str, count: int, *, seed: int = 0, plain: bool = False
) -> tuple[list[str], Int[np.ndarray, "n objects 5"]]:
    """Captions of a split's first ``count`` examples and the labels they name, to generate from and to judge.

    ``plain`` words them all alike, for systems that were trained on plain captions only.
    """
    source = ShapesSource(world, split, count, seed)
    captions = (plain_caption(source.labels[n]) if plain else source.caption(n) for n in range(count))
    return list(captions), source.labels.copy()
