"""Short windows of longer clips, by index: what a causal codec trains on."""

from __future__ import annotations

from typing import Any

from nd_jax.errors import UserError


class WindowSource:
    """Every window of ``frames`` frames, ``stride`` apart, of every clip of a source of ``{"video": [T, H, W, 3]}``.

    Window ``i`` comes from clip ``i % len(clips)``. Raises UserError when the clips are shorter than a window.
    """

    def __init__(self, clips: Any, frames: int, stride: int = 8):
        self.clips, self.frames, self.stride = clips, frames, stride
        length = len(clips[0]["video"])
        if length < frames:
            raise UserError(f"clips have {length} frames, expected at least {frames} for one window")
        self.places = (length - frames) // stride + 1

    def __len__(self) -> int:
        return len(self.clips) * self.places

    def __getitem__(self, index: int) -> dict[str, Any]:
        place, clip = divmod(int(index), len(self.clips))
        start = place * self.stride
        return {"video": self.clips[clip]["video"][start : start + self.frames]}
