"""The shapes dataset: prepare it once in a folder, then read its splits by index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from nd_jax.data.checked_records import CheckedSource, checked_source, dataset_folder, new_builder, open_builder
from nd_jax.data.shapes.shapes_dataset_builder import EVALUATE, TRAIN, Builder, ShapesConfig, config_for
from nd_jax.data.world import ATTRIBUTES
from nd_jax.errors import UserError

__all__ = ["EVALUATE", "TRAIN", "Builder", "ShapesConfig", "config_for", "open_split", "prepare"]


def prepare(
    data_dir: str | Path, world: str = "64x64", *, seed: int = 0, train: int = TRAIN, evaluate: int = EVALUATE
) -> tfds.core.DatasetBuilder:
    """Draw the dataset into ``data_dir`` unless it is there already (about 15 seconds for the default).

    Returns the builder; ``open_split`` reads it. An interrupted run leaves nothing under the final name.
    Raises UserError for an unknown world, and for what is there already if it is damaged.
    """
    config = config_for(world, seed=seed, train=train, evaluate=evaluate)
    if dataset_folder(Builder, data_dir, config).exists():
        return open_builder(Builder, data_dir, config)
    builder = new_builder(Builder, data_dir, config)
    builder.download_and_prepare()
    return builder


def open_split(
    data_dir: str | Path,
    world: str = "64x64",
    split: str = "train",
    *,
    seed: int = 0,
    train: int = TRAIN,
    evaluate: int = EVALUATE,
) -> CheckedSource:
    """A split of a dataset that ``prepare`` has drawn with the same settings, once it was found whole.

    ``source[i]`` is a dict with ``video`` uint8 [T, H, W, 3], ``caption`` bytes, ``labels`` int32 [objects, 5] and
    ``index``. Raises UserError naming what is missing or damaged.
    """
    config = config_for(world, seed=seed, train=train, evaluate=evaluate)
    source = checked_source(open_builder(Builder, data_dir, config), split, examine=check_labels)
    count = train if split == "train" else evaluate
    if len(source) != count:
        raise UserError(f"data: {data_dir} holds {len(source)} {split} clips, expected {count}; prepare it again")
    return source


def check_labels(example: dict[str, Any]) -> None:
    """Raises UserError for a label that names no value of its attribute."""
    labels = example["labels"]
    if np.any(labels < 0) or np.any(labels >= [len(values) for values in ATTRIBUTES.values()]):
        raise UserError(f"labels {labels.tolist()}, expected the numbers of {', '.join(ATTRIBUTES)}")
