"""TFDS builder of prompt corpora. Works without TensorFlow: array_record files, read with ``as_data_source``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import tensorflow_datasets as tfds

Example = dict[str, str]


@dataclasses.dataclass(kw_only=True)
class PromptsConfig(tfds.core.BuilderConfig):
    """One corpus. The name says everything that its records depend on, by a digest."""

    splits: Mapping[str, Callable[[], Iterator[Example]]] = dataclasses.field(default_factory=dict, repr=False)
    """The prompts of every split that has any."""


class Builder(tfds.core.GeneratorBasedBuilder):
    """Prompts without videos, each with where it comes from; none that evaluation uses, none twice."""

    name = "prompts"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (TFDS reads a class attribute)

    def __init__(self, *, file_format="array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"caption": tfds.features.Text(), "source": tfds.features.Text()}),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager
        return {split: self._generate_examples(split) for split in self.builder_config.splits}

    def _generate_examples(self, split: str):
        yield from enumerate(self.builder_config.splits[split]())
