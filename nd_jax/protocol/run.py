"""Generate what the protocol asks for and read it, clip by clip, so that no split is ever whole in memory."""

from __future__ import annotations

import dataclasses
import functools
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, UInt8

from nd_jax.data.world import World
from nd_jax.errors import UserError
from nd_jax.evaluate import codec_pass
from nd_jax.generate import Generator, generate_batches
from nd_jax.models.functional import count_parameters
from nd_jax.models.system import CODEC, DENOISER, TEXT_PARTS, init_system
from nd_jax.protocol.definition import CONTROL_SPLIT, FRAMES, FULL, SPLITS, Protocol, chosen_splits, prompt_list
from nd_jax.protocol.readings import Measured, ProtocolResult, SplitReadings, measure, stack
from nd_jax.system import VideoSystem

UNCONDITIONAL = "unconditional"
"""Empty prompts, no guidance."""
UNTRAINED_TEXT = "untrained text encoders"
"""The prompts, read by text encoders with fresh random weights."""
CONTROLS = (UNCONDITIONAL, UNTRAINED_TEXT)
SAMPLES = 4
"""Videos of each split that are kept for the report."""


class Videos(typing.Protocol):
    """What is judged: a system's videos and its codec's reconstructions."""

    frames: int
    """Of every video; at least 2."""

    def prepare(self, worlds: Sequence[World]) -> None:
        """Called first; raises UserError for a world that it makes no videos for."""

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """A line for each caption that is not read to its end."""

    def videos(
        self, captions: Sequence[str], world: World, seed: int, control: str | None
    ) -> Iterator[UInt8[np.ndarray, "t h w 3"]]:
        """One video per caption, or what ``control`` makes of it. Caption n and a seed fix the noise."""

    def reconstruct(self, clip: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t h w 3"]:
        """The clip through the codec."""


class SystemVideos:
    """A system's own: one ``Generator`` for each size, so that every program is compiled once for all splits."""

    def __init__(self, system: VideoSystem, *, batch: int = 16):
        self.system, self.batch = system, batch
        self.frames = min(system.video.frames, FRAMES)
        self.generators: dict[tuple[int, int], Generator] = {}
        self._through_codec = codec_pass(system.definitions[CODEC])

    def prepare(self, worlds: Sequence[World]) -> None:
        for world in worlds:
            size = (world.height, world.width)
            if size not in self.generators:
                self.generators[size] = Generator(self.system, height=size[0], width=size[1], frames=self.frames)

    def too_long(self, captions: Sequence[str]) -> list[str]:
        found = ([caption, *self.system.tokens([caption])[1]] for caption in captions)
        return [f"{caption!r}: {lost[0]}" for caption, *lost in found if lost]

    @functools.cached_property
    def _untrained(self) -> VideoSystem:
        """The same system with fresh text encoders."""
        system = self.system
        parts = tuple(name for name in TEXT_PARTS if name in system.params)
        fresh = jax.jit(lambda key: init_system(system.definitions, key, parts))(jax.random.key(0))
        return dataclasses.replace(system, params={**system.on_device, **fresh})

    def videos(
        self, captions: Sequence[str], world: World, seed: int, control: str | None
    ) -> Iterator[UInt8[np.ndarray, "t h w 3"]]:
        system, plan = self.system, self.system.sampling
        if control == UNCONDITIONAL:
            plan = dataclasses.replace(plan, first_guidance=0.0, later_guidance=0.0)
            captions = [""] * len(captions)
        elif control == UNTRAINED_TEXT:
            system = self._untrained
        generator, first = self.generators[world.height, world.width], self.first_latents(world)
        options = {"seed": seed, "plan": plan, "batch": self.batch, "generator": generator, "first_latents": first}
        for made in generate_batches(system, captions, **options):
            yield from made

    def first_latents(self, world: World) -> Callable[..., Array] | None:
        """First frames that are given, as ``generate_batches`` takes them; none here."""
        return None

    def reconstruct(self, clip: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t h w 3"]:
        return self._through_codec(self.system.on_device[CODEC], clip)


@functools.lru_cache(maxsize=32)
def measure_truth(protocol: Protocol, split: str, frames: int) -> Measured:
    """[n, ...] The drawn clips that show what a split's prompts ask for, read by the judge."""
    prompts, world = prompt_list(protocol, split), SPLITS[split].world
    return stack(measure(prompts.clip(n, frames), world) for n in range(protocol.prompts))


def clips_to_do(protocol: Protocol, splits: Sequence[str], controls: Sequence[str] = CONTROLS) -> int:
    """What ``run_protocol`` counts as its whole work: videos to generate and clips to reconstruct."""
    seeds = len(protocol.sampling_seeds)
    return protocol.prompts * (len(splits) * (seeds + 1) + len(controls) * seeds)


@dataclass
class _Work:
    """Makes and reads clips, and counts them."""

    videos: Videos
    protocol: Protocol
    total: int
    progress: Callable[[int, int], None]
    done: int = 0
    made: int = 0
    seconds: float = 0.0
    """Spent on making videos, not on reading them."""

    def read(self, clip: np.ndarray, world: World) -> Measured:
        found = measure(clip, world)
        self.done += 1
        self.progress(self.done, self.total)
        return found

    def generated(self, split: str, control: str | None = None) -> tuple[Measured, list[np.ndarray]]:
        """Readings [seeds, n, ...] and the first videos."""
        world, captions = SPLITS[split].world, prompt_list(self.protocol, split).captions
        seeds, samples = [], []
        for seed in self.protocol.sampling_seeds:
            clips, parts = self.videos.videos(captions, world, seed, control), []
            while (clip := self._next(clips)) is not None:
                parts.append(self.read(clip, world))
                if not seeds and len(samples) < SAMPLES:
                    samples.append(clip)
            seeds.append(stack(parts))
        return stack(seeds), samples

    def _next(self, clips: Iterator[np.ndarray]) -> np.ndarray | None:
        began = time.monotonic()
        clip = next(clips, None)
        self.seconds += time.monotonic() - began
        self.made += clip is not None
        return clip

    def reconstructed(self, split: str) -> Measured:
        """Readings [n, ...] of the drawn clips through the codec."""
        world, prompts = SPLITS[split].world, prompt_list(self.protocol, split)
        clips = (prompts.clip(n, self.videos.frames) for n in range(self.protocol.prompts))
        return stack(self.read(self.videos.reconstruct(clip), world) for clip in clips)


def run_protocol(
    system: VideoSystem,
    protocol: Protocol = FULL,
    *,
    splits: Sequence[str] | None = None,
    controls: Sequence[str] = CONTROLS,
    batch: int = 16,
    videos: Videos | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda line: None,
) -> ProtocolResult:
    """Everything the judge reads from one system under a protocol.

    Args:
        splits: some of ``SPLITS``; default: all that make sense for the protocol.
        controls: some of ``CONTROLS``, judged against the labels of ``CONTROL_SPLIT``.
        batch: prompts at a time.
        videos: what to judge, if not what the system makes.
        progress: receives (done, total) of ``clips_to_do``.
        warn: receives one line for every prompt that is too long for the text encoders.

    Raises:
        UserError: before anything is generated, for unknown splits and controls, a batch below 1, and a system whose
            videos do not move or do not fit the worlds.
    """
    splits, where = chosen_splits(protocol, splits), system.folder or "system"
    if set(controls) - set(CONTROLS) or batch < 1:
        raise UserError(
            f"protocol: controls {list(controls)}, batch {batch}; expected some of {', '.join(CONTROLS)}, at least 1"
        )
    videos = SystemVideos(system, batch=batch) if videos is None else videos
    if videos.frames < 2:
        raise UserError(f"{where}: videos of {videos.frames} frame, the protocol judges motion: expected at least 2")
    worlds = [SPLITS[name].world for name in (*splits, *([CONTROL_SPLIT] if controls else []))]
    videos.prepare(list(dict.fromkeys(worlds)))
    work = _Work(videos, protocol, clips_to_do(protocol, splits, controls), progress)
    found, samples = {}, {}
    for name in splits:
        lost = videos.too_long(prompt_list(protocol, name).captions)
        for line in lost:
            warn(line)
        made, samples[name] = work.generated(name)
        truth = measure_truth(protocol, name, videos.frames)
        found[name] = SplitReadings(made, truth, work.reconstructed(name), len(lost))
    without_prompts = {control: work.generated(CONTROL_SPLIT, control)[0] for control in controls}
    about = {
        "frames": videos.frames,
        "denoiser_parameters": count_parameters(system.params[DENOISER]),
        "seconds_per_video": work.seconds / work.made,
        "sampling": dataclasses.asdict(system.sampling),
    }
    return ProtocolResult(protocol, found, without_prompts, about, samples)
