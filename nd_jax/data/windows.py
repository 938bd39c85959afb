"""Short windows of longer clips, by index: what a causal codec trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nd_jax.data.clips import Limits, check_window, read_video
from nd_jax.errors import UserError


class WindowSource:
    """Every window of ``frames`` frames, ``stride`` apart, of every clip of a source of ``{"video": [T, H, W, 3]}``.

    Window ``i`` comes from clip ``i % len(clips)``. Raises UserError when the clips are shorter than a window.
    """

    def __init__(self, clips: Any, frames: int, stride: int = 8):
        self.clips, self.frames, self.stride = clips, frames, stride
        length, self.height, self.width = clips[0]["video"].shape[:3]
        if length < frames:
            raise UserError(f"clips have {length} frames, expected at least {frames} for one window")
        self.places = (length - frames) // stride + 1

    def __len__(self) -> int:
        return len(self.clips) * self.places

    def __getitem__(self, index: int) -> dict[str, Any]:
        place, clip = divmod(int(index), len(self.clips))
        start = place * self.stride
        return {"video": self.clips[clip]["video"][start : start + self.frames]}


class ClipSource:
    """Random access to windows of real video, for `nd_jax.data.pipeline.batches`: ``{"video": uint8 [T, H, W, 3]}``.

    Window ``i`` is a random stretch of time and a random box of the wanted aspect ratio from one of the files, taken
    in turn; it depends on the files, the seed and ``i`` only. ``span`` limits the share of each file's frames that is
    used, so that (0, 0.7) and (0.7, 1) never share a frame. Files too short for a window are left out.
    Raises UserError when none is left, and whatever `read_video` raises.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        height: int,
        width: int,
        frames: int = 33,
        count: int = 1024,
        seed: int = 0,
        span: tuple[float, float] = (0.0, 1.0),
        limits: Limits | None = None,
    ):
        check_window(frames)
        self.height, self.width, self.frames, self.count, self.seed = height, width, frames, count, seed
        self.clips = []
        for path in paths:
            video = read_video(path, shorter_side=2 * max(height, width), limits=limits)
            first, last = (round(len(video) * share) for share in span)
            if last - first >= frames:
                self.clips.append(np.ascontiguousarray(video[first:last]))
        if not self.clips:
            names = ", ".join(Path(path).name for path in paths) or "no files"
            raise UserError(f"video: {names}: none has {frames} frames between {span[0]:.0%} and {span[1]:.0%}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(f"clips: index {index} of {self.count} windows")
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, index])))
        clip = self.clips[index % len(self.clips)]
        start = int(rng.integers(len(clip) - self.frames + 1))
        _, high, wide = clip.shape[:3]
        most = min(high / self.height, wide / self.width)  # the largest box, in units of the wanted size
        scale = min(most, 1.0) + (most - min(most, 1.0)) * float(rng.random())
        box_h, box_w = self.height * scale, self.width * scale
        top, left = (high - box_h) * float(rng.random()), (wide - box_w) * float(rng.random())
        box = (left, top, left + box_w, top + box_h)
        frames = [
            Image.fromarray(frame).resize((self.width, self.height), Image.Resampling.LANCZOS, box=box)
            for frame in clip[start : start + self.frames]
        ]
        return {"video": np.stack([np.asarray(frame) for frame in frames])}
