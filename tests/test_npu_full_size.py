"""Full-size graphs without their numbers: what must hold of their shapes."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from nd_jax.converters.bundle.full_size import decoder_costs, denoiser_costs, layout_bytes
from nd_jax.models.functional import count_parameters
from nd_jax.models.mmdit import MMDiTConfig, definition


def test_denoiser():
    costs, config = denoiser_costs(), MMDiTConfig()
    kept, apart = costs.split[0].parameters, costs.conditioning.parameters
    ones = config.width  # the scale of norms that have none
    unread = config.width * (config.width + 1) + config.attention_head_dim  # text queries of the last block
    assert kept + apart == count_parameters(definition(config).abstract()) + ones - unread
    assert apart / (kept + apart) > 0.33
    assert {each.parameters for each in (*costs.split, *costs.whole)} == {kept}
    for split, whole in zip(costs.split, costs.whole, strict=True):
        assert split.macs < whole.macs
        assert split.attention_bytes < whole.attention_bytes
        assert split.operators["Transpose"] == whole.operators["Transpose"] == 0
    assert costs.split[2].value_bytes < 0.85 * costs.whole[2].value_bytes
    assert costs.whole[0].value_bytes < costs.split[0].value_bytes, "many short clips: one mask is lighter"
    assert "weights per denoiser call" in costs.lines()[0]


def test_decoder_copies_no_layout():
    counts = decoder_costs()
    assert layout_bytes(counts) < 10e6
    assert counts.operators["Transpose"] == 1 + 9 + 9 + 8, "at inputs and outputs alone"
    assert 8.5e6 < counts.parameters < 12e6
