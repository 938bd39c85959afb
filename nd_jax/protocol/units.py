"""Accuracy and motion by latent unit, as a closed loop makes it: does a video go on showing what it should, and go on
moving, as its history becomes its own?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from nd_jax.data import judge
from nd_jax.data.world import MOTIONS, World
from nd_jax.generate import first_unit
from nd_jax.protocol.readings import stack
from nd_jax.protocol.run import SystemVideos, Videos
from nd_jax.protocol.statistics import Estimate, estimate, mean, quotient, quotient_of_means
from nd_jax.system import VideoSystem


class UnitReadings(NamedTuple):
    """What the judge reads from the frames of each latent unit but the first; leading axes of many videos."""

    labels: Int[np.ndarray, "*lead units objects 5"]
    """-1: not readable."""
    displacement: Float[np.ndarray, "*lead units objects 2"]
    """(down, right) in pixels over a full clip; 0 where no object is found."""


def read_units(video: UInt8[np.ndarray, "t h w 3"], world: World, time_scale: int) -> UnitReadings:
    """Unit k ends with frame ``k * time_scale``; the frame before it is read along."""
    ends = range(time_scale, len(video), time_scale)
    read = [judge.read(video[end - time_scale : end + 1], world) for end in ends]
    return stack(UnitReadings(each.labels, each.displacement) for each in read)


def asked(
    displacements: Float[np.ndarray, "*lead n units objects 2"], labels: Int[np.ndarray, "n objects 5"]
) -> Float[np.ndarray, "*lead n units objects"]:
    """Displacement in the direction that each object is asked to move in; 0 for those that should stand still."""
    directions = np.array(list(MOTIONS.values()), np.float64)
    sizes = np.linalg.norm(directions, axis=1, keepdims=True)
    directions = (directions / np.where(sizes, sizes, 1))[labels[:, :, 3]]
    return (displacements * directions[:, None]).sum(-1)


def _sums(
    displacements: Float[np.ndarray, "seeds n units objects 2"], labels: Int[np.ndarray, "n objects 5"]
) -> tuple[Float[np.ndarray, "units m"], Float[np.ndarray, " m"]]:
    """Sum by unit, and number, over the moving objects of each of m prompts that have any."""
    moves = labels[:, :, 3] != 0
    rows = moves.any(1)
    total = asked(displacements, labels).sum((0, 3)).T
    return total[:, rows], (len(displacements) * moves.sum(1)[rows]).astype(np.float64)


def speed_by_unit(
    ours: UnitReadings, labels: Int[np.ndarray, "n objects 5"], theirs: UnitReadings | None = None, *, resamples: int
) -> list[Estimate]:
    """For each unit the mean speed in the direction asked for, or that divided by ``theirs``; readings are
    [seeds, n, ...]."""
    total, count = _sums(ours.displacement, labels)
    if theirs is None:
        return [estimate(quotient, row, count, resamples=resamples) for row in total]
    other, others = _sums(theirs.displacement, labels)
    pairs = zip(total, other, strict=True)
    return [estimate(quotient_of_means, a, count, b, others, resamples=resamples) for a, b in pairs]


def accuracy_by_unit(
    ours: UnitReadings, labels: Int[np.ndarray, "n objects 5"], theirs: UnitReadings | None = None, *, resamples: int
) -> list[Estimate]:
    """For each unit the share of attributes that its frames alone show right, or that divided by ``theirs``; readings
    are [seeds, n, ...]."""
    right = _right(ours, labels)
    if theirs is None:
        return [estimate(mean, row, resamples=resamples) for row in right]
    pairs = zip(right, _right(theirs, labels), strict=True)
    return [estimate(quotient, a, b, resamples=resamples) for a, b in pairs]


def _right(read: UnitReadings, labels: Int[np.ndarray, "n objects 5"]) -> Float[np.ndarray, "units n"]:
    return (read.labels == labels[:, None]).mean((0, 3, 4)).T


class Recorded:
    """Videos that are read unit by unit on the way to the judge."""

    def __init__(self, inner: Videos, time_scale: int):
        self.inner, self.time_scale, self.frames = inner, time_scale, inner.frames
        self.prepare: Callable = inner.prepare
        self.too_long: Callable = inner.too_long
        self.reconstruct: Callable = inner.reconstruct
        self._read: dict[tuple, list[UnitReadings]] = {}

    def videos(
        self, captions: Sequence[str], world: World, seed: int, control: str | None
    ) -> Iterator[UInt8[np.ndarray, "t h w 3"]]:
        read = self._read.setdefault((tuple(captions), seed), []) if control is None else []
        for clip in self.inner.videos(captions, world, seed, control):
            read.append(read_units(clip, world, self.time_scale))
            yield clip

    def by_unit(self, captions: Sequence[str], seeds: Sequence[int]) -> UnitReadings:
        """[seeds, n, units, ...] What was read of the captions' videos."""
        return stack(stack(self._read[tuple(captions), seed]) for seed in seeds)


class HybridVideos(SystemVideos):
    """A system's videos after first frames that another system makes of the same prompts and noise."""

    def __init__(self, system: VideoSystem, first: VideoSystem, *, batch: int = 16):
        super().__init__(system, batch=batch)
        self.first = first
        self._makers: dict[tuple[int, int], Callable[..., Array]] = {}

    def first_latents(self, world: World) -> Callable[..., Array]:
        size = (world.height, world.width)
        if size not in self._makers:
            self._makers[size] = first_unit(self.first, height=size[0], width=size[1])
        return self._makers[size]


def cpu_seconds(videos: Videos, captions: Sequence[str], world: World, seed: int) -> float:
    """Processor time of one video, over all threads. Every program should have been compiled for as many captions."""
    began = time.process_time()
    count = sum(1 for _ in videos.videos(captions, world, seed, None))
    return (time.process_time() - began) / count
