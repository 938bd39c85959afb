"""TFDS builder of the shapes world. Works without TensorFlow: array_record files, read with ``as_data_source``."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from nd_jax.data.source import ShapesSource
from nd_jax.data.world import SPLITS, WORLDS, World, world_named

TRAIN, EVALUATE = 4096, 512  # clips


@dataclasses.dataclass(kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
    """Which world, from which seed, and how many clips in ``train`` and in each of the other splits."""

    world: World = dataclasses.field(default_factory=World)
    seed: int = 0
    train: int = TRAIN
    evaluate: int = EVALUATE


def config_for(world: str, *, seed: int = 0, train: int = TRAIN, evaluate: int = EVALUATE) -> ShapesConfig:
    """Config of a preset world. Everything that changes a clip or a count is in its name, hence in its folder."""
    name = world
    if (seed, train, evaluate) != (0, TRAIN, EVALUATE):
        name += f"-seed{seed}-{train}-{evaluate}"
    preset = world_named(world)
    about = f"{preset.objects} object(s), {preset.frames} frames of {preset.height} x {preset.width}, seed {seed}"
    return ShapesConfig(name=name, description=about, world=preset, seed=seed, train=train, evaluate=evaluate)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Coloured shapes moving over plain backgrounds, with captions; drawn from a seed, nothing is downloaded."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (TFDS reads a class attribute)
    BUILDER_CONFIGS = [config_for(name) for name in WORLDS]  # noqa: RUF012

    def __init__(self, *, file_format="array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        world = self.builder_config.world
        shape = (world.frames, world.height, world.width, 3)
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    # one compressed array: the Video feature would need TensorFlow to encode, and is ten times slower
                    "video": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib"),
                    "caption": tfds.features.Text(),
                    "labels": tfds.features.Tensor(shape=(world.objects, 5), dtype=np.int32),
                    "index": tfds.features.Scalar(dtype=np.int32),
                }
            ),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str):
        config = self.builder_config
        source = ShapesSource(config.world, split, config.train if split == "train" else config.evaluate, config.seed)
        for index in range(len(source)):
            yield index, source[index]
