"""Users' own clips on their way to a trained system: a folder becomes a dataset, its captions and sizes are used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.converters.component import load_component
from nd_jax.data.buckets import Size
from nd_jax.data.captions_file import write_skipped
from nd_jax.data.shard_sources import open_latents
from nd_jax.data.tokenizers import load_tokenizers
from nd_jax.data.video_folder import FolderOptions, Survey, survey
from nd_jax.data.videos import changed, prepare
from nd_jax.datasets import RECORD, open_data, prepare_tokenizers, read_record, tfds_quiet
from nd_jax.errors import UserError
from nd_jax.evaluate import Reconstruction, reconstruct
from nd_jax.generate import check_size
from nd_jax.outputs import new_file
from nd_jax.recipes.preset import Preset

Progress = Callable[[str, int, int], None]
"""Takes what is being done, how many clips are done, and of how many."""


def check_sizes(preset: Preset, options: FolderOptions) -> None:
    """Raises UserError for sizes and lengths that the preset's networks cannot take, naming the nearest legal ones."""
    system = preset.system
    patch, stages = system.diffusion_transformer.patch_size, preset.schedule.stages
    for height, width in options.sizes:
        check_size(height, width, options.frames, system.causal_video_vae, patch, stages)


def prepare_folder(
    preset: Preset,
    folder: str | Path,
    out: str | Path,
    options: FolderOptions,
    *,
    captions: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Survey:
    """Turn a folder of clips into the dataset ``out`` with ``dataset.json``, ``skipped.jsonl`` and ``tokenizers/``.

    ``open_data`` reads it. The tokenizers are trained on the captions of the training clips. What was skipped, and why,
    is in ``skipped.jsonl`` and in the survey that is returned. Raises UserError when nothing remains.
    """
    out = Path(out)
    check_sizes(preset, options)
    found = survey(folder, options, captions=captions, progress=lambda *n: progress("looking through clips", *n))
    texts = [text for clip in found.clips if clip.split == "train" for text in clip.captions]
    try:
        prepare_tokenizers(preset, texts, out / "tokenizers")
    except UserError as error:
        count, known = len(set().union(*texts)), preset.tokenizer_vocabulary
        raise UserError(
            f"{folder}: no tokenizer of {known} pieces for {len(texts)} captions of {count} different characters; use "
            f"a preset with a larger tokenizer_vocabulary ({error})"
        ) from error
    with tfds_quiet():
        record = prepare(found, out, progress=lambda *n: progress("resizing clips", *n))
    write_skipped(out, found.skipped)
    with new_file(out / RECORD, overwrite=True) as part:
        part.write_text(json.dumps(record, indent=2), encoding="utf-8")
    return found


def cut_captions(data: str | Path, captions: Sequence[str], most: int = 2000) -> int:
    """How many of the first ``most`` captions are longer than the dataset's T5 tokenizer takes."""
    reader = load_tokenizers(Path(data) / "tokenizers")["tokenizer_3"]
    return len(reader(list(captions[:most])).warnings)


def folder_captions(clips: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The captions of every window of a source of users' clips.

    All lists are as long as the longest (shorter ones are repeated), so that every clip is trained on equally often.
    """
    texts = [[text.decode() for text in clips[n]["captions"]] for n in range(len(clips))]
    longest = max(map(len, texts))
    return [[own[k % len(own)] for k in range(longest)] for own in texts]


def is_own_clips(data: str | Path) -> bool:
    """Whether a folder holds a dataset of users' own clips."""
    return (Path(data) / RECORD).is_file() and "kind" in read_record(data)


def has_changed(data: str | Path) -> bool:
    """Whether the clips that a dataset was made from are still there and look different now."""
    return changed(read_record(data))


def encode_batch(clips: Sequence[dict[str, Any]], most: int = 16) -> int:
    """How many clips to encode at once: ``most``, or fewer of large or long ones, which would not fit into memory."""
    return max(1, min(most, (1 << 23) // clips[0]["video"][..., 0].size))


def sized(preset: Preset, latents: str | Path) -> Preset:
    """The preset for videos of the size and length of a latents folder's."""
    codec = preset.system.causal_video_vae
    units, height, width = open_latents(latents).latents.shape[1:4]
    video = dataclasses.replace(
        preset.video,
        frames=1 + (units - 1) * codec.time_scale,
        height=height * codec.space_scale,
        width=width * codec.space_scale,
    )
    return dataclasses.replace(preset, video=video)


@dataclass(frozen=True)
class FolderReconstruction:
    """A codec on held-out clips: each window's name and PSNR in dB, and the figures over all of them."""

    names: list[str]
    psnr: list[float]
    whole: Reconstruction


def codec_on_folder(
    codec: str | Path, data: str | Path, *, size: Size | None = None, split: str = "heldout", most: int = 32
) -> FolderReconstruction:
    """Encode and decode up to ``most`` windows of a split that the codec was not trained on, and compare.

    Raises UserError for a dataset without such clips.
    """
    config, params = load_component(codec, "video_vae", dtype="fp32")
    source = open_data(data, split=split, size=size)
    records = [source[n] for n in range(min(most, len(source)))]
    records.sort(key=lambda record: (record["file"], record["start"]))
    clips = np.stack([record["video"] for record in records])
    whole = reconstruct(config, params, clips)
    errors = [np.mean(np.square(a.astype(float) - b)) for a, b in zip(clips, whole.videos, strict=True)]
    psnr = [float(10 * np.log10(255**2 / max(error, 1e-10))) for error in errors]
    names = [f"{record['file'].decode()} at {record['start']:.2f} s" for record in records]
    return FolderReconstruction(names, psnr, whole)
