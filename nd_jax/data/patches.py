"""Small pictures out of real clips, for super-resolution: from native pixels to whole frames scaled down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nd_jax.data.clips import Limits, read_video
from nd_jax.errors import UserError


class PatchSource:
    """Random access to ``{"image": uint8 [size, size, 3]}``, for `nd_jax.data.pipeline.batches`.

    Patch ``i`` is a random box of a random frame of one of the files, taken in turn, brought to ``size`` pixels (by
    Lanczos, with antialiasing) and perhaps mirrored; it depends on the files, the seed and ``i`` only. Boxes have from
    1 to ``most`` times the patch's size, evenly in the logarithm: native pixels of videos are soft, those of reduced
    ones sharp, and a network has to know both. Raises UserError for files smaller than a patch, and whatever
    `read_video` raises.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        size: int,
        count: int = 1 << 20,
        seed: int = 0,
        most: float = 4.0,
        every: int = 2,
        limits: Limits | None = None,
    ):
        self.size, self.count, self.seed, self.most = size, count, seed, most
        self.clips = [np.ascontiguousarray(read_video(path, limits=limits)[::every]) for path in paths]
        if not self.clips:
            raise UserError("upscaler: no video files to train on; expected at least one")
        for path, clip in zip(paths, self.clips, strict=True):
            if min(clip.shape[1:3]) < size:
                raise UserError(f"video: {path} is {clip.shape[1]}x{clip.shape[2]}, expected at least {size} a side")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(f"patches: index {index} of {self.count}")
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, index])))
        clip = self.clips[index % len(self.clips)]
        frame = clip[int(rng.integers(len(clip)))]
        high, wide = frame.shape[:2]
        largest = min(high / self.size, wide / self.size, self.most)
        side = min(round(self.size * largest ** float(rng.random())), high, wide)
        top, left = int(rng.integers(high - side + 1)), int(rng.integers(wide - side + 1))
        box = frame[top : top + side, left : left + side]
        if side != self.size:
            box = np.asarray(Image.fromarray(box).resize((self.size, self.size), Image.Resampling.LANCZOS))
        return {"image": box[:, ::-1] if rng.random() < 0.5 else box}
