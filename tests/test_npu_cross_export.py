"""An exporter that knows nothing of ours: jax2onnx's graphs of the JAX networks give what our graphs give.

It is no extra, because it asks for an older Orbax than ours; the checks run where it was installed all the same.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

import jax
import jax.numpy as jnp
import onnxruntime
import tiny_system
from jax2onnx import to_onnx
from npu_systems import denoiser

from nd_jax.converters.graphs import references
from nd_jax.converters.graphs.adapter import adapter_graph
from nd_jax.converters.graphs.mmdit import stage_graph
from nd_jax.converters.graphs.session import run_graph, snr
from nd_jax.converters.graphs.t5 import t5_graph
from nd_jax.models import context_adapter, mmdit, t5
from nd_jax.pyramid.layout import envelopes, layout_arrays

LEAST = 90.0


def philox() -> np.random.Generator:
    return np.random.Generator(np.random.Philox(0))


def exported(function, *inputs: np.ndarray) -> np.ndarray:
    """The first output of jax2onnx's graph of a function of float32 arrays."""
    model = to_onnx(function, [x.shape for x in inputs])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {each.name: x for each, x in zip(session.get_inputs(), inputs, strict=True)})[0]


def test_adapter():
    config = context_adapter.ContextAdapterConfig(16, 12, (8, 10), (True, False))
    network = context_adapter.definition(config)
    params = tiny_system.random_params(network)
    x = philox().standard_normal((7, 16), np.float32)
    ours = run_graph(adapter_graph(config, params, 7), {"states": x})["text"]
    assert snr(exported(lambda x: network(params, x), x), ours) > LEAST


def test_t5():
    config = t5.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, out_dim=None)
    network = t5.definition(config)
    params = tiny_system.random_params(network)
    inputs, _ = references.t5(config, params, 6)(philox())
    mask = jnp.asarray(inputs["bias"][0] == 0)
    theirs = exported(lambda x: network.bind(params).encoder(x, mask), 16 * inputs["embeddings"][None])
    assert snr(theirs[0], run_graph(t5_graph(config, params, 6), inputs)["states"]) > LEAST


def test_denoiser(monkeypatch):
    """The whole denoiser at stage 0, conditioning included. What JAX would choose by platform is chosen here: jax2onnx
    has no such choice."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    config, envelope = denoiser(), envelopes(1, 6, 16, 24)[0]
    network = mmdit.definition(config)
    params = tiny_system.random_params(network)
    rng, mask, timestep = philox(), np.array([[1, 1, 1, 1, 0, 0]], np.int32), np.array([300.0], np.float32)
    clips = [rng.standard_normal((1, *clip, 4), np.float32) for clip in envelope.clips]
    text, pooled = (rng.standard_normal((1, *shape), np.float32) for shape in ((6, 16), (16,)))
    layout = layout_arrays(envelope, 1, mask)
    flat = mmdit.unstack(params)

    def whole(first, second, text, pooled, timestep):
        return network(flat, [[first, second]], text, pooled, timestep, [layout])[0]

    theirs = exported(whole, *clips, text, pooled, timestep)
    inputs = references.stage_inputs(config, params, envelope, layout, clips, text, timestep, pooled)
    ours = run_graph(stage_graph(config, params, envelope, "stage"), inputs)["velocity"]
    assert snr(references.patches(config, theirs), ours) > LEAST
