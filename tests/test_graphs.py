"""ONNX graphs against the JAX networks they come from, and the rules that a phone's compiler sets."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import tiny_system
from npu_systems import STUDENT, denoiser, random_system

from nd_jax.converters.graphs import host, references
from nd_jax.converters.graphs.attention import query_groups, to_halves
from nd_jax.converters.graphs.builder import DataFile, Graph
from nd_jax.converters.graphs.conditioning import conditioning_graph
from nd_jax.converters.graphs.layers import activation
from nd_jax.converters.graphs.mmdit import modulations, stage_graph
from nd_jax.converters.graphs.parity import LEAST, check_part, save_part
from nd_jax.converters.graphs.parts import codec_parts, system_parts, text_parts
from nd_jax.converters.graphs.session import run_graph, snr
from nd_jax.converters.graphs.t5 import t5_graph
from nd_jax.errors import UserError
from nd_jax.models import clip, context_adapter, mmdit, t5
from nd_jax.models.activations import ACTIVATIONS
from nd_jax.models.system import SystemConfig
from nd_jax.pyramid.layout import REAL, envelopes, layout_arrays

LIGHT = (
    *("text_encoder_3", "text_encoder", "text_encoder_2", "adapter", "conditioning"),
    *("denoiser_stage2", "vae_encoder", "decoder"),
)
HEAVY = ("denoiser_stage0", "denoiser_stage1")
REFUSED = {"Shape", "Gather", "GatherND", "Where", "ConstantOfShape", "Expand", "Einsum", "ScatterND", "Loop", "If"}


def philox(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def check(graph: Graph, sample, *, samples: int = 1) -> dict[str, np.ndarray]:
    rng, outputs = philox(), {}
    for _ in range(samples):
        inputs, reference = sample(rng)
        outputs = run_graph(graph, inputs)
        assert reference.keys() <= outputs.keys()
        for name, expected in reference.items():
            assert snr(expected, outputs[name]) >= LEAST, name
    return outputs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every graph of the student, written side by side as in a bundle."""
    folder = tmp_path_factory.mktemp("graphs")
    parts = list(system_parts(STUDENT, random_system(), envelopes(2, 12, 8, 16, patch_size=1), 12, 12))
    files = {name: DataFile(folder / f"{name}.data") for name in {part.data for part in parts}}
    paths = {part.name: save_part(part, folder, files[part.data]) for part in parts}
    for file in files.values():
        file.__exit__()
    return {part.name: part for part in parts}, paths


def test_graphs_of_a_system(saved):
    stages = ("denoiser_stage0", "denoiser_stage1", "denoiser_stage2")
    assert list(saved[0]) == [*LIGHT[:5], *stages, *LIGHT[6:]]


@pytest.mark.parametrize("name", [*LIGHT, *(pytest.param(name, marks=pytest.mark.heavy) for name in HEAVY)])
def test_every_graph_agrees_with_jax(saved, name):
    parts, paths = saved
    assert check_part(parts[name], paths[name]) >= LEAST


def test_rules_of_the_compiler(saved):
    parts, paths = saved
    for name, path in paths.items():
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(str(path))
        assert 17 <= model.opset_import[0].version <= 23
        assert len(model.opset_import) == 1
        assert not {node.op_type for node in model.graph.node} & REFUSED, name
        values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
        for value in values:
            sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            assert len(sizes) <= 4, value.name
            assert all(sizes), value.name
        made = {output for node in model.graph.node for output in node.output}
        assert made <= {value.name for value in values}, "shapes of all values are written down"
        places = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places <= {f"{parts[name].data}.data"}
        assert path.stat().st_size < 1 << 20
        assert len({node.name for node in model.graph.node}) == len(model.graph.node)
        for tensor in onnx.load(path).graph.initializer:
            assert np.isfinite(onnx.numpy_helper.to_array(tensor)).all()


def test_weights_are_called_as_in_the_parameter_tree(saved):
    _, paths = saved
    graph = onnx.load(paths["denoiser_stage2"]).graph
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tree = random_system()["diffusion_transformer"]
    np.testing.assert_array_equal(weights["blocks/1/ff/up/kernel"], tree["blocks"]["ff"]["up"]["kernel"][1])
    np.testing.assert_array_equal(weights["last_block/attn/to_out/bias"], tree["last_block"]["attn"]["to_out"]["bias"])
    assert any(node.name == "blocks/1/ff/linear" for node in graph.node)


def test_stages_share_one_file_of_weights(saved):
    _, paths = saved
    models = [onnx.load(paths[f"denoiser_stage{k}"], load_external_data=False) for k in range(3)]
    placed = [
        {t.name: [(e.key, e.value) for e in t.external_data] for t in m.graph.initializer if t.external_data}
        for m in models
    ]
    assert placed[0] == placed[1] == placed[2]
    stored = sum(int(dict(entries)["length"]) for entries in placed[0].values())
    assert stored <= paths["denoiser_stage0"].with_name("denoiser.data").stat().st_size < 3 * stored


def test_stages_transpose_nothing(saved):
    parts, _ = saved
    for stage in range(3):
        assert "Transpose" not in {node.op_type for node in parts[f"denoiser_stage{stage}"].graph.nodes}


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": "layer_norm", "use_temporal_causal": False},
        {"context_embedder": True, "interp_condition_pos": False},
        pytest.param({}, marks=pytest.mark.heavy),
        pytest.param({"qk_norm": None}, marks=pytest.mark.heavy),
    ],
    ids=str,
)
def test_variants_of_the_denoiser(changes):
    config = denoiser(**changes)
    params = tiny_system.random_params(mmdit.definition(config))
    envelope = envelopes(3, 6, 16, 24)[2]
    check(stage_graph(config, params, envelope, "stage"), references.stage(config, params, envelope))


@pytest.mark.parametrize("stage", [2, *(pytest.param(k, marks=pytest.mark.heavy) for k in (0, 1))])
def test_split_attention_is_the_masked_one(stage):
    """Every unit index: prefixes of keys and one row of bias say as much as a mask over all pairs."""
    config = denoiser()
    params = tiny_system.random_params(mmdit.definition(config))
    envelope = envelopes(3, 6, 16, 24)[stage]
    split, whole = (stage_graph(config, params, envelope, "stage", split=each) for each in (True, False))
    rng = philox()
    inputs, _ = references.stage(config, params, envelope)(rng)
    inputs = {name: x for name, x in inputs.items() if not name.startswith("bias")}
    for unit in range(4):
        layout = layout_arrays(envelope, unit, np.array([[1, 1, 1, 0, 0, 0]]))
        times, real = np.asarray(layout.times[0]), np.asarray(layout.segments[0]) == REAL
        found = [
            run_graph(graph, inputs | host.biases(envelope, times, real, split=each))["velocity"]
            for graph, each in ((split, True), (whole, False))
        ]
        assert snr(*found) > LEAST


def test_groups_of_queries_cover_all_tokens():
    for envelope in envelopes(4, 6, 16, 24):
        groups = query_groups(envelope)
        assert [group.start for group in groups] == [0, *(group.stop for group in groups[:-1])]
        assert groups[-1].stop == envelope.length
        assert math.prod([group.rows for group in groups[1:]]) == groups[1].rows, "single frames need one row"


def test_halves_keep_products():
    x, y = philox().standard_normal((2, 5, 24), np.float32)
    turn = to_halves(3, 8)
    np.testing.assert_allclose((turn(x) * turn(y)).sum(-1), (x * y).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(turn(np.arange(24.0)[None])[0, :8], [0, 2, 4, 6, 1, 3, 5, 7])


def test_conditioning_gives_every_vector_of_the_stages():
    config = denoiser()
    params = tiny_system.random_params(mmdit.definition(config))
    graph = conditioning_graph(config, params)
    check(graph, references.conditioning(config, params))
    vectors = {f"{norm}/{chunk}" for norm, chunks in modulations(params) for chunk in chunks}
    assert graph.outputs.keys() == vectors
    assert vectors <= stage_graph(config, params, envelopes(2, 6, 16, 24)[0], "stage").inputs.keys()


@pytest.mark.heavy
def test_native_decoder(tmp_path):
    params = random_system(tiny_system.CONFIG)
    parts = list(codec_parts(tiny_system.CONFIG, params, 2, 4))
    assert [part.name for part in parts] == ["vae_encoder", "decoder_first", "decoder"]
    for part in parts[1:]:
        assert check_part(part, save_part(part, tmp_path)) >= LEAST
    assert len(parts[1].graph.outputs) < len(parts[2].graph.outputs)


def test_t5_stays_within_half_floats():
    """Its residual stream at 1/16: a prompt whose states reach 500 000 stays below 65 504 in the graph."""
    config = t5.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, out_dim=24)
    params = tiny_system.random_params(t5.definition(config))
    params["shared"]["embedding"] = params["shared"]["embedding"] * 1e5
    graph = t5_graph(config, params, 6)
    last = "encoder/block/1/layer/1/out"
    graph.outputs[last] = graph.values[last]
    outputs = check(graph, references.t5(config, params, 6))
    assert 3e4 / 16 < abs(outputs[last]).max() < 65504


@pytest.mark.parametrize("gated", [True, False])
def test_t5_without_projection(gated):
    form = {} if gated else {"feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False}
    config = t5.T5Config(20, 16, 8, 32, 1, 2, out_dim=None, **form)
    params = tiny_system.random_params(t5.definition(config))
    check(t5_graph(config, params, 6), references.t5(config, params, 6))


def test_towers_without_projection_and_with_penultimate_states():
    from nd_jax.converters.graphs.clip import clip_graph

    config = dataclasses.replace(tiny_system.CONFIG.text_encoder, with_projection=False, num_hidden_layers=2)
    params = tiny_system.random_params(clip.definition(config))
    graph = clip_graph(config, params, 12, "clip", penultimate=True)
    outputs = check(graph, references.clip(config, params, 12))
    assert outputs["penultimate"].shape == (12, 16)


def test_teachers_embed_text_themselves():
    config = SystemConfig(denoiser(context_embedder=True), tiny_system.CONFIG.causal_video_vae)
    params = {"diffusion_transformer": tiny_system.random_params(mmdit.definition(config.diffusion_transformer))}
    [part] = text_parts(config, params, 6, 6)
    assert (part.name, part.precision) == ("adapter", "fp16")
    check(part.graph, part.sample)


@pytest.mark.parametrize("pre", [True, False])
def test_adapters(pre):
    from nd_jax.converters.graphs.adapter import adapter_graph

    config = context_adapter.ContextAdapterConfig(16, 12, (8, 10), (True, False), pre_activation=pre)
    params = tiny_system.random_params(context_adapter.definition(config))
    check(adapter_graph(config, params, 7), references.adapter(config, params, 7))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    graph, x = Graph("activation"), philox().standard_normal((3, 64), np.float32) * 4
    graph.output("y", activation(graph, name, graph.input("x", 3, 64)))
    assert snr(np.asarray(ACTIVATIONS[name](x)), run_graph(graph, {"x": x})["y"]) > LEAST


def test_what_cannot_be_a_graph_is_refused(tmp_path):
    graph = Graph("bad")
    with pytest.raises(UserError, match="at most 4 axes"):
        graph.input("x", 1, 1, 1, 1, 1)
    with pytest.raises(UserError, match="cannot take the shape"):
        graph.reshape(graph.input("x", 2, 3), 4)
    with pytest.raises(UserError, match="activation 'cosine' has no graph"):
        activation(graph, "cosine", graph.input("z", 1))
    graph.output("y", graph.mul(graph.input("w", 99), graph.weight("scale", np.full(99, np.inf, np.float32))))
    with DataFile(tmp_path / "bad.data") as data, pytest.raises(UserError, match="scale is not finite"):
        graph.save(tmp_path / "bad.onnx", data)
