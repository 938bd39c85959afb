"""Which prompts, which seeds, how many: nothing here depends on a system, so every system meets the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int, UInt8

from nd_jax.data.captions import plain_caption
from nd_jax.data.source import ShapesSource
from nd_jax.data.world import World, world_named
from nd_jax.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """How much is generated. Raises UserError for numbers that make no evaluation."""

    name: str = "full"
    prompts: int = 144
    """Of each split; every nine prompts in a row ask for each motion once."""
    prompt_seed: int = 2024
    """Of prompts and of the ground-truth clips; no training run uses it, and the splits have draws of their own."""
    sampling_seeds: tuple[int, ...] = (0, 1, 2)
    """Every prompt gets one video from each. Video n of a seed starts from the same noise in every system."""
    resamples: int = 10_000
    """Of the bootstrap; prompts are resampled, each with all its videos."""
    plain: bool = False
    """Word all prompts alike, for systems that were trained on plain captions only."""

    def __post_init__(self):
        for name, least, most in (("prompts", 1, 1 << 14), ("prompt_seed", 0, 1 << 32), ("resamples", 100, 1 << 20)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise UserError(f"protocol: {name} is {value!r}, expected a whole number from {least} to {most}")
        if type(self.plain) is not bool or not isinstance(self.name, str):
            raise UserError(f"protocol: name {self.name!r} and plain {self.plain!r}, expected text and true or false")
        seeds = self.sampling_seeds
        if not isinstance(seeds, tuple) or not all(type(seed) is int and 0 <= seed < 1 << 32 for seed in seeds):
            raise UserError(f"protocol: sampling seeds {seeds!r}, expected whole numbers of at least 0")
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError(f"protocol: sampling seeds {list(seeds)}, expected one or more, each once")

    def check_same(self, other: Protocol, where: str) -> None:
        """Raises UserError where the videos of both do not belong together, prompt by prompt and seed by seed.

        How they are resampled does not matter.
        """

        def asked(protocol: Protocol) -> Protocol:
            return replace(protocol, name="", resamples=100)

        if asked(self) != asked(other):
            raise UserError(f"{where}: made with {other}, expected {self}; evaluate it again with the same protocol")


FULL = Protocol()
QUICK = Protocol("quick", prompts=36, sampling_seeds=(0,), resamples=2000)
PROTOCOLS = {"quick": QUICK, "full": FULL}


@dataclass(frozen=True)
class Split:
    """A list of prompts: the world they are judged in and the split of ``ShapesSource`` that names their scenes."""

    world_name: str
    source: str
    about: str
    reworded: bool = False
    """Worded by training's templates, whatever the source does: the same labels."""
    usual: bool = True
    """Run unless others are named; off where the system that comes with the package has not been trained."""

    @property
    def world(self) -> World:
        return world_named(self.world_name)


SPLITS = {
    "seen": Split("64x64", "seen", "one object; training shows its combination and its template"),
    "heldout_combinations": Split("64x64", "heldout_combinations", "one object; training never shows its combination"),
    "heldout_templates": Split("64x64", "heldout_templates", "one object; training never shows its template"),
    "heldout_templates_reworded": Split(
        "64x64", "heldout_templates", "the labels and noise of heldout_templates, worded by training's templates", True
    ),
    "two_objects": Split("two_objects", "seen", "two objects; training shows their combinations and templates"),
    "two_objects_heldout": Split(
        "two_objects", "heldout_combinations", "two objects; training never shows either's combination"
    ),
    "wide": Split(
        "64x128", "seen", "one object anywhere in twice the width; training shows its combination", usual=False
    ),
    "wide_heldout": Split(
        *("64x128", "heldout_combinations"),
        "one object anywhere in twice the width; training never shows its combination",
        usual=False,
    ),
}
FRAMES = min(split.world.frames for split in SPLITS.values())
"""Longest clip there is a truth for."""
TEMPLATES = ("heldout_templates", "heldout_templates_reworded")
"""The pair whose difference is what unknown templates cost, all else equal."""
CONTROL_SPLIT = "seen"
"""Whose labels the controls are judged against."""


@dataclass(frozen=True)
class PromptList:
    """A split's captions, the labels they name and the ground-truth clips of the same labels."""

    captions: tuple[str, ...]
    source: ShapesSource

    @property
    def labels(self) -> Int[np.ndarray, "n objects 5"]:
        return self.source.labels

    def clip(self, index: int, frames: int) -> UInt8[np.ndarray, "t h w 3"]:
        """The first ``frames`` frames of a drawn clip that shows what prompt ``index`` asks for."""
        return self.source.video(index)[:frames]


@functools.lru_cache(maxsize=32)
def prompt_list(protocol: Protocol, split: str) -> PromptList:
    """The prompts of a split. The first ones do not depend on how many there are."""
    chosen = SPLITS[split]
    source = ShapesSource(chosen.world, chosen.source, protocol.prompts, protocol.prompt_seed)
    source.labels.setflags(write=False)
    if protocol.plain:
        captions = map(plain_caption, source.labels)
    else:
        held_out = False if chosen.reworded else None
        captions = (source.caption(n, held_out=held_out) for n in range(protocol.prompts))
    return PromptList(tuple(captions), source)


def chosen_splits(protocol: Protocol, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The splits to run, in their usual order; default: all usual ones that make sense.

    Raises UserError for unknown names, none, and for held-out templates where all prompts are worded alike.
    """
    known = [name for name in SPLITS if not (protocol.plain and name in TEMPLATES)]
    names = tuple(name for name in known if SPLITS[name].usual) if names is None else tuple(names)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        plain = ", without templates because prompts are plain" if protocol.plain else ""
        found = ", ".join(map(repr, unknown)) or "none"
        raise UserError(f"protocol: splits {found}; expected some of {', '.join(known)}{plain}")
    return tuple(name for name in known if name in names)
