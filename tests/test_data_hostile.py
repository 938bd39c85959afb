"""Datasets that a stranger wrote: what they say of themselves, and what is in their records."""

import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module
from small_dataset import RECORD, SHARD, inner, refused, train_split, write_dataset
from tensorflow_datasets.proto import tf_example_pb2

from nd_jax.data.checked_records import unpack
from nd_jax.datasets import open_data
from nd_jax.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def data(prepared, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


# ---- dataset_info.json, features.json, dataset.json


def first_split(**change):
    return lambda info: info["splits"][0].update(change)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (first_split(shardLengths=["4", "4", "5"]), "holds 4 records, dataset_info.json says 5"),
        (first_split(shardLengths=["4", "4"]), "00000-of-00002 is missing"),
        (first_split(shardLengths=["4"] * 4), "of-00004 is missing"),
        (first_split(shardLengths=[]), "shardLengths [], expected"),
        (first_split(shardLengths="444"), "shardLengths '444', expected"),
        (first_split(shardLengths=["-4", "8", "8"]), "the number '-4', expected digits"),
        (first_split(shardLengths=["9" * 400]), "expected digits"),
        (first_split(shardLengths=[True]), "the number True"),
        (first_split(shardLengths=[4.5]), "the number 4.5"),
        (first_split(numBytes="7"), "they are not the files that were prepared"),
        (first_split(numBytes={}), "the number {}"),
        (first_split(name="../../train"), "the name '../../train'"),
        (first_split(name="seen"), "expected each of them once"),
        (first_split(name="other"), "no split 'train', expected one of other"),
        (first_split(filepathTemplate="../{SPLIT}.{SHARD_X_OF_Y}"), "files named '../"),
        (first_split(filepathTemplate="/etc/passwd"), "files named '/etc/passwd'"),
        (first_split(statistics="no message"), "cannot be read"),
        (lambda info: info.update(splits={}), "splits is {}"),
        (lambda info: info["splits"].append("x"), "expected an object"),
        (lambda info: info.update(name="mnist"), "name is 'mnist', expected 'shapes'"),
        (lambda info: info.update(configName="64x128"), "configName is '64x128'"),
        (lambda info: info.update(version="9.9.9"), "version is '9.9.9', expected '1.0.0'"),
        (lambda info: info.update(fileFormat="tfrecord"), "fileFormat is 'tfrecord', expected 'array_record'"),
        (lambda info: info.update(unknown=1), "cannot be read"),
    ],
)
def test_lying_description_is_named(data, edit, told):
    path = inner(data) / "dataset_info.json"
    info = json.loads(path.read_text())
    edit(info)
    path.write_text(json.dumps(info))
    assert told in refused(data)


def feature(**change):
    return lambda features: features["video"]["tensor"].update(change)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (feature(shape={"dimensions": ["33", "64", "128", "3"]}), "dimensions=33x64x128x3, expected Tensor"),
        (feature(shape={"dimensions": ["9" * 300]}), "9999"),
        (feature(dtype="float32"), "dtype=float32 encoding=zlib"),
        (feature(encoding="none"), "encoding=none"),
        (lambda features: features["video"].update(pythonClassName="evil.Tensor2"), "Tensor2"),
        (lambda features: features["video"].update(pythonClassName=["a\n"]), "expected Tensor"),
        (lambda features: features.pop("labels"), "feature 'labels' is missing"),
        (lambda features: features.update(extra={"pythonClassName": "x.Image"}), "expected no such feature"),
        (lambda features: features.update(caption=7), "feature 'caption' is 7, expected Text"),
        (lambda features: features.clear(), "is missing, expected"),
    ],
)
def test_other_features_are_named_and_nothing_is_imported(data, edit, told):
    path = inner(data) / "features.json"
    content = json.loads(path.read_text())
    edit(content["featuresDict"]["features"])
    path.write_text(json.dumps(content))
    assert told in refused(data)
    assert "evil" not in sys.modules


NO_JSON = [
    b"",
    b"{",
    b"[" * 100_000,
    b"[]",
    b"{}",
    b"\xff",
    b'{"a": NaN}',
    b'{"a": 1, "a": 2}',
    b"\x80\x04K\x01.",
    b" " * (17 << 20),
]


@pytest.mark.parametrize("content", NO_JSON, ids=range(len(NO_JSON)))
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "dataset.json"])
def test_broken_json_is_named(data, name, content):
    path = next(data.rglob(name))
    path.write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        open_data(data)
    assert "\n" not in str(caught.value)


def test_missing_and_linked_descriptions_are_named(data):
    for name in ("dataset_info.json", "features.json"):
        path = inner(data) / name
        moved = path.rename(data / name)
        assert name in refused(data)
        path.symlink_to(moved)
        with pytest.raises(UserError, match="symbolic link"):
            train_split(data)
        path.unlink()
        moved.rename(path)
    assert len(train_split(data)) == 12


@pytest.mark.parametrize(
    "change", [{"clips": 13}, {"clips": 10**12}, {"clips": -1}, {"seed": 4}, {"world": "64x128"}, {"world": "../64x64"}]
)
def test_dataset_of_other_settings_is_not_found(data, change):
    (data / "dataset.json").write_text(json.dumps(RECORD | change))
    with pytest.raises(UserError, match=r"is missing, expected a prepared dataset|unknown shapes world"):
        open_data(data)
    assert {path.name for path in (data / "shapes").iterdir()} == {".config", inner(data).parent.name}


# ---- records


def rewrite(data: Path, edit) -> None:
    """Write the second file again with its third record edited: ``edit`` gets its features, or returns other bytes."""
    path = inner(data) / SHARD
    reader = array_record_module.ArrayRecordReader(str(path))
    records = [reader.read([n])[0] for n in range(reader.num_records())]
    reader.close()
    example = tf_example_pb2.Example.FromString(records[2])
    before, other = len(records[2]), edit(example.features.feature)
    records[2] = other if isinstance(other, bytes) else example.SerializeToString()
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    info = json.loads((path.parent / "dataset_info.json").read_text())
    info["splits"][0]["numBytes"] = str(int(info["splits"][0]["numBytes"]) + len(records[2]) - before)
    (path.parent / "dataset_info.json").write_text(json.dumps(info))


def put(name: str, *values):
    def edit(features):
        features[name].Clear()
        kind = features[name].bytes_list if isinstance(values[0], bytes) else features[name].int64_list
        kind.value.extend(values)

    return edit


def cut_video(features):
    video = features["video"].bytes_list.value
    video[0] = video[0][:-9]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (put("video", zlib.compress(bytes(1 << 24))), "more than 405504 bytes"),
        (put("video", zlib.compress(bytes(405503))), "reshape"),
        (put("video", zlib.compress(bytes(405504)) + b"x"), "too late"),
        (put("video", b"not zlib"), "header"),
        (cut_video, "too early"),
        (put("video", 1, 2, 3), "record 2"),
        (put("labels", 1, 2), "reshape"),
        (put("labels", b"12345"), "record 2"),
        (put("labels", 0, 0, 99, 0, 0), "99"),
        (put("caption", b"\xff\xfe"), "utf-8"),
        (put("caption", b"one", b"two"), "record 2"),
        (put("caption", bytes(8 << 20)), "expected at most"),
        (lambda features: features.pop("labels"), "record 2"),
        (lambda features: b"\xff" * 300, "record 2"),
        (lambda features: b"", "record 2"),
    ],
    ids=[
        *("bomb", "short", "trailing", "no_zlib", "cut", "integers", "count", "bytes", "label", "no_text", "two_texts"),
        *("huge", "missing", "garbage", "empty"),
    ],
)
def test_hostile_record_is_named(data, edit, told):
    rewrite(data, edit)
    with pytest.raises(UserError) as caught:
        train_split(data)[6]
    assert SHARD in str(caught.value)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_records_of_a_file_are_read(data):
    rewrite(data, put("caption", b"\xff"))
    source = train_split(data)
    assert [len(source[n]["caption"]) > 5 for n in (0, 5, 7, 11)] == [True] * 4


def test_unpacking_stops_at_the_size_of_the_array():
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    packed = zlib.compress(array.tobytes())
    np.testing.assert_array_equal(unpack(packed, (2, 3, 4), np.int16), array)
    np.testing.assert_array_equal(unpack(packed, (None, 3, 4), np.int16), array)
    with pytest.raises(ValueError, match="more than 46 bytes"):
        unpack(packed, (23,), np.int16)
