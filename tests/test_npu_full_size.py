"""Full-size graphs without their numbers: what must hold of their shapes."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from nd_jax.converters.bundle.full_size import decoder_costs, denoiser_costs, layout_bytes


def test_denoiser():
    costs = denoiser_costs()
    kept, apart = costs.split[0].parameters, costs.conditioning.parameters
    # 1.512 billion without the context embedder; constants of the graphs come on top
    assert 1.511e9 < kept + apart < 1.513e9
    assert 0.3 < apart / (kept + apart) < 0.36
    assert {each.parameters for each in costs.split} == {kept}
    for split, whole in zip(costs.split, costs.whole, strict=True):
        assert split.macs < whole.macs
        assert split.attention_bytes < 0.8 * whole.attention_bytes
        assert split.operators["Transpose"] == 18
        assert split.layout["Transpose"] == whole.layout["Transpose"]
    assert "weights per denoiser call" in costs.lines()[0]


def test_decoder_copies_no_layout():
    counts = decoder_costs()
    assert layout_bytes(counts) < 10e6
    assert counts.operators["Transpose"] == 1 + 9 + 9 + 8, "at inputs and outputs alone"
    assert 8.5e6 < counts.parameters < 12e6
