"""A prepared dataset of a few clips in several files, to be copied and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from nd_jax.data.checked_records import CheckedSource, new_builder
from nd_jax.data.shapes import Builder, config_for, open_split
from nd_jax.datasets import open_data
from nd_jax.errors import UserError

RECORD = {"world": "64x64", "clips": 12, "seed": 3}
SETTINGS = {"seed": 3, "train": 12, "evaluate": 12}
SHARD = "shapes-train.array_record-00001-of-00003"


def write_dataset(folder: Path) -> Path:
    """Four splits of twelve clips, three files each, and dataset.json, as ``nd-jax data prepare`` writes them."""
    builder = new_builder(Builder, folder, config_for("64x64", **SETTINGS))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    (folder / "dataset.json").write_text(json.dumps(RECORD))
    return folder


def inner(data: Path) -> Path:
    """Where the files are."""
    return next(data.rglob("*.array_record-*")).parent


def train_split(data: Path) -> CheckedSource:
    return open_split(data, "64x64", "train", **SETTINGS)


def refused(data: Path) -> str:
    """What is said about a dataset, in one line, when it is opened for training."""
    with pytest.raises(UserError) as caught:
        open_data(data)
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 800
    assert "again" in told, "what to do is not told"
    return told
