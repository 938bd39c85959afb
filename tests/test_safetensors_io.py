"""Safetensors in and out: equal to the safetensors package, and every way in which a file can lie is refused."""

from __future__ import annotations

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from nd_jax.converters.checkpoint_files import open_checkpoint
from nd_jax.converters.safetensors_io import TensorFile, read_tensors
from nd_jax.converters.safetensors_write import Pending, pending, write_checkpoint
from nd_jax.errors import UserError
from nd_jax.outputs import new_folder

EVERY_DTYPE = ["<f8", "<f4", "<f2", ml_dtypes.bfloat16, "<i8", "<i4", "<i2", "i1", "u1", "?"]


def every_dtype() -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(0))
    tensors = {
        f"t{i}": rng.integers(0, 2 if dtype == "?" else 100, (3, 4, 5)).astype(dtype)
        for i, dtype in enumerate(EVERY_DTYPE)
    }
    return tensors | {"empty": np.zeros((0, 7), "<f4"), "scalar": np.array(1.5, "<f4"), "ünï.çode": np.ones(3, "<f4")}


def raw_file(path, header: object, data: bytes = b"", *, length: int | None = None) -> object:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def same(one: np.ndarray, two: np.ndarray) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()


def test_what_we_write_the_safetensors_package_reads_and_back(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    tensors = every_dtype()
    write_checkpoint(tmp_path, "model", [pending(name, array) for name, array in tensors.items()])
    theirs = load_file(tmp_path / "model.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(same(theirs[name], array) for name, array in tensors.items())
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    save_file(tensors, tmp_path / "theirs.safetensors", {"who": "they"})
    ours = read_tensors(tmp_path / "theirs.safetensors")
    assert ours.keys() == tensors.keys()
    assert all(same(ours[name], array) for name, array in tensors.items())


@pytest.mark.parametrize(
    "index",
    [
        (slice(2, 5),),
        (slice(None), slice(1, 3)),
        (slice(None), slice(None), slice(5, 1500)),
        (slice(1, 2), slice(0, 4), slice(0, 1100)),
        (slice(3, 3),),
        (slice(None), slice(2, 9)),
    ],
)
def test_a_slice_is_read_alone(tmp_path, index):
    array = np.arange(6 * 4 * 3000, dtype="<f4").reshape(6, 4, 3000)
    write_checkpoint(tmp_path, "model", [pending("pad", np.zeros(5, "<f4")), pending("x", array)])
    with TensorFile(tmp_path / "model.safetensors") as file:
        part = file["x"].read(index)
        assert same(part, array[index])
        assert file.bytes_read == part.nbytes


def test_short_runs_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("nd_jax.converters.safetensors_io._BUFFER", 4000)
    array = np.arange(50 * 7 * 40, dtype="<f4").reshape(50, 7, 40)
    write_checkpoint(tmp_path, "model", [pending("x", array)])
    with TensorFile(tmp_path / "model.safetensors") as file:
        for index in [
            (slice(3, 50), slice(1, 3)),
            (slice(None), slice(None), slice(7, 8)),
            (slice(9, 10), slice(2, 5)),
        ]:
            assert same(file["x"].read(index), array[index])


def test_shards_and_index(tmp_path):
    tensors = {f"layer.{i}": np.full((10, i + 1), i, "<f4") for i in range(6)}
    write_checkpoint(tmp_path, "model", [pending(*item) for item in tensors.items()], shard_size=300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.keys() == tensors.keys()
        assert all(same(checkpoint[name].read(), array) for name, array in tensors.items())


GOOD = {"x": entry()}
BAD_FILES = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"\0" * 7, "truncated"),
    "header over 100 MB": (struct.pack("<Q", 100_000_001) + b"{}" * 50, "100000000"),
    "absurd header": (b"\xff" * 64, "100000000"),
    "header longer than file": (struct.pack("<Q", 500) + b"{}", "truncated"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}
BAD_HEADERS = {
    "not json": (b"{'x': 1}", b"", "not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "not an object": (b"[1]", b"", "does not start with"),
    "deep nesting": (b'{"x":' * 100_000, b"", "not valid JSON"),
    "long integer": (b'{"x":' + b"9" * 10_000 + b"}", b"", "not valid JSON"),
    "nan": (b'{"x": NaN}', b"", "not valid JSON"),
    "duplicate name": (
        b'{"x":' + json.dumps(entry()).encode() + b',"x":' + json.dumps(entry()).encode() + b"}",
        bytes(8),
        "appears twice",
    ),
    "duplicate field": (b'{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "twice"),
    "entry is a list": ({"x": [1]}, b"", "dtype, shape and data_offsets"),
    "field missing": ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "dtype, shape and data_offsets"),
    "field unknown": ({"x": entry() | {"extra": 1}}, bytes(8), "dtype, shape and data_offsets"),
    "bad dtype": ({"x": entry("F8_E5M2")}, bytes(8), "F8_E5M2"),
    "dtype is a list": ({"x": entry(["F32"])}, bytes(8), "dtype"),
    "negative shape": ({"x": entry(shape=(-2,))}, bytes(8), "none negative"),
    "two negatives": ({"x": entry(shape=(-1, -2))}, bytes(8), "none negative"),
    "fractional shape": ({"x": entry(shape=(2.0,))}, bytes(8), "integers"),
    "boolean shape": ({"x": entry(shape=(True, 2))}, bytes(8), "integers"),
    "shape is a number": ({"x": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, bytes(8), "shape"),
    "huge shape": ({"x": entry(shape=(2**40, 2**40), offsets=(0, 0))}, b"", "beyond any memory"),
    "huge empty shape": ({"x": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}, b"", "beyond any memory"),
    "too many axes": ({"x": entry(shape=(1,) * 40 + (2,))}, bytes(8), "shape"),
    "size against shape": ({"x": entry(shape=(3,))}, bytes(8), "expected 12"),
    "negative offset": ({"x": entry(offsets=(-8, 0))}, bytes(8), "data_offsets"),
    "backward offsets": ({"x": entry(offsets=(8, 0))}, bytes(8), "data_offsets"),
    "three offsets": ({"x": entry(offsets=(0, 8, 8))}, bytes(8), "data_offsets"),
    "out of file": ({"x": entry(shape=(4,), offsets=(0, 16))}, bytes(8), "truncated"),
    "offset far out": ({"x": entry(offsets=(10**30, 10**30 + 8))}, bytes(8), "data_offsets"),
    "overlap": ({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12), "overlaps"),
    "same place": ({"x": entry(), "y": entry()}, bytes(8), "overlaps"),
    "hole": ({"x": entry(), "y": entry(offsets=(12, 20))}, bytes(20), "hole"),
    "hole in front": ({"x": entry(offsets=(4, 12))}, bytes(12), "hole"),
    "trailing bytes": (GOOD, bytes(9), "after its last tensor"),
    "truncated data": (GOOD, bytes(7), "truncated"),
    "metadata not strings": ({"__metadata__": {"a": 1}} | GOOD, bytes(8), "__metadata__"),
    "metadata not an object": ({"__metadata__": "a"} | GOOD, bytes(8), "__metadata__"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path, case):
    content, message = BAD_FILES[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_tensors(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header(tmp_path, case):
    header, data, message = BAD_HEADERS[case]
    with pytest.raises(UserError, match=message) as caught:
        read_tensors(raw_file(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", {"\x1b[31mred": entry("F99")}, bytes(8))
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    assert "\x1b" not in str(caught.value)


def test_bool_bytes_are_checked(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", {"x": entry("BOOL", (2,), (0, 2))}, b"\x01\x02")
    with pytest.raises(UserError, match="BOOL"):
        read_tensors(path)


def test_a_file_cut_while_open(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", GOOD, bytes(8))
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(UserError, match="shorter"):
            file["x"].read()


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt", "model.PT"])
def test_pickles_are_refused_with_advice(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match="save_file") as caught:
            open_checkpoint(path)
        assert name in str(caught.value)


def test_links_are_not_followed_inside_a_folder(tmp_path):
    outside = raw_file(tmp_path / "secret.safetensors", GOOD, bytes(8))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(UserError, match="symbolic link"):
        open_checkpoint(folder)
    assert list(read_tensors(folder / "model.safetensors")) == ["x"]  # a path that the user names may be a link


def test_pipes_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        open_checkpoint(tmp_path)
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(UserError, match="not a regular file"):
        read_tensors(tmp_path / "dir.safetensors")


def sharded(folder, weight_map: object) -> object:
    folder.mkdir()
    raw_file(folder / "a.safetensors", {"x": entry()}, bytes(8))
    raw_file(folder / "b.safetensors", {"y": entry()}, bytes(8))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


BAD_INDICES = {
    "parent": ({"x": "../outside.safetensors"}, "plain name"),
    "absolute": ({"x": "/etc/outside.safetensors"}, "plain name"),
    "subfolder": ({"x": "sub/a.safetensors"}, "plain name"),
    "backslash": ({"x": "..\\outside.safetensors"}, "plain name"),
    "drive": ({"x": "C:a.safetensors"}, "plain name"),
    "dots": ({"x": "..safetensors"}, "plain name"),
    "null byte": ({"x": "a\0.safetensors"}, "plain name"),
    "number": ({"x": 3}, "plain name"),
    "pickle": ({"x": "a.bin"}, "save_file"),
    "no such file": ({"x": "c.safetensors"}, "c.safetensors"),
    "link": ({"x": "link.safetensors"}, "symbolic link"),
    "not in the shard": ({"x": "a.safetensors", "z": "a.safetensors"}, "'z'"),
    "in the other shard": ({"x": "b.safetensors", "y": "b.safetensors"}, "'x'"),
    "not in the index": ({"x": "a.safetensors", "z": "b.safetensors"}, "'y'"),
    "empty": ({}, "weight_map"),
    "list": (["x"], "weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_bad_index(tmp_path, case):
    weight_map, message = BAD_INDICES[case]
    raw_file(tmp_path / "outside.safetensors", {"x": entry()}, bytes(8))
    folder = sharded(tmp_path / "folder", weight_map)
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)


def test_good_index_and_same_tensor_in_two_shards(tmp_path):
    folder = sharded(tmp_path / "folder", {"x": "a.safetensors", "y": "b.safetensors"})
    with open_checkpoint(folder) as checkpoint:
        assert sorted(checkpoint) == ["x", "y"]
    raw_file(folder / "b.safetensors", {"x": entry(), "y": entry(offsets=(8, 16))}, bytes(16))
    with pytest.raises(UserError, match="'x'"):
        open_checkpoint(folder)


def test_index_with_a_repeated_key(tmp_path):
    folder = sharded(tmp_path / "folder", {"x": "a.safetensors"})
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}')
    with pytest.raises(UserError, match="appears twice"):
        open_checkpoint(folder)


def test_ambiguous_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="no weights"):
        open_checkpoint(tmp_path)
    folder = sharded(tmp_path / "folder", {"x": "a.safetensors", "y": "b.safetensors"})
    raw_file(folder / "model.safetensors", GOOD, bytes(8))
    with pytest.raises(UserError, match="expected one"):
        open_checkpoint(folder)
    with pytest.raises(UserError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere.safetensors")


def test_output_is_whole_or_absent(tmp_path):
    def broken():
        yield np.zeros(1, "<f4")
        raise RuntimeError("disk on fire")

    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        write_checkpoint(folder, "model", [Pending("x", (2,), np.dtype("<f4"), broken)])
    assert list(tmp_path.iterdir()) == []

    with new_folder(target) as folder:
        assert not target.exists()
        write_checkpoint(folder, "model", [pending("x", np.zeros(2, "<f4"))])
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    with pytest.raises(UserError, match="--overwrite"), new_folder(target):
        pass
    with pytest.raises(RuntimeError), new_folder(target, overwrite=True) as folder:
        raise RuntimeError
    assert read_tensors(target / "model.safetensors").keys() == {"x"}
    with new_folder(target, overwrite=True) as folder:
        write_checkpoint(folder, "model", [pending("y", np.zeros(2, "<f4"))])
    assert read_tensors(target / "model.safetensors").keys() == {"y"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_does_not_delete_what_is_not_ours(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear_aunt.txt").write_text("hello")
    with (
        pytest.raises(UserError, match="not a folder written by nd-jax"),
        new_folder(tmp_path / "letters", overwrite=True),
    ):
        pass
    assert (tmp_path / "letters" / "dear_aunt.txt").exists()


@pytest.mark.parametrize("size", range(0, 120, 3))
def test_any_truncation_is_noticed(tmp_path, size):
    write_checkpoint(tmp_path, "model", [pending("x", np.arange(8, dtype="<f4"))])
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    assert size < len(content)
    path.write_bytes(content[:size])
    with pytest.raises(UserError):
        read_tensors(path)


def test_random_damage_is_an_error_or_harmless(tmp_path):
    write_checkpoint(tmp_path, "model", [pending(name, array) for name, array in every_dtype().items()])
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.Generator(np.random.Philox(1))
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        for position in rng.integers(0, header, rng.integers(1, 4)):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_tensors(path)
        except UserError:
            refused += 1
    assert refused > 200


@pytest.mark.peers
def test_torch_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    tensors = every_dtype()
    write_checkpoint(tmp_path, "model", [pending(name, array) for name, array in tensors.items()])
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.ndim else tensor.numpy()
        assert raw.tobytes() == tensors[name].tobytes(), name
