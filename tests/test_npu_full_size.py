"""Full-size graphs without their numbers: what must hold of their shapes."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from nd_jax.converters.bundle.full_size import decoder_costs, denoiser_costs, layout_bytes
from nd_jax.converters.bundle.inspect import of_full_size, report, resident
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


def test_whole_pipeline():
    """All graphs of the hybrid pipeline, what each step of the schedule holds, estimates beside the paper's."""
    subject = of_full_size()
    rows, told = subject.rows, "\n".join(report(subject))
    assert subject.full_size
    assert list(rows)[-3:] == ["unet", "image_decoder", "upscaler"]
    assert rows["unet"].counts.parameters == pytest.approx(1_331_334_404, rel=0.02), "and averages of groups"
    assert rows["upscaler"].ends["inputs"] == {"image": (1, 328, 520, 3)}
    assert "104.7" in told
    steps = resident(subject)
    assert sum(map(sum, steps.values())) > 0
    weights, values = map(max, zip(*steps.values(), strict=True))
    assert 1e9 < weights < 3.5e9
    assert values < 2e9
    assert all(sum(each) < 3.5e9 for each in steps.values()), "the paper's peak"


def test_decoder_copies_no_layout():
    counts = decoder_costs()
    assert layout_bytes(counts) < 10e6
    assert counts.operators["Transpose"] == 1 + 9 + 9 + 8, "at inputs and outputs alone"
    assert 8.5e6 < counts.parameters < 12e6
