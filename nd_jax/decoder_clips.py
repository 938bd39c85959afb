"""The clips of a decoder's distillation: those it is trained on, and those it is measured on, which it never sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.data.buckets import Size
from nd_jax.data.clips import read_video
from nd_jax.data.mixture import Mixture
from nd_jax.data.videos import bucket_of
from nd_jax.data.windows import ClipSource, WindowSource
from nd_jax.datasets import open_data, read_record
from nd_jax.errors import UserError
from nd_jax.models.codec_config import CodecConfig
from nd_jax.recipes.preset import DecoderRun, Preset

SHARES = (3, 1)
"""Of clips of a dataset and of windows of video files, where there are both."""
MEASURED = 16
"""Clips of a dataset's held-out split that decoders are compared on."""


def training_source(
    run: DecoderRun,
    teacher: CodecConfig,
    size: tuple[int, int],
    *,
    clips: Any = None,
    videos: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
    shares: tuple[int, int] = SHARES,
) -> Any:
    """Windows of a dataset, of video files, or of both; files named in ``held_out`` are left out of ``videos``.

    Files are cut to the dataset's size, or to ``size`` without one. Raises UserError when nothing remains.
    """
    frames, parts = run.recipe.frames, []
    if clips is not None:
        parts.append(WindowSource(clips, frames, teacher.time_scale))
        size = (parts[0].height, parts[0].width)
    banned = {Path(path).resolve() for path in held_out}
    used = [path for path in videos if Path(path).resolve() not in banned]
    if videos and not used:
        raise UserError("decoder: every video file is held out; expected at least one to train on")
    if used:
        parts.append(ClipSource(used, height=size[0], width=size[1], frames=frames, seed=run.loop.seed))
    if not parts:
        raise UserError("decoder: no clips to train on; expected a dataset, video files, or both")
    return parts[0] if len(parts) == 1 else Mixture(parts, shares)


def held_out_clips(
    preset: Preset,
    *,
    data: str | Path | None = None,
    size: Size | None = None,
    videos: Sequence[Path] = (),
    most: int = MEASURED,
) -> dict[str, np.ndarray]:
    """Clips that no decoder was trained on, uint8 [n, t, h, w, 3] by name: the first ``most`` of a dataset's held-out
    split (none if it is empty), and the beginning of every file of ``videos`` at the preset's size and length.

    Raises UserError for a file that is too short for two latent frames.
    """
    usual, found = (preset.video.height, preset.video.width), {}
    record = None if data is None else read_record(data)
    own = record is not None and "kind" in record
    if record is not None and not (own and not bucket_of(record, size, prefer=usual)["windows"]["heldout"]):
        source = open_data(data, split="heldout" if own else "heldout_combinations", size=size, prefer=usual)
        chosen = [source[index]["video"] for index in range(min(most, len(source)))]
        found[f"{Path(data).name}, held out"] = np.stack(chosen)
    scale = preset.system.causal_video_vae.time_scale
    for path in map(Path, videos):
        video = read_video(path, size=usual)
        length = 1 + (min(len(video), preset.video.frames) - 1) // scale * scale
        if length < 1 + scale:
            raise UserError(f"video: {path} has {len(video)} frames, expected at least {1 + scale} to measure")
        found[path.name] = video[None, :length]
    return found
