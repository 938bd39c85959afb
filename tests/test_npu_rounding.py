"""Learned rounding (AIMET, an extra) inside our own W8A16 form."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from nd_jax.converters.bundle.encodings import Encoding, quantise, weight_encoding
from nd_jax.converters.bundle.quantise import quantise_graph
from nd_jax.converters.bundle.ranges import value_ranges
from nd_jax.converters.bundle.rounding import Rounding, check_aimet, combined, rounded_weights
from nd_jax.converters.graphs.builder import DataFile
from nd_jax.converters.graphs.quicksrnet import quicksrnet_graph
from nd_jax.converters.graphs.session import open_session, run_session, snr
from nd_jax.errors import UserError
from nd_jax.models import quicksrnet


def philox(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def test_channels_that_are_all_bias_are_left_alone():
    """The learned scale and integers count, except where a bias needs a larger scale than its weights."""
    weight = philox().standard_normal((3, 2, 1, 1), np.float32)
    weight[1] *= 1e-7
    learned = weight_encoding(weight, 0).scale * np.float32(0.9)
    bias, after = np.array([0.1, 5.0, 0.0], np.float32), weight + learned.reshape(3, 1, 1, 1)
    integers, encoding = combined(weight, after, learned, 0, bias)
    ours = weight_encoding(weight, 0, bias=bias)
    np.testing.assert_array_equal(encoding.scale, [learned[0], ours.scale[1], learned[2]])
    np.testing.assert_array_equal(integers[1], quantise(weight, ours)[1])
    expected = np.clip(np.rint(weight[0] / learned[0]) + 1, -128, 127)
    np.testing.assert_array_equal(integers[0], expected)
    assert integers.dtype == np.int8


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    """A saved float32 graph of random weights, and recorded inputs."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("graph") / "upscaler.onnx"

    def layer(inputs, outputs):
        kernel = rng.standard_normal((3, 3, inputs, outputs)) / np.sqrt(9 * inputs)
        return {"kernel": kernel.astype(np.float32), "bias": rng.standard_normal(outputs).astype(np.float32) * 0.1}

    params = {"cnn": {"0": layer(3, 6), "2": layer(6, 6)}, "conv_last": layer(6, 12)}
    with DataFile(path.with_suffix(".data")) as data:
        quicksrnet_graph(quicksrnet.QuickSRNetConfig(6, 1), params, 12, 12).save(path, data)
    return path, [{"image": rng.random((1, 12, 12, 3)).astype(np.float32)} for _ in range(3)]


def written(upscaler, rounded=None):
    """SNR of the W8A16 form with these integers."""
    (path, runs), target = upscaler, upscaler[0].with_name("upscaler.w8a16.onnx")
    with DataFile(target.with_suffix(".data")) as data:
        quantise_graph(path, target, data, value_ranges(path, runs), rounded=rounded)
    sessions = open_session(path), open_session(target)
    outputs = [np.stack([run_session(each, run)["larger"] for run in runs]) for each in sessions]
    return snr(*outputs)


def test_given_integers_are_what_is_written(upscaler):
    """Integers of another scale go into the graph as they are: coarser ones cost what they must."""
    import onnx
    from onnx import numpy_helper

    def weights(path):
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}

    name = "conv_last/kernel"
    weight = weights(upscaler[0])[name]
    encoding = weight_encoding(weight, 0)
    coarse = Encoding(encoding.scale * np.float32(16), encoding.zero, 0)
    plain = written(upscaler)
    worse = written(upscaler, {name: (quantise(weight, coarse), coarse)})
    stored = weights(upscaler[0].with_name("upscaler.w8a16.onnx"))
    np.testing.assert_array_equal(stored[f"{name}/int8"], quantise(weight, coarse))
    assert 3 < plain - worse < 40


@pytest.mark.heavy
@pytest.mark.parametrize("method", ["adaround", "seqmse"])
def test_learned_rounding(upscaler, method):
    """Integers stay near the nearest ones, and the graph's outputs come closer."""
    pytest.importorskip("aimet_onnx")
    path, runs = upscaler
    found = rounded_weights(path, runs, Rounding(method, iterations=60))
    assert {"cnn/0/kernel", "conv_last/kernel"} <= found.keys()
    for integers, encoding in found.values():
        assert integers.dtype == np.int8
        assert encoding.scale.shape == (integers.shape[0],)
    plain, learned = written(upscaler), written(upscaler, found)
    assert learned > plain


def test_without_the_package(monkeypatch, tmp_path, refused):
    monkeypatch.setitem(sys.modules, "aimet_onnx", None)
    with pytest.raises(UserError, match=r"aimet-onnx .*nd-jax\[aimet\]"):
        check_aimet()
    refused("npu", "build", "--out", tmp_path / "new", "--rounding", "adaround", told="nd-jax[aimet]")
    assert not (tmp_path / "new").exists()
