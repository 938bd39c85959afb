"""Computed targets on disk: what was written comes back, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nd_jax.data.pipeline import batches
from nd_jax.data.text_features import DTYPES, FeatureSource, write_features
from nd_jax.errors import UserError

LENGTH, WIDTH = 6, 4


def parts(count: int = 7, seed: int = 0):
    """Batches of up to three prompts; one is as long as can be, one has a single token."""
    rng = np.random.Generator(np.random.Philox(seed))
    lengths = np.array([LENGTH, 1, 3, 2, 5, 4, 1])[:count]
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    ids, targets = (
        rng.integers(1, 99, (count, LENGTH), np.int32),
        rng.standard_normal((count, LENGTH, WIDTH), np.float32),
    )
    return [tuple(x[n : n + 3] for x in (ids, mask, targets)) for n in range(0, count, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_valid_tokens_come_back(tmp_path, dtype):
    write_features(tmp_path / "f", iter(parts()), dtype=dtype)
    source = FeatureSource(tmp_path / "f")
    ids, mask, targets = (np.concatenate(x) for x in zip(*parts(), strict=True))
    assert (len(source), source.width, source.text_length) == (7, WIDTH, LENGTH)
    for index in range(7):
        example = source[index]
        np.testing.assert_array_equal(example["t5_mask"], mask[index])
        np.testing.assert_array_equal(example["t5_ids"], ids[index] * mask[index])
        expected = targets[index].astype(DTYPES[dtype]).astype(np.float32) * mask[index, :, None]
        np.testing.assert_array_equal(example["target"], expected)
    assert (tmp_path / "f" / "targets.bin").stat().st_size == mask.sum() * WIDTH * np.dtype(DTYPES[dtype]).itemsize


def test_they_come_in_batches(tmp_path):
    write_features(tmp_path / "f", parts())
    batch = next(batches(FeatureSource(tmp_path / "f"), 4, keys=("t5_ids", "t5_mask", "target")))
    assert {name: x.shape for name, x in batch.items()} == {
        "t5_ids": (4, LENGTH),
        "t5_mask": (4, LENGTH),
        "target": (4, LENGTH, WIDTH),
    }


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    large = [(ids, mask, np.full_like(targets, 1e6)) for ids, mask, targets in parts()]
    with pytest.raises(UserError, match="not finite in float16"):
        write_features(tmp_path / "f", large, dtype="float16")
    with pytest.raises(UserError, match="there are no prompts"):
        write_features(tmp_path / "f", [])
    with pytest.raises(UserError, match="dtype 'int8', expected one of float32, bfloat16, float16"):
        write_features(tmp_path / "f", parts(), dtype="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompts": 6}, "expected what nd-jax data features wrote"),
        ({"tokens": 23}, "expected what nd-jax data features wrote"),
        ({"counts": [7] * 7}, "expected what nd-jax data features wrote"),
        ({"counts": "no"}, "expected what nd-jax data features wrote"),
        ({"width": 0}, "expected what nd-jax data features wrote"),
        ({"width": 8}, r"targets.bin has 352 bytes, expected 704"),
        ({"dtype": "object"}, "expected what nd-jax data features wrote"),
        ({"crc32": {}}, "was changed since it was written"),
    ],
)
def test_descriptions_that_lie(tmp_path, change, told):
    write_features(tmp_path / "f", parts())
    path = tmp_path / "f" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=told):
        FeatureSource(tmp_path / "f")


@pytest.mark.parametrize("name", ["targets.bin", "ids.bin"])
def test_damage(tmp_path, name):
    path = write_features(tmp_path / "f", parts()) / name
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} was changed"):
        FeatureSource(tmp_path / "f")
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{name} has .* bytes, expected"):
        FeatureSource(tmp_path / "f")
    path.unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        FeatureSource(tmp_path / "f")
