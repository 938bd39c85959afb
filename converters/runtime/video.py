"""Frames in and out: images of any mode, mp4 files that browsers play."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from .errors import BundleError

ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox", "mpeg4")
MOST_PIXELS = 1 << 26


def to_uint8(video: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0 .. 255, clipped and truncated, as the reference does it. Raises BundleError for NaN and infinity."""
    if not np.isfinite(video).all():
        raise BundleError("the decoder's pixels are not finite")
    scaled = video.astype(np.float32) * np.float32(127.5) + np.float32(127.5)
    return np.clip(scaled, 0, 255).astype(np.uint8)


def round_to_uint8(image: np.ndarray) -> np.ndarray:
    """[-1, 1] to 0 .. 255, clipped and rounded: how image networks make pictures. Raises BundleError as above."""
    if not np.isfinite(image).all():
        raise BundleError("a picture's pixels are not finite")
    half = np.float32(0.5)
    return np.rint(np.clip(image * half + half, 0, 1) * np.float32(255)).astype(np.uint8)


def fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8 [H, W, 3] resized to another size (Lanczos)."""
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """0 .. 255 to [-1, 1], float32."""
    return np.asarray(pixels, np.float32) / np.float32(127.5) - np.float32(1)


def read_image(path: Path, height: int, width: int) -> np.ndarray:
    """An image as uint8 [height, width, 3]: upright, transparent parts over black, cut to the shape, Lanczos."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BundleError(f"image {path} has more than {MOST_PIXELS} pixels; scale it down first")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: convert() would clip, not scale
                values = np.asarray(image, np.float64)
                top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
                image = Image.fromarray(np.clip(values * (255 / top), 0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            image = image.convert("RGB")
            return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    except BundleError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BundleError(f"image {path} does not decode ({error})") from None


def write_video(path: Path, frames: np.ndarray, fps: float, *, overwrite: bool = False) -> Path:
    """Write uint8 [T, H, W, 3] as H.264 yuv420p mp4, whole or not at all. Raises BundleError if the file exists."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise BundleError(f"video {path} ends in {path.suffix!r}; expected .mp4")
    if os.path.lexists(path) and not overwrite:
        raise BundleError(f"{path} exists; use --overwrite to replace it")
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    encoder = next((name for name in ENCODERS if name in av.codecs_available), None)
    if encoder is None:
        raise BundleError(f"PyAV has none of the encoders {', '.join(ENCODERS)}; reinstall the av package")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial-{os.getpid()}.mp4")
    try:
        _encode(temporary, frames, fps, encoder)
        temporary.replace(path)
    except OSError as error:
        raise BundleError(f"writing {path} failed ({error}); nothing was left behind") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _encode(path: Path, frames: np.ndarray, fps: float, encoder: str) -> None:
    # mbtree off: its AVX-512 code reads uninitialised memory in pictures a few macroblocks wide
    x264 = {"crf": "16", "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
    options = x264 if encoder == "libx264" else {"b": "4000000"}
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        # BT.709, said and meant: without the tags a player guesses the matrix from the size of the frames
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", src_color_range=2, dst_color_range=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
