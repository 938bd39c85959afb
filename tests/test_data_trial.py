"""Datasets that are damaged or short: named in one line, before or at the record, and never read as less."""

import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_dataset import SETTINGS, SHARD, inner, refused, train_split, write_dataset

from nd_jax import cli
from nd_jax.data import checked_records
from nd_jax.data.pipeline import batches
from nd_jax.data.record_chunks import BLOCK, record_chunks
from nd_jax.data.shapes import open_split, prepare
from nd_jax.datasets import open_data
from nd_jax.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def data(prepared, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


# ---- files of records


def test_whole_data_is_read_as_tfds_reads_it(prepared):
    plain = prepare(prepared, "64x64", **SETTINGS).as_data_source("train")
    checked = train_split(prepared)
    assert len(checked) == len(plain) == 12
    for ours, theirs in zip(checked, plain, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(IndexError):
        checked[12]
    with pytest.raises(UserError, match="expected one of train, seen"):
        open_split(prepared, "64x64", "test", **SETTINGS)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def record_place(path: Path, record: int) -> int:
    return record_chunks(path)[record].begin + 60


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path, content: None, "is missing, expected 4 records"),
        (lambda path, content: b"", "it is empty"),
        (lambda path, content: b"x" * 100, "no chunk"),
        (lambda path, content: content[: len(content) // 2], "damaged"),
        (lambda path, content: content[:-1], "damaged"),
        (lambda path, content: content[:-BLOCK], "damaged"),
        (lambda path, content: content + b"more", "damaged"),
        (lambda path, content: bytes(len(content)), "no chunk"),
        (lambda path, content: flipped(content, record_place(path, 2)), "record 2 of 4 is damaged .*hash"),
        (lambda path, content: content[:1000] + bytes(512) + content[1512:], "record 0 of 4 is damaged .*hash"),
        (lambda path, content: path.with_name(path.name.replace("train", "seen")).read_bytes(), "bytes of records"),
    ],
    ids=[
        *("deleted", "empty", "foreign", "half", "byte_short", "block_short", "longer", "zeros", "flipped_bit"),
        *("zeroed_block", "other_split"),
    ],
)
def test_damaged_file_is_named(data, damage, told):
    path = inner(data) / SHARD
    content = damage(path, path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    message = refused(data)
    assert re.search(told, message)
    assert str(path) in message or "split train" in message


def test_links_are_not_followed(data):
    path = inner(data) / SHARD
    moved = path.rename(data / "elsewhere")
    path.symlink_to(moved)
    with pytest.raises(UserError, match=rf"{SHARD} is a symbolic link.*cp -rL"):
        open_data(data)


def test_random_damage_never_goes_unnoticed(data):
    """Either the file is named, or what was hit is padding and every example is the one that was written."""
    path, rng = inner(data) / SHARD, random.Random(0)
    content = path.read_bytes()
    expected = [example["caption"] + example["video"].tobytes() for example in train_split(data)]
    used = record_chunks(path)[-1].begin
    noticed = 0
    for trial in range(40):
        place, length = rng.randrange(used if trial % 2 else len(content)), rng.choice([1, 1, 24, 3000])
        damaged = bytearray(content)
        damaged[place : place + length] = rng.randbytes(len(damaged[place : place + length]))
        path.write_bytes(damaged)
        found, told = None, SHARD
        try:
            found = [example["caption"] + example["video"].tobytes() for example in train_split(data)]
        except UserError as error:
            told, noticed = str(error), noticed + 1
        assert SHARD in told
        assert found in (None, expected)
    assert noticed >= 19


def test_the_command_ends_before_training(data, capsys, tmp_path):
    (inner(data) / SHARD).unlink()
    code = cli.main(["train", "shapes_tiny", "codec", "--data", str(data), "--out", str(tmp_path / "run")])
    told = capsys.readouterr()
    assert code == 2
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("error: data: ")
    assert SHARD in told.err
    assert not (tmp_path / "run").exists()


def test_shapes_of_another_size_are_refused(data):
    assert open_data(data, prefer=(64, 64))[0]["video"].shape == (33, 64, 64, 3)
    with pytest.raises(UserError, match=r"64x64.*expected 64x128"):
        open_data(data, prefer=(64, 128))


def test_opening_never_draws(data):
    shutil.rmtree(inner(data))
    assert "is missing" in refused(data)
    assert not list(data.rglob("*array_record*"))


# ---- damage that is met on the way


def damage_late(data, monkeypatch):
    """A source whose third record in the second file is damaged; too large a split to be read at opening."""
    monkeypatch.setattr(checked_records, "READ_LIMIT", 0)
    path = inner(data) / SHARD
    path.write_bytes(flipped(path.read_bytes(), record_place(path, 2)))
    return batches(train_split(data), 4, keys=("index",), shuffle=False)


def test_a_damaged_record_is_named_when_it_is_met(data, monkeypatch):
    stream = damage_late(data, monkeypatch)
    assert len(next(stream)["index"]) == 4
    with pytest.raises(UserError, match=rf"{SHARD}: record 2 of 4 is damaged"):
        next(stream)


class Deadly:
    """A source whose sixth example kills the process that asks for it."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), 9)
        return {"index": np.int64(index)}


@pytest.mark.heavy
def test_errors_in_worker_processes_reach_the_parent(data):
    def read(source):
        stream = batches(source, 4, keys=("index",), shuffle=False, workers=1)
        try:
            for _ in range(3):
                next(stream)
        finally:
            stream.close()

    source = train_split(data)
    path = inner(data) / SHARD
    path.write_bytes(flipped(path.read_bytes(), record_place(path, 2)))  # workers open the files anew
    with pytest.raises(UserError, match="record 2 of 4 is damaged"):
        read(source)
    with pytest.raises(UserError, match="has died"):
        read(Deadly())
