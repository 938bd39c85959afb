"""What the demonstration shows of the student's bundle."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from nd_jax.demo_phone import Phone, phone_sections


def test_sections_show_figures_and_videos(tmp_path):
    snr = {"fp32_to_jax": 120.5, "w8a16_test": 41.25, "goal": 29.0}
    graphs = {"denoiser_stage0": {"precision": "w8a16", "snr": snr}, "adapter": {"precision": "fp16", "snr": {}}}
    videos = np.zeros((2, 3, 16, 16, 3), np.uint8)
    phone = Phone(graphs, videos)
    table, hexagon, gallery = phone_sections(tmp_path, phone, videos, ["a red disc", "a blue cross"])
    assert hexagon.rows == [["not run here"]]
    assert "make demo-npu" in hexagon.note
    assert table.rows == [["denoiser_stage0", "w8a16", "120.5", "41.2", "29.0"], ["adapter", "fp16", "", "", ""]]
    assert [name for name, _ in gallery.rows] == ["a red disc", "a blue cross"]
    assert len(list(tmp_path.glob("phone-*.mp4"))) == 4
    assert phone.summary()["denoiser_stage0"] == snr
    assert phone_sections(tmp_path, None, videos, []) == []


def test_hexagon_figures_or_a_reason(tmp_path, monkeypatch):
    from nd_jax.converters.hexagon import extra
    from nd_jax.demo_hexagon import hexagon_figures, hexagon_section

    monkeypatch.setattr(extra.importlib.util, "find_spec", lambda name: None)
    told = []
    found = hexagon_figures(tmp_path, told.append)
    assert found.startswith("not run here: npu: the package onnxruntime-qnn is missing")
    assert "not run here" in told[0]
    entry = {"qnn_ops": 7, "transposes": 1, "bytes": 1_500_000}
    entry["snr"] = {"emulator_to_fp32": 41.04, "cpu_to_fp32": 41.2}
    assert hexagon_section({"decoder": entry}).rows == [["decoder", "7", "1", "1.50", "41.0", "41.2"]]


WITHOUT_ONNX = """
import sys
sys.modules["onnx"] = None
from nd_jax.demo_phone import phone_bundle
print(phone_bundle("bundle", None, ["a"], ["b"], 0, print))
"""


def test_without_the_extra_it_says_so(tmp_path):
    command = [sys.executable, "-c", WITHOUT_ONNX]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300).stdout
    assert "not run here" in told
    assert "nd-jax[npu]" in told
    assert told.endswith("None\n")
    assert list(tmp_path.iterdir()) == []
