"""Damaged and hostile checkpoint files: one line and exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from conftest import GOLDEN

SAFETENSORS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A component folder to be damaged."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    source = GOLDEN / "context_adapter"
    shutil.copy(source / "config.json", folder)
    shutil.copy(source / "weights.safetensors", folder / SAFETENSORS)
    return folder


def rewrite(path: Path, change) -> None:
    """Apply ``change(header, body)`` to a safetensors file; it returns both."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = change(json.loads(data[8 : 8 + length]), data[8 + length :])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def without(name):
    def change(header, body):
        begin, end = header.pop(name)["data_offsets"]
        for entry in header.values():
            entry["data_offsets"] = [at - (end - begin) * (at > begin) for at in entry["data_offsets"]]
        return header, body[:begin] + body[end:]

    return change


def renamed(old, new):
    return lambda header, body: ({new if name == old else name: entry for name, entry in header.items()}, body)


def reshaped(name):
    def change(header, body):
        header[name]["shape"] = header[name]["shape"][::-1]
        return header, body

    return change


def moved(name, by):
    def change(header, body):
        header[name]["data_offsets"] = [at + by for at in header[name]["data_offsets"]]
        return header, body

    return change


def grown(name):
    def change(header, body):
        entry = header[name]
        entry["shape"][0] *= 100
        entry["data_offsets"][1] += 99 * (entry["data_offsets"][1] - entry["data_offsets"][0])
        return header, body

    return change


def doubled(name):
    def change(header, body):
        text = json.dumps(header)
        return (text[:-1] + f', "{name}": {json.dumps(header[name])}' + "}").encode(), body

    return change


WEIGHT = "network_layers.1.1.weight"


def damages(weight: str) -> dict:
    return {
        "missing": (without(weight), (weight, "missing")),
        "extra": (renamed(weight, "surplus.weight"), ("surplus.weight",)),
        "duplicate": (doubled(weight), (weight, "twice")),
        "misshapen": (reshaped(weight), (weight, "expected", "[")),
        "overlap": (moved(weight, -4), (weight, "overlaps")),
        "out of file": (grown("network_layers.4.0.weight"), ("network_layers.4.0.weight", "ends at byte")),
        "truncated": (lambda header, body: (header, body[:-8]), ("ends at byte",)),
    }


@pytest.mark.parametrize("damage", damages(WEIGHT))
def test_damaged_weights(refused, adapter, tmp_path, damage):
    change, told = damages(WEIGHT)[damage]
    rewrite(adapter / SAFETENSORS, change)
    refused("convert", "import", adapter, tmp_path / "out", told=told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"], "something half-written stayed"


def _header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]]


def test_headers_beyond_the_limit(refused, adapter, tmp_path):
    (adapter / SAFETENSORS).write_bytes(struct.pack("<Q", 200 << 20) + b"{" + bytes(100))
    refused("convert", "import", adapter, tmp_path / "out", told=(SAFETENSORS, str(200 << 20), "expected at most"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(refused, adapter, tmp_path, name):
    (adapter / SAFETENSORS).rename(adapter / name)
    refused("convert", "import", adapter, tmp_path / "out", told=(name, "pickle", "safetensors"))
    refused("convert", "import", adapter / name, tmp_path / "out", told=(name, "pickle", "safetensors"))


def test_index_that_leaves_the_folder(refused, adapter, tmp_path):
    shutil.copy(adapter / SAFETENSORS, tmp_path / "elsewhere.safetensors")
    (adapter / SAFETENSORS).unlink()
    names = json.loads(_header(tmp_path / "elsewhere.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (adapter / f"{SAFETENSORS}.index.json").write_text(json.dumps(index))
    refused("convert", "import", adapter, tmp_path / "out", told=("../elsewhere.safetensors", "plain name"))
