"""One full-width block of every stage, from random weights to a binary."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_qnn")

import numpy as np
import onnx

from nd_jax.converters.hexagon.full_size import part_graph, random_params, write_graph
from nd_jax.converters.hexagon.jobs import run_worker
from nd_jax.converters.hexagon.trace import read_facts
from nd_jax.converters.hexagon.worker import CONTEXT, TRACE
from nd_jax.converters.hexagon.wrapper import BINARY, read_wrapper
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.system import ADAPTER, DENOISER
from nd_jax.pyramid.layout import envelopes
from nd_jax.recipes.preset import load_preset

BLOCKS = 2
"""The last of them has no text queries: a block of each kind."""


def system(**changes):
    whole = load_preset("neodragon_320p").system
    return dataclasses.replace(whole, diffusion_transformer=MMDiTConfig(num_layers=BLOCKS, **changes))


def test_random_weights_depend_on_their_network_alone():
    config = system(attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8)
    alone, together = random_params(config, (DENOISER,)), random_params(config, (ADAPTER, DENOISER))
    kernel = alone[DENOISER]["norm_out"]["linear"]["kernel"]
    np.testing.assert_array_equal(kernel, together[DENOISER]["norm_out"]["linear"]["kernel"])
    assert kernel.dtype == np.float16
    assert 0.2 < float(kernel.astype(np.float32).std()) * np.sqrt(kernel.shape[0]) < 2


@pytest.mark.heavy
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_full_width_block(stage, tmp_path):
    graph, precision = part_graph(system(), f"denoiser_stage{stage}", envelopes(6, 128, 40, 64), 128, 77)
    model = write_graph(tmp_path, graph, precision)
    assert len(onnx.load(model, load_external_data=False).graph.node) > len(graph.nodes)
    run_worker("compile", {"model": str(model), "number": 69}, tmp_path, timeout=1800, what="a block")
    facts = read_facts(tmp_path / TRACE, "a block")
    weights = sum(int(np.prod(w.shape)) for name, w in graph.weights.items() if not name.startswith("integers/"))
    size = (tmp_path / read_wrapper(tmp_path / CONTEXT)[1][BINARY]).stat().st_size
    assert facts.unsupported == []
    assert "Transpose" not in facts.operators
    assert weights < size < 1.2 * weights, "a byte a weight, and little else"
