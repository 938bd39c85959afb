"""Small video files for tests: any rate, also a varying one, any pixel shape."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def ramp(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that tell their index: grey 20, 24, 28, ..."""
    grey = (20 + 4 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (count, height, width, 3))


def write_clip(
    path: Path,
    pixels: np.ndarray,
    *,
    times: Sequence[float] | None = None,
    fps: int = 24,
    ratio: Fraction | None = None,
) -> Path:
    """An mp4 whose frames are shown at ``times`` seconds (default: ``fps`` a second); ``ratio`` is a pixel's shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "8", "preset": "veryfast", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 12_000)
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        for index, frame_pixels in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_pixels), format="rgb24")
            seconds = index / fps if times is None else times[index]
            frame.pts, frame.time_base = round(seconds * 12_000), Fraction(1, 12_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(video: np.ndarray) -> list[int]:
    """The indices that the frames of a ``ramp`` tell."""
    return [round((float(frame.mean()) - 20) / 4) for frame in video]
