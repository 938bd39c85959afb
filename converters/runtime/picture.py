"""The first frame: latent-consistency steps of an image network, decoded and brought to the video's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import BundleError
from .noise import draw
from .sessions import Arrays, Sessions
from .text import run_tower
from .tokens import Tokenizer
from .video import fit, round_to_uint8

MOST_STEPS = 1000
STEP = ("signal", "noise", "skip", "out")


class PictureMaker:
    """What a manifest's ``picture`` says, ready to run. Raises BundleError for a section that makes no sense."""

    def __init__(self, sessions: Sessions, section: Mapping[str, Any], size: tuple[int, int]):
        self.sessions, self.size = sessions, size
        try:
            self.towers = [(entry, Tokenizer(sessions.bundle, entry)) for entry in section["text"]]
            self.unet, self.decoder = str(section["unet"]), str(section["decoder"])
            self.latent, self.scale = tuple(map(int, section["latent"])), np.float32(section["scale"])
            tables = [sessions.bundle.table(section[key]) for key in ("times", "sizes")]
            self.times, self.sizes = (np.asarray(table, np.float32) for table in tables)
            guidance = section["guidance"]
            self.guidance = None if guidance is None else np.asarray(sessions.bundle.table(guidance), np.float32)
            self.steps = [_step(each) for each in section["steps"]]
            fits = len(self.steps) == len(self.times) <= MOST_STEPS and len(self.latent) == 3
            whole = [step[-1] is None for step in self.steps] == [False] * (len(self.steps) - 1) + [True]
            good = len(self.towers) == 2 and fits and whole and self.scale > 0
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{sessions.bundle.folder}: the manifest's 'picture' does not read ({error!r})") from None
        if not good:
            raise BundleError(
                f"{sessions.bundle.folder}: the manifest's 'picture' makes no sense; expected two text towers, a "
                "latent of three sizes, and steps of which the last alone ends the walk"
            )

    def text(self, prompt: str, seen: Mapping[str, Arrays]) -> tuple[np.ndarray, np.ndarray]:
        """States [S, D] of both towers side by side, without a mask, and the second one's pooled state [1, P].
        ``seen``: what towers that the video's text needs as well have said of this prompt, by graph."""
        with self.sessions.step("picture_text"):
            found = [
                seen[entry["graph"]] if entry["graph"] in seen else run_tower(self.sessions, entry, tokenizer, prompt)
                for entry, tokenizer in self.towers
            ]
        return np.concatenate([each["penultimate"] for each in found], axis=1), found[-1]["text_embeds"]

    def sample(self, text: tuple[np.ndarray, np.ndarray], seed: int, sample_name: int | str) -> np.ndarray:
        """Clean latent [h, w, C] from noise named ``SAMPLE/picture/STEP``."""
        states, pooled = text
        inputs = {"text": states, "added": np.concatenate([pooled, self.sizes], axis=1)}
        if self.guidance is not None:
            inputs["guidance"] = self.guidance
        noise = [draw(seed, f"{sample_name}/picture/{k}", (1, *self.latent)) for k in range(len(self.steps))]
        x = noise[0]
        with self.sessions.step("picture"):
            for index, ((signal, level, skip, out), following) in enumerate(self.steps):
                time = self.times[index : index + 1]
                predicted = self.sessions.run(self.unet, {"sample": x, "time": time, **inputs})["noise"]
                x = out * ((x - level * predicted) / signal) + skip * x
                if following is not None:
                    x = following[0] * x + following[1] * noise[1 + index]
        return x[0]

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] of the video's size."""
        with self.sessions.step("picture_decode"):
            image = self.sessions.run(self.decoder, {"latent": (latent / self.scale)[None]})["image"]
        return fit(round_to_uint8(image)[0], *self.size)


def _step(entry: Mapping[str, Any]) -> tuple[tuple[np.float32, ...], tuple[np.float32, np.float32] | None]:
    numbers = tuple(np.float32(entry[key]) for key in STEP)
    following = None if entry["next"] is None else tuple(np.float32(each) for each in entry["next"])
    if following is not None and len(following) != 2:
        raise ValueError("a step's 'next' is not two numbers")
    if not np.isfinite([*numbers, *(following or ())]).all() or not numbers[0] > 0:
        raise ValueError("a step's numbers are not finite, or its signal is not positive")
    return numbers, following
