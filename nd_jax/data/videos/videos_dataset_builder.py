"""TFDS builder of a folder of clips. Works without TensorFlow: array_record files, read with ``as_data_source``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from nd_jax.data.buckets import Size
from nd_jax.data.clips import Limits
from nd_jax.data.folder_listing import stamp
from nd_jax.data.timeline import read_picks
from nd_jax.data.video_folder import SPLITS, Clip
from nd_jax.errors import UserError


@dataclasses.dataclass(kw_only=True)
class VideosConfig(tfds.core.BuilderConfig):
    """The clips of one size. The name says everything that a record depends on, by a digest."""

    size: Size
    frames: int
    folder: Path | None = None
    clips: tuple[Clip, ...] = dataclasses.field(default=(), repr=False)
    limits: Limits = dataclasses.field(default_factory=Limits)
    progress: Callable[[], None] = dataclasses.field(default=lambda: None, repr=False, compare=False)


class Builder(tfds.core.GeneratorBasedBuilder):
    """Windows of a user's own clips, resized and brought to one frame rate, with captions."""

    name = "videos"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (TFDS reads a class attribute)

    def __init__(self, *, file_format="array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "video": tfds.features.Tensor(
                        shape=(config.frames, *config.size, 3), dtype=np.uint8, encoding="zlib"
                    ),
                    "caption": tfds.features.Text(),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "file": tfds.features.Text(),
                    "start": tfds.features.Scalar(dtype=np.float32),
                }
            ),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        present = {clip.split for clip in self.builder_config.clips}  # TFDS knows no empty splits
        return {split: self._generate_examples(split) for split in SPLITS if split in present}

    def _generate_examples(self, split: str):
        config = self.builder_config
        for clip in config.clips:
            if clip.split != split:
                continue
            path = config.folder / clip.name
            if stamp(path) != clip.stamp:
                raise UserError(f"video: {path} was changed while the folder was read: start again")
            videos = read_picks(path, clip.picks, config.size, config.limits)
            for window, (video, start) in enumerate(zip(videos, clip.starts, strict=True)):
                yield (
                    f"{clip.name}/{window}",
                    {
                        "video": video,
                        "caption": clip.captions[0],
                        "captions": list(clip.captions),
                        "file": clip.name,
                        "start": np.float32(start),
                    },
                )
            config.progress()
