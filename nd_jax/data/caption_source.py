"""Captions with the attributes they name, drawn by index: what text encoders are pre-trained on."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from nd_jax.data.captions import caption, loose_caption
from nd_jax.data.world import World, sample_labels
from nd_jax.errors import UserError

ABSENT = -1
"""Label of an attribute that a scene does not have, such as the colour of a second object where there is one."""


class CaptionSource:
    """Random access to captions of several worlds in turn, training templates and seen combinations only.

    ``source[i]`` is ``{"caption": str, "labels": int32 [places, 5]}`` with as many places as the fullest world has
    objects, ``ABSENT`` in those that a scene leaves empty; it depends on worlds, seed and ``i`` alone.
    A share ``loose`` of the captions is worded by no template; ``held_out`` takes the held-out templates for the rest.
    Raises UserError without worlds or captions.
    """

    def __init__(
        self, worlds: Sequence[World], size: int, *, seed: int = 0, loose: float = 0.0, held_out: bool = False
    ):
        if not worlds or size < len(worlds):
            raise UserError(f"captions: {size} captions from {len(worlds)} worlds, expected at least one of each")
        self.size, self.seed, self.loose, self.held_out = size, seed, loose, held_out
        self.places = max(world.objects for world in worlds)
        each = -(-size // len(worlds))
        self._labels = [sample_labels(world, each, held_out=False, seed=seed) for world in worlds]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"captions: index {index} of {self.size}")
        row, world = divmod(index, len(self._labels))
        named = self._labels[world][row]
        labels = np.full((self.places, named.shape[1]), ABSENT, np.int32)
        labels[: len(named)] = named
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, index, int(self.held_out)])))
        if rng.random() < self.loose:
            return {"caption": loose_caption(named, rng), "labels": labels}
        return {"caption": caption(named, rng, held_out=self.held_out), "labels": labels}
