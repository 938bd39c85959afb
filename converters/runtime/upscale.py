"""Super-resolution of decoded frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import BundleError
from .sessions import Sessions
from .video import round_to_uint8

MOST_MARGIN, MOST_FACTOR = 64, 8


class Upscaler:
    """``upscaler(frame)`` for a decoded frame. Raises BundleError for a manifest's section that makes no sense."""

    def __init__(self, sessions: Sessions, section: Mapping[str, Any]):
        self.sessions = sessions
        try:
            self.graph, self.margin, self.factor = str(section["graph"]), section["margin"], float(section["factor"])
            good = type(self.margin) is int and 1 <= self.margin <= MOST_MARGIN and 1 < self.factor <= MOST_FACTOR
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise BundleError(
                f"{sessions.bundle.folder}: the manifest's 'upscaler' makes no sense; expected a graph, a margin from "
                f"1 to {MOST_MARGIN} and a factor up to {MOST_FACTOR}"
            )

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """[H, W, 3] in [-1, 1] to uint8 [sH, sW, 3]. Edges are repeated outwards: the graph takes what is outside for
        black."""
        half, sides = np.float32(0.5), ((self.margin, self.margin),) * 2
        image = np.clip(frame / np.float32(2) + half, 0, 1)
        large = self.sessions.run(self.graph, {"image": np.pad(image, (*sides, (0, 0)), mode="edge")[None]})["larger"]
        cut = round(self.margin * self.factor)
        return round_to_uint8(large[0, cut:-cut, cut:-cut] * np.float32(2) - np.float32(1))
