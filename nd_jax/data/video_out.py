"""Video files out: mp4 that browsers play, contact sheets, and file names made from prompts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageDraw

from nd_jax.errors import UserError
from nd_jax.outputs import new_file
from nd_jax.pixels import to_uint8

# First one present wins. All but the last are H.264, which every browser plays; the last plays in desktop players.
ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox", "mpeg4")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{k}" for port in ("com", "lpt") for k in range(1, 10))}


def write_video(
    path: str | Path,
    video: Shaped[np.ndarray, "t h w 3"],
    *,
    fps: float = 24,
    enlarge: int = 1,
    overwrite: bool = False,
) -> Path:
    """Write [T, H, W, 3] (uint8, or floats in [-1, 1]) as H.264 yuv420p mp4, the same bytes for the same frames.

    ``enlarge`` repeats pixels, for tiny videos on large screens. Odd sides get their last row or column repeated,
    because 4:2:0 needs even ones. Raises UserError for other shapes, and for an existing file without ``overwrite``.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UserError(f"video: {path} ends in {path.suffix!r}, expected .mp4")
    pixels = to_uint8(video)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise UserError(f"video: an array of shape {pixels.shape}, expected [frames, height, width, 3]")
    if enlarge > 1:
        pixels = pixels.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    with open_video(path, *pixels.shape[1:3], fps=fps, overwrite=overwrite) as add:
        add(pixels)
    return path


@contextmanager
def open_video(
    path: str | Path, height: int, width: int, *, fps: float = 24, overwrite: bool = False
) -> Iterator[Callable[[UInt8[np.ndarray, "t h w 3"]], None]]:
    """A file that takes frames as they come: yields the function that appends some, [T, H, W, 3] with even sides.

    The same encoding as ``write_video``'s. The file appears under its name when the block ends, or not at all. Raises
    UserError for an existing file without ``overwrite``.
    """
    encoder = next((name for name in ENCODERS if name in av.codecs_available), None)
    if encoder is None:
        raise UserError(f"video: PyAV has none of the encoders {', '.join(ENCODERS)}: reinstall the av package")
    # mbtree off: its AVX-512 code reads uninitialised memory in pictures a few macroblocks wide, and one clip gave
    # different files
    x264 = {"crf": "16", "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
    options = x264 if encoder == "libx264" else {"b": "4000000"}
    with (
        new_file(path, overwrite=overwrite) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # say BT.709 and mean it: without the tags a player guesses the matrix from the frame size and shifts colours
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1

        def add(pixels: UInt8[np.ndarray, "t h w 3"]) -> None:
            if pixels.shape[1:] != (height, width, 3):
                raise UserError(f"video: frames of {pixels.shape[1:]} for a file of {height}x{width}")
            for pixel_frame in pixels:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixel_frame), format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", src_color_range=2, dst_color_range=1)
                container.mux(stream.encode(frame))

        yield add
        container.mux(stream.encode())


def contact_sheet(
    path: str | Path,
    videos: Sequence[Shaped[np.ndarray, "t h w 3"]],
    *,
    captions: Sequence[str] | None = None,
    columns: int = 6,
    enlarge: int = 1,
    overwrite: bool = False,
) -> Path:
    """A PNG with one row per video: ``columns`` frames evenly spread from first to last, the caption above them."""
    if not videos or (captions is not None and len(captions) != len(videos)):
        raise UserError(
            f"contact sheet: {len(videos)} videos, {len(captions or [])} captions, expected as many, not none"
        )
    rows = []
    for place, video in enumerate(videos):
        pixels = to_uint8(video)
        chosen = np.linspace(0, len(pixels) - 1, min(columns, len(pixels))).round().astype(int)
        strip = np.concatenate([np.pad(pixels[k], ((2, 2), (2, 2), (0, 0))) for k in chosen], axis=1)
        strip = strip.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
        if captions is not None:
            rows.append(_text_row(captions[place], strip.shape[1]))
        rows.append(strip)
    width = max(row.shape[1] for row in rows)
    sheet = np.concatenate([np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows])
    with new_file(path, overwrite=overwrite) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
    return Path(path)


def _text_row(text: str, width: int) -> UInt8[np.ndarray, "16 width 3"]:
    canvas = Image.new("RGB", (width, 16))
    pen = ImageDraw.Draw(canvas)
    line = " ".join(text.split())
    while line and pen.textlength(line) > width - 6:
        line = line[:-4].rstrip() + "…" if len(line) > 4 else ""
    pen.text((3, 2), line, fill=(255, 255, 255))
    return np.asarray(canvas)


def file_name(prompt: str, *, index: int | None = None, limit: int = 60) -> str:
    """A harmless file name (without suffix) from any prompt: lower-case ASCII letters, digits and single dashes."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:limit].strip("-") or "video"
    if name in _RESERVED:
        name = f"video-{name}"
    return name if index is None else f"{index:03d}-{name}"
