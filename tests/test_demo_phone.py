"""What the demonstration shows of the student's bundle."""

from __future__ import annotations

import sys

import numpy as np

from nd_jax.demo_phone import Phone, phone_bundle, phone_sections


def test_sections_show_figures_and_videos(tmp_path):
    snr = {"fp32_to_jax": 120.5, "w8a16_test": 41.25, "goal": 29.0}
    graphs = {"denoiser_stage0": {"precision": "w8a16", "snr": snr}, "adapter": {"precision": "fp16", "snr": {}}}
    videos = np.zeros((2, 3, 16, 16, 3), np.uint8)
    phone = Phone(graphs, videos)
    table, gallery = phone_sections(tmp_path, phone, videos, ["a red disc", "a blue cross"])
    assert table.rows == [["denoiser_stage0", "w8a16", "120.5", "41.2", "29.0"], ["adapter", "fp16", "", "", ""]]
    assert [name for name, _ in gallery.rows] == ["a red disc", "a blue cross"]
    assert len(list(tmp_path.glob("phone-*.mp4"))) == 4
    assert phone.summary()["denoiser_stage0"] == snr
    assert phone_sections(tmp_path, None, videos, []) == []


def test_without_the_extra_it_says_so(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("nd_jax.converters.graphs", "nd_jax.npu_workflow"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    told = []
    assert phone_bundle(tmp_path / "bundle", None, ["a"], ["b"], 0, told.append) is None
    assert "not run here" in told[0]
    assert "nd-jax[npu]" in told[0]
