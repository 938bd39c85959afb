"""Prepared TFDS datasets, read only after they were found whole, and never a record short.

What is checked, and when. At opening: the dataset's two descriptions (``dataset_facts``), that every file of the split
is there, that it holds as many records and bytes as told, and none that unpacks to more than its features need; of
splits up to ``READ_LIMIT`` also every record's bytes. At each record: its bytes and what they decode to.
TFDS keeps no checksums of array_record files, and needs none: the format has a 64-bit hash of every chunk (here, of
every record) and of every header, and its reader checks them.
"""

from __future__ import annotations

import bisect
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from nd_jax.checked_files import regular_file, shown
from nd_jax.data.dataset_facts import INFO, REMEDY, check_features, check_info
from nd_jax.data.record_chunks import record_chunks
from nd_jax.errors import UserError

READ_LIMIT = 1 << 30
"""Bytes of records up to which opening a split reads it once (about 3 s a GiB); later damage is found on the way."""
RECORD_LIMIT = 1 << 30
"""Bytes of one unpacked record whose features do not say how large they are."""
TEXT_LIMIT = 1 << 20
"""Bytes of one text or list of texts."""

Example = dict[str, Any]


def open_builder(
    kind: type[tfds.core.GeneratorBasedBuilder], data_dir: str | Path, config: tfds.core.BuilderConfig | None = None
) -> tfds.core.DatasetBuilder:
    """The builder of a dataset that was prepared in ``data_dir``. Raises UserError if it was not, or is damaged."""
    folder = dataset_folder(kind, data_dir, config)
    if not folder.is_dir():
        raise UserError(f"data: {folder} is missing, expected a prepared dataset; {REMEDY}")
    check_info(folder, name=kind.name, config=config and config.name, version=str(kind.VERSION))
    try:
        builder = new_builder(kind, data_dir, config)
        features = builder.info.features.to_json()["content"]["features"]
    except Exception as error:  # TFDS and protobuf raise whatever they like
        raise UserError(f"data: {folder / INFO} cannot be read ({_reason(error)}); {REMEDY}") from error
    check_features(folder, features)
    return builder


def dataset_folder(kind: type, data_dir: str | Path, config: tfds.core.BuilderConfig | None) -> Path:
    """Where TFDS keeps a builder's dataset below ``data_dir``."""
    return Path(data_dir, kind.name, *([config.name] if config else []), str(kind.VERSION))


def new_builder(kind: type, data_dir: str | Path, config: tfds.core.BuilderConfig | None) -> Any:
    """A builder, prepared or not; TFDS wants configs that it knows by their names."""
    known = config is not None and config.name in kind.builder_configs
    return kind(config=config.name if known else config, data_dir=str(data_dir))


def checked_source(
    builder: tfds.core.DatasetBuilder,
    split: str,
    *,
    decoders: Mapping[str, Any] | None = None,
    examine: Callable[[Example], None] | None = None,
) -> CheckedSource:
    """A split of a builder of ``open_builder``, by index, once it was found whole.

    ``decoders`` are those of ``as_data_source``. ``examine`` looks at every decoded example and raises UserError if it
    cannot be (workers get it by pickle). Raises UserError naming the file, what it holds and what was expected.
    """
    features, told = builder.info.features, builder.info.splits
    if split not in told:
        raise UserError(
            f"data: {builder.data_dir} has no split {split!r}, expected one of {', '.join(told)}; name one of them, or "
            "prepare the dataset again"
        )
    limit = record_limit(features)
    shards, size = [], 0
    for instruction in told[split].file_instructions:
        path = Path(instruction.filename)
        size += check_shard(path, instruction.examples_in_shard, limit)
        shards.append((path, instruction.examples_in_shard))
    if size != told[split].num_bytes:
        raise UserError(
            f"data: the files of split {split} in {builder.data_dir} hold {size} bytes of records, {INFO} says "
            f"{told[split].num_bytes}: they are not the files that were prepared; {REMEDY}"
        )
    given = dict(decoders or {})
    packed = {name: feature for name, feature in features.items() if name not in given and _is_zlib(feature)}
    given |= {name: tfds.decode.SkipDecoding() for name in packed}
    source = CheckedSource(builder.as_data_source(split, decoders=given), shards, packed, examine)
    if size <= READ_LIMIT:
        source.read_all()
    return source


def check_shard(path: Path, examples: int, limit: int) -> int:
    """Bytes of the records of one file, of which none may unpack to more than ``limit``.

    Raises UserError when the file is missing, damaged or does not hold ``examples`` records.
    """
    from array_record.python import array_record_module

    if not path.exists():
        raise UserError(f"data: {path} is missing, expected {examples} records in it; {REMEDY}")
    regular_file(path, "data: file of records")
    try:
        chunks = record_chunks(path)
        reader = array_record_module.ArrayRecordReader(str(path))
        counts = {sum(chunk.records for chunk in chunks), reader.num_records()}
        reader.close()  # only now it tells what it did not like when it opened the file
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"data: {path} is damaged ({_reason(error)}), expected {examples} records; {REMEDY}") from error
    if counts != {examples}:
        told = " or ".join(map(str, sorted(counts)))
        raise UserError(f"data: {path} holds {told} records, {INFO} says {examples}; {REMEDY}")
    for chunk in chunks:
        if chunk.size > limit * chunk.records:
            raise UserError(
                f"data: {path}: the records at byte {chunk.begin} unpack to {chunk.size} bytes, expected at most "
                f"{limit} each; {REMEDY}"
            )
    return sum(chunk.size for chunk in chunks)


class CheckedSource:
    """Random access to a split; every example is decoded and checked when it is read.

    ``source[i]`` is what TFDS makes of record i. Raises UserError naming the file and the record that is damaged.
    """

    def __init__(
        self,
        source: Any,
        shards: list[tuple[Path, int]],
        packed: Mapping[str, tfds.features.Tensor],
        examine: Callable[[Example], None] | None,
    ):
        self._source, self._shards, self._examine = source, shards, examine
        self._ends = np.cumsum([count for _, count in shards]).tolist()
        self._packed = {name: (feature.shape, feature.np_dtype) for name, feature in packed.items()}

    @property
    def features(self) -> tfds.features.FeaturesDict:
        """What is in an example."""
        return self._source.dataset_info.features

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"data: record {index} of {len(self)}")
        try:
            example = self._source[index]
            for name, (shape, dtype) in self._packed.items():
                example[name] = unpack(example[name], shape, dtype)
            for value in example.values():
                _check_text(value)
            if self._examine is not None:
                self._examine(example)
        except Exception as error:
            raise self._damage(index, error) from error
        return example

    def read_all(self) -> None:
        """Read every record's bytes once, which checks their hashes, without decoding them."""
        for index in range(len(self)):
            try:
                self._source.data_source[index]
            except Exception as error:
                raise self._damage(index, error) from error

    def _damage(self, index: int, error: Exception) -> UserError:
        shard = bisect.bisect_right(self._ends, index)
        path, count = self._shards[shard]
        record = index - self._ends[shard] + count
        return UserError(f"data: {path}: record {record} of {count} is damaged ({_reason(error)}); {REMEDY}")


def unpack(data: bytes, shape: tuple[int | None, ...], dtype: Any) -> np.ndarray:
    """The array in a zlib stream, never unpacking more than its shape needs. Raises ValueError or zlib.error."""
    size = RECORD_LIMIT if None in shape else math.prod(shape) * np.dtype(dtype).itemsize
    stream = zlib.decompressobj()
    raw = stream.decompress(data, size + 1)
    if len(raw) > size:
        raise ValueError(f"an array of more than {size} bytes, expected no more")
    if not stream.eof or stream.unused_data:
        raise ValueError(f"a compressed array of {len(data)} bytes that ends too early or too late")
    return np.frombuffer(raw, dtype).reshape([-1 if side is None else side for side in shape])


def record_limit(features: tfds.features.FeaturesDict) -> int:
    """Most bytes that one record of these features may have."""
    limit = 1 << 12
    for info in _tensors(features.get_tensor_info()):
        if np.dtype(info.np_dtype).kind in "OSU":
            limit += TEXT_LIMIT
        elif None in info.shape:
            limit += RECORD_LIMIT
        else:
            limit += 10 * math.prod(info.shape)  # integers are stored in up to ten bytes
    return limit


def _tensors(info: Any) -> list[Any]:
    return [leaf for part in info.values() for leaf in _tensors(part)] if isinstance(info, dict) else [info]


def _is_zlib(feature: Any) -> bool:
    content = feature.to_json_content() if isinstance(feature, tfds.features.Tensor) else None
    return getattr(content, "encoding", None) == "zlib"  # a text is a tensor, too, but has no encoding


def _check_text(value: Any) -> None:
    """Raises UnicodeDecodeError for a text, or a list of texts, that is not UTF-8."""
    if isinstance(value, bytes):
        value.decode()
    elif isinstance(value, list | np.ndarray) and getattr(value, "dtype", None) in (None, object):
        for each in value:
            _check_text(each)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, UserError) else shown(text, 200)
