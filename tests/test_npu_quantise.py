"""Recordings, encodings and W8A16 graphs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from npu_systems import student_system
from onnx import numpy_helper

from nd_jax.converters.bundle.analysis import of_graph
from nd_jax.converters.bundle.calibration import Recorder, open_calibration
from nd_jax.converters.bundle.deploy import by_effect, fewest
from nd_jax.converters.bundle.encodings import activation_encoding, dequantise, quantise, weight_encoding
from nd_jax.converters.bundle.inspect import facts, of_bundle, report, resident
from nd_jax.converters.bundle.ranges import value_ranges
from nd_jax.converters.graphs.builder import Graph
from nd_jax.converters.graphs.session import open_session, run_session, snr
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.converters.runtime.pipeline import Pipeline
from nd_jax.errors import UserError
from nd_jax.npu_workflow import build_bundle, quantised, read_overrides, record_bundle

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "cross", "square", "disc")]


def philox(seed=0):
    return np.random.Generator(np.random.Philox(seed))


# ---- encodings


def test_activations_hold_zero_and_both_ends():
    for low, high in ((-3.0, 5.0), (1.0, 2.0), (-2.0, -1.0), (0.0, 0.0)):
        encoding = activation_encoding(low, high)
        ends = np.array([low, 0.0, high], np.float32)
        back = dequantise(quantise(ends, encoding), encoding)
        np.testing.assert_allclose(back, ends, atol=float(encoding.scale))
        assert back[1] == 0
        assert encoding.zero.dtype == np.uint16


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_have_a_scale_for_every_channel(axis):
    weight = philox().standard_normal((6, 5), np.float32) * np.logspace(-3, 1, 5 + (axis == 0))[
        (slice(None), None) if axis == 0 else (None, slice(None))
    ].astype(np.float32)
    encoding = weight_encoding(weight, axis)
    integers = quantise(weight, encoding)
    assert integers.dtype == np.int8
    np.testing.assert_array_equal(np.abs(integers).max(axis=1 - axis), 127)
    error = np.abs(dequantise(integers, encoding) - weight).max(axis=1 - axis)
    assert (error <= encoding.scale * 0.501).all()


def test_channels_that_are_all_bias():
    """Their bias fits 32 bits behind inputs with a range of one; others are not touched by it."""
    weight, bias = np.array([[1e-6, 0.5], [-1e-6, 0.25]], np.float32), np.array([6.0, 0.1], np.float32)
    encoding = weight_encoding(weight, 1, bias=bias)
    assert 6.0 / (encoding.scale[0] / 65535) < 2**31
    assert encoding.scale[1] == weight_encoding(weight, 1).scale[1]


def test_recorders_keep_every_run_with_the_same_chance():
    counts = np.zeros(20)
    for seed in range(300):
        recorder = Recorder(5, seed)
        for run in range(20):
            recorder("graph", {"x": np.full(1, run)}, {})
        assert len(recorder.kept["graph"]) == 5
        for inputs, _ in recorder.kept["graph"]:
            counts[int(inputs["x"][0])] += 1
    assert 45 < counts.min() < counts.max() < 110


def test_ranges_see_every_value(tmp_path):
    from nd_jax.converters.graphs.builder import DataFile

    graph = Graph("graph")
    x = graph.input("x", 2, 3)
    graph.output("y", graph.add(graph.mul(x, graph.constant(2.0), "twice"), graph.constant(1.0)))
    with DataFile(tmp_path / "graph.data") as data:
        graph.save(tmp_path / "graph.onnx", data)
    runs = [{"x": np.full((2, 3), k, np.float32)} for k in (-1, 4)]
    assert value_ranges(tmp_path / "graph.onnx", runs) == {"x": (-1, 4), "twice": (-2, 8), "y": (-1, 9)}
    with pytest.raises(UserError, match="not finite"):
        value_ranges(tmp_path / "graph.onnx", [{"x": np.full((2, 3), 3e38, np.float32)}])


# ---- bundles


@pytest.fixture(scope="module")
def system(tiny_folder):
    return student_system(tiny_folder / "tokenizers", frames=9)


@pytest.fixture(scope="module")
def recordings(system, tmp_path_factory):
    folder = tmp_path_factory.mktemp("npu")
    bundle = build_bundle(system, folder / "float", check=False)
    (folder / "recordings").mkdir()
    record_bundle(Bundle(bundle), folder / "recordings", PROMPTS, samples=6, seed=1)
    return folder / "recordings"


@pytest.fixture(scope="module")
def bundle(system, recordings):
    then = quantised(recordings, [], samples=0, seed=0, overrides={})
    return Bundle(build_bundle(system, recordings.parent / "bundle", check=False, then=then))


def model_of(bundle, name, variant="w8a16"):
    return onnx.load(bundle.folder / bundle.graph_files(name, variant)[0])


def test_recordings_are_split_by_prompt(bundle, recordings):
    found = open_calibration(recordings, bundle.graphs)
    prompts = found.content["prompts"]
    assert prompts == {"calibration": PROMPTS[:6], "test": PROMPTS[6:]}
    state = [inputs["state/0"] for inputs in found.runs("decoder", "calibration")]
    assert any(each.any() for each in state), "the decoder's states are recorded at work"
    inputs, outputs = (list(found.runs("denoiser_stage1", "test", side)) for side in ("inputs", "outputs"))
    session = open_session(bundle.folder / bundle.graph_files("denoiser_stage1", "fp32")[0])
    assert snr(outputs[0]["velocity"], run_session(session, inputs[0])["velocity"]) > 100
    assert found.content["graphs"]["denoiser_stage1"]["test"]["inputs"]["positions"]["rows"] == 1, "stored once"


def test_quantised_graphs_are_close(bundle):
    for name, graph in bundle.graphs.items():
        key = "fp16_test" if graph["precision"] == "fp16" else "w8a16_test"
        assert graph["snr"][key] > 25, name
    bundle.check_all()


def test_integers_of_all_stages_are_the_same_bytes(bundle):
    stages = [
        {t.name: numpy_helper.to_array(t) for t in model_of(bundle, f"denoiser_stage{k}").graph.initializer}
        for k in range(3)
    ]
    weights = [name for name in stages[0] if name.endswith("/int8")]
    assert len(weights) > 30
    for name in weights:
        for other in stages[1:]:
            np.testing.assert_array_equal(stages[0][name], other[name])
            scale = name.replace("/int8", "/scale")
            np.testing.assert_array_equal(stages[0][scale], other[scale])
    files = {bundle.graph_files(f"denoiser_stage{k}", "w8a16")[1] for k in range(3)}
    assert files == {"graphs/denoiser.w8a16.data"}


def test_every_operator_is_between_integers(bundle):
    """Weights signed 8-bit by channel, norm scales unsigned 8-bit, values unsigned 16-bit, nothing left float."""
    for name, graph in bundle.graphs.items():
        if graph["precision"] != "w8a16":
            continue
        model = model_of(bundle, name).graph
        arrays = {t.name: numpy_helper.to_array(t) for t in model.initializer}
        makers = {output: node for node in model.node for output in node.output}
        for node in model.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                continue
            for index, value in enumerate(node.input):
                if not value or value.startswith("integers/") or (node.op_type == "Resize" and index):
                    continue
                real = makers[value]
                assert real.op_type == "DequantizeLinear", (name, node.name, value)
                integers = arrays.get(real.input[0])
                if integers is None:
                    continue
                if node.op_type in ("MatMul", "Gemm", "Conv") and index == 1:
                    channels = integers.shape[0 if node.op_type == "Conv" else 1]
                    assert arrays[real.input[1]].shape == (channels,)
                    assert integers.dtype in (np.int8, np.int16)
                elif node.op_type in ("RMSNormalization", "LayerNormalization") and index == 1:
                    assert integers.dtype == np.uint8
                else:
                    assert integers.dtype == (np.int32 if index == 2 else np.uint16)


def test_values_that_are_only_moved_keep_their_encoding(bundle):
    model = model_of(bundle, "denoiser_stage2").graph
    arrays = {t.name: numpy_helper.to_array(t) for t in model.initializer}
    scales = {n.output[0]: float(arrays[n.input[1]]) for n in model.node if n.op_type == "DequantizeLinear" and
              n.input[1] in arrays and arrays[n.input[1]].ndim == 0}  # fmt: skip
    moved = [n for n in model.node if n.op_type in ("Transpose", "Split", "Slice", "Reshape")]
    assert moved
    for node in moved:
        assert {scales[node.input[0]]} == {scales[name.removesuffix("/float")] for name in node.output}


def test_videos_of_integers(bundle):
    prompt = "a red circle on white"
    integers, floats = (Pipeline(bundle, precision=each) for each in ("deployed", "fp32"))
    a, b = (each.latents(each.encode_text(["", prompt]), each.noise(1, 0)) for each in (integers, floats))
    assert 15 < snr(b, a) < 80, "different arithmetic, nearly the same latents"
    sizes = [bundle.files[f"graphs/denoiser{kind}.data"]["bytes"] for kind in ("", ".w8a16")]
    assert sizes[1] < sizes[0] / 3


@pytest.mark.heavy
def test_overrides_name_layers(system, recordings, tmp_path):
    path = tmp_path / "overrides.json"
    path.write_text(json.dumps({"decoder": {"decoder/blocks/*": "int16", "decoder/blocks/1/*": "int8"}}))
    overrides = read_overrides(path)
    then = quantised(recordings, [], samples=0, seed=0, overrides=overrides)
    bundle = Bundle(build_bundle(system, tmp_path / "bundle", check=False, then=then))
    names = {tensor.name for tensor in model_of(bundle, "decoder").graph.initializer}
    assert {"decoder/blocks/3/conv/0/kernel/int8", "decoder/blocks/3/conv/0/kernel/rest/int8"} <= names
    assert "decoder/blocks/1/kernel/int8" in names
    assert "decoder/blocks/1/kernel/rest/int8" not in names
    path.write_text('{"decoder": {"*": "int4"}}')
    with pytest.raises(UserError, match="int8 or int16"):
        read_overrides(path)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c.update(format=9), "calibration format"),
        (lambda c: c["prompts"]["test"].append(PROMPTS[0]), "is in both splits"),
        (lambda c: c["graphs"].pop("decoder"), "no recordings of graph decoder"),
        (lambda c: c["graphs"]["decoder"]["calibration"].update(count=2), "2 samples of graph decoder"),
        (lambda c: c["graphs"]["decoder"]["test"]["inputs"]["latent"].update(shape=[1, 2, 2, 4]), "bundle's shapes"),
        (lambda c: c["graphs"]["decoder"]["test"]["inputs"]["latent"].update(file="../x.bin"), "not a file inside"),
        (lambda c: c["graphs"]["decoder"]["test"]["inputs"]["latent"].update(rows=10**12), "not what its shape takes"),
        (lambda c: c["graphs"]["decoder"].update(test=7), "not a calibration manifest"),
    ],
)
def test_recordings_that_do_not_fit(bundle, recordings, tmp_path, edit, told):
    copy = shutil.copytree(recordings, tmp_path / "copy")
    content = json.loads((copy / "calibration.json").read_text())
    edit(content)
    (copy / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=told):
        open_calibration(copy, bundle.graphs)


# ---- inspection


def test_inspection(bundle):
    subject = of_bundle(bundle)
    text = "\n".join(report(subject, ("sm8750",), ("adapter",)))
    assert all(name in text for name in bundle.graphs)
    assert "adapter inputs" in text
    assert "adapter: 2 Gemm" in text
    assert "decoder inputs" not in text
    assert "decoder inputs" in "\n".join(report(subject, details=True))
    steps = resident(subject)
    assert steps["denoise"][0] == bundle.files["graphs/denoiser.w8a16.data"]["bytes"], "shared weights count once"
    assert steps["denoise"][1] == max(subject.rows[f"denoiser_stage{k}"].counts.peak_bytes for k in range(3))
    assert steps["text"][0] == 2 * sum(subject.rows[name].counts.parameters for name in bundle["schedule"][0]["load"])
    adapter = subject.rows["adapter"]
    assert adapter.counts.macs == 12 * (16 * 16 + 32 * 16)
    assert set(adapter.ranges) == {"states", "text"}, "fp16 graphs have ranges too"
    assert 0 < adapter.largest < 65504
    found = json.loads(json.dumps(facts(subject, ("sm8750",))))["graphs"]["adapter"]
    assert found["operators"]["Gemm"] == 2
    assert found["inputs"] == {"states": [12, 16]}
    assert found["estimated_ms"]["sm8750"] > 0
    with pytest.raises(UserError, match="target 'sm1' is not known"):
        list(report(subject, ("sm1",)))
    with pytest.raises(UserError, match="no graph 'other'"):
        list(report(subject, (), ("other",)))


def test_values_alive_at_once():
    """A value lives from its maker to its last reader; a reshaped one is the same memory."""
    graph = Graph("graph")
    x = graph.input("x", 2, 4)  # 16 bytes, needed until the end
    y = graph.reshape(graph.unary("Exp", x), 4, 2)  # 16 more
    z = graph.concat([y, y], axis=1)  # 32 more; then y can go
    z = graph.slice(z, 1, 0, 1)  # 8, beside x and all of z
    graph.output("out", graph.add(graph.reshape(z, 1, 4), graph.slice(x, 0, 0, 1)))
    assert of_graph(graph).peak_bytes == 16 + 16 + 32


def test_commands(run, refused, bundle, tiny_folder, tmp_path):
    where = bundle.folder
    code, out, _ = run("npu", "inspect", "--bundle", where, "--target", "sm8750")
    assert code == 0
    assert "peak" in out
    video = tmp_path / "video.mp4"
    code, out, _ = run("npu", "run", "--bundle", where, "--prompt", "a red circle", "--out", video, "--guidance", 0)
    assert (code, out.strip()) == (0, str(video))
    refused("npu", "run", "--bundle", where, "--prompt", "a", "--out", video, told="exists")
    refused("npu", "run", "--bundle", tmp_path, "--prompt", "a", told="has no bundle.json")
    refused(
        "npu", "run", "--bundle", where, "--prompt", "a", "--steps", 1, 1, "--out", tmp_path / "x.mp4", told="3 step"
    )
    refused("npu", "inspect", "--bundle", where, "--target", "sm1", told="not known")
    refused("npu", "build", "--out", where, told="exists")
    refused("npu", "build", "--out", tmp_path / "new", "--videos", 2, told="--videos is 2")
    refused("npu", "build", "--checkpoint", tmp_path / "none", "--out", tmp_path / "new", told="does not exist")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("needed", [1, 2, 5, 8, 9])
def test_as_few_layers_as_it_takes_get_16_bits(needed):
    """Of eight; nine are more than there are. What was measured last, and is therefore on disk, is what is said."""
    seen = []

    def measured(chosen):
        seen.append(list(chosen))
        return 10.0 + 5 * len(chosen)

    chosen, found = fewest(list("abcdefgh"), measured, 10.0 + 5 * needed)
    assert list(chosen) == list("abcdefgh")[: min(needed, 8)] == seen[-1]
    assert set(chosen.values()) == {"int16"}
    assert len(seen) <= 6
    assert found == measured(chosen)


def test_layers_are_ordered_by_what_their_8_bits_cost():
    """Noise powers of four layers, of which those in 16 bits bring none."""
    noise = {"a": 1.0, "b": 9.0, "c": 0.1, "d": 3.0}

    def measured(chosen):
        return -10 * np.log10(sum(noise[name] for name in noise if name not in chosen) + 1e-9)

    order = by_effect(list(noise), measured)
    assert order == ["b", "d", "a", "c"]
    chosen, found = fewest(order, measured, measured(dict.fromkeys("bd", "int16")))
    assert (list(chosen), found) == (["b", "d"], pytest.approx(-10 * np.log10(1.1)))
