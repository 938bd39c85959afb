"""Drawn datasets of the shapes worlds, and any dataset's folder, its captions and tokenizers."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np
import tensorflow_datasets as tfds

from nd_jax.checked_files import read_json
from nd_jax.data import shapes
from nd_jax.data.buckets import Size, size_name
from nd_jax.data.captions import caption, plain_caption
from nd_jax.data.tokenizers import train_tokenizers
from nd_jax.data.videos import bucket_of, check_record, open_split
from nd_jax.errors import UserError
from nd_jax.outputs import new_file
from nd_jax.recipes.preset import Preset
from nd_jax.system import TOKENIZERS

CAPTIONS_PER_CLIP = 8
RECORD = "dataset.json"


def prepare_data(preset: Preset, folder: str | Path, *, clips: int, seed: int = 0) -> Any:
    """Draw the preset's shapes dataset with TFDS (once; later calls find it). Returns the builder.

    ``folder/dataset.json`` remembers what was drawn, so that ``open_data`` needs the folder only.
    """
    if preset.world is None:
        raise UserError(f"preset {preset.name} has no shapes world; expected one that has, such as shapes_tiny")
    if clips < 1 or seed < 0:
        raise UserError(f"data: {clips} clips from seed {seed}; expected at least one clip and a seed of at least 0")
    record = {"world": preset.world, "clips": clips, "seed": seed}
    with tfds_quiet():
        builder = shapes.prepare(folder, **_settings(record))
    with new_file(Path(folder) / RECORD, overwrite=True) as part:
        part.write_text(json.dumps(record, indent=2))
    return builder


def open_data(
    folder: str | Path, *, split: str = "train", size: Size | None = None, prefer: Size | None = None
) -> Sequence[dict[str, Any]]:
    """A split of a prepared dataset by index: ``source[n]`` has video, caption, and labels if shapes were drawn.

    Of users' own clips it takes those of ``size`` (height, width), else of size ``prefer``, else of the only size.
    Drawn shapes have to be of size ``prefer``. Raises UserError naming the file that is missing or damaged.
    """
    record = read_record(folder)
    if "kind" in record:
        with tfds_quiet():
            return open_split(folder, record, bucket_of(record, size, prefer=prefer), split)
    if size is not None:
        raise UserError(f"{folder} holds drawn shapes, which have one size; leave --bucket out")
    with tfds_quiet():
        source = shapes.open_split(folder, split=split, **_settings(record))
    found = source.features["video"].shape[1:3]
    if prefer not in (None, found):
        raise UserError(
            f"{folder} holds shapes of {size_name(found)} (world {record['world']}), expected {size_name(prefer)}; "
            "draw the preset's own with nd-jax data prepare"
        )
    return source


def read_record(folder: str | Path) -> dict[str, Any]:
    """What a dataset's folder says of itself. Raises UserError for a folder without dataset."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise UserError(f"{folder} holds no dataset ({RECORD} is missing); make one with nd-jax data prepare or videos")
    record = read_json(path, what="dataset record")
    if "kind" in record:
        check_record(path, record)
        return record
    kinds = {"world": str, "clips": int, "seed": int}
    if record.keys() != kinds.keys() or any(type(record[name]) is not kind for name, kind in kinds.items()):
        raise UserError(f"{path} is damaged; expected world, clips and seed; make the dataset again")
    return record


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    clips = record["clips"]
    return {"world": record["world"], "seed": record["seed"], "train": clips, "evaluate": min(256, clips)}


@contextlib.contextmanager
def tfds_quiet() -> Iterator[None]:
    """TFDS tells of its work on three channels at once; what goes wrong comes as exceptions all the same."""
    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        absl.logging.set_verbosity(level)


def prepare_tokenizers(preset: Preset, captions: Sequence[str], folder: str | Path) -> dict[str, Path]:
    """Train the three tokenizers of a shapes system on captions; folder names are the official ones."""
    folder, video = Path(folder), preset.video
    sizes = {"t5_vocab": preset.tokenizer_vocabulary, "clip_vocab": 2 * preset.tokenizer_vocabulary}
    train_tokenizers(folder, captions, t5_length=video.text_length, clip_length=video.clip_length, **sizes)
    return {name: folder / name for name in TOKENIZERS.values()}


def shapes_captions(
    clips: Any, *, per_clip: int = CAPTIONS_PER_CLIP, seed: int = 0, plain: bool = False
) -> list[list[str]]:
    """Several captions for every clip of a shapes source: other templates, other synonyms. Or the one plain caption."""
    if plain:
        return [[plain_caption(clips[n]["labels"])] for n in range(len(clips))]
    rng = np.random.Generator(np.random.Philox(seed))
    labels = (clips[n]["labels"] for n in range(len(clips)))
    return [[caption(each, rng) for _ in range(per_clip)] for each in labels]
