"""Ground truth passed off as what a system makes, for tests of the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import tiny_system

from nd_jax.data.world import World
from nd_jax.protocol.definition import SPLITS, Protocol, prompt_list
from nd_jax.system import VideoSystem

FRAMES = 33


class Drawn:
    """The drawn clips of each prompt; for controls those of the prompts in another order.

    ``change(clip, n, seed)`` turns the clip of prompt n into what is judged; ``codec(clip)`` is the reconstruction.
    ``calls`` remembers (number of captions, world, seed, control).
    """

    frames = FRAMES

    def __init__(self, protocol: Protocol, change=lambda clip, n, seed: clip, codec=lambda clip: clip):
        self.lists = {name: prompt_list(protocol, name) for name in SPLITS}
        self.change, self.reconstruct, self.calls, self.worlds = change, codec, [], None

    def prepare(self, worlds: Sequence[World]) -> None:
        self.worlds = list(worlds)

    def too_long(self, captions: Sequence[str]) -> list[str]:
        return [f"{captions[0]!r}: too long"]

    def videos(self, captions: Sequence[str], world: World, seed: int, control: str | None) -> Iterator[np.ndarray]:
        self.calls.append((len(captions), world, seed, control))
        here = (each for name, each in self.lists.items() if SPLITS[name].world == world)
        (prompts,) = (each for each in here if each.captions == tuple(captions))
        order = np.arange(len(captions))
        if control is not None:
            order = np.random.Generator(np.random.Philox([seed, len(control)])).permutation(order)
        for n in order.tolist():
            yield self.change(prompts.clip(n, self.frames), n, seed)


def system() -> VideoSystem:
    """One that is never run: the parameters' sizes and the sampling plan are all that is asked of it."""
    return VideoSystem(tiny_system.CONFIG, tiny_system.random_system_params(), {}, tiny_system.VIDEO, tiny_system.PLAN)
