"""The shapes dataset: prepare it once in a folder, then read its splits by index."""

from __future__ import annotations

from pathlib import Path

import tensorflow_datasets as tfds

from nd_jax.data.shapes.shapes_dataset_builder import EVALUATE, TRAIN, Builder, ShapesConfig, config_for

__all__ = ["EVALUATE", "TRAIN", "Builder", "ShapesConfig", "config_for", "prepare"]


def prepare(
    data_dir: str | Path, world: str = "64x64", *, seed: int = 0, train: int = TRAIN, evaluate: int = EVALUATE
) -> tfds.core.DatasetBuilder:
    """Draw the dataset into ``data_dir`` unless it is there already (about 15 seconds for the default).

    Returns the builder; ``builder.as_data_source("train")[i]`` is a dict with ``video`` uint8 [T, H, W, 3], ``caption``
    bytes, ``labels`` int32 [objects, 5] and ``index``. An interrupted run leaves nothing under the final name.
    Raises UserError for an unknown world.
    """
    config = config_for(world, seed=seed, train=train, evaluate=evaluate)
    known = config.name in Builder.builder_configs  # TFDS wants its own configs by name
    builder = Builder(config=config.name if known else config, data_dir=str(data_dir))
    builder.download_and_prepare()
    return builder
