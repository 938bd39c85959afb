"""Torch folders to parameter trees and back: names, shapes, bytes, shardings, dtypes and messages."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nd_jax.converters.component import load_component, open_component, save_component
from nd_jax.converters.kinds import KINDS, abstract_tensors, kind_of, read_config
from nd_jax.converters.safetensors_io import read_tensors
from nd_jax.converters.safetensors_write import pending, write_checkpoint
from nd_jax.converters.tables import LINEAR, Rule, Table, flatten
from nd_jax.errors import UserError
from nd_jax.models.t5 import t5_xxl

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = Path(__file__).parent / "checkpoint_layout"
CASES = {
    "mmdit": "mmdit",
    "mmdit_teacher_pyramid_flow": "mmdit",
    "mmdit_variant_layer_norm_qk": "mmdit",
    "mmdit_variant_no_causal": "mmdit",
    "dt5_gated_gelu": "t5",
    "dt5_relu": "t5",
    "clip_text_gelu": "clip",
    "clip_text_quick_gelu": "clip",
    "context_adapter": "context_adapter",
    "context_adapter_variant": "context_adapter",
    "native_vae": "video_vae",
    "sdxl_unet": "unet",
    "sdxl_unet_variant_symmetric": "unet",
    "image_vae": "image_vae",
    "generation/checkpoint/causal_video_vae": "video_vae",
}
FULL_SIZE = {
    "pyramid_mmdit_18_blocks": ("mmdit", 1_512_155_200),
    "pyramid_mmdit_24_blocks": ("mmdit", 2_022_041_152),
    "teacher_pyramid_flow_mmdit_24_blocks": ("mmdit", 2_028_334_144),
    "asymmetric_causal_video_vae": ("video_vae", 119_543_507),
    "native_causal_video_vae": ("video_vae", 335_402_067),
    "context_adapter": ("context_adapter", 130_041_344),
    "text_encoder_2_clip_bigg": ("clip", 694_659_840),
    "text_encoder_3_distil_t5": ("t5", 129_551_488),
    "text_encoder_3_distil_t5_if_relu": ("t5", 129_551_488),
    "text_encoder_clip_l": ("clip", 123_650_304),
    "ssd_1b_unet": ("unet", 1_331_334_404),
    "ssd_1b_vae": ("image_vae", 83_653_863),
    "quicksrnet_small_2x": ("quicksrnet", 22_860),
    "quicksrnet_medium_2x": ("quicksrnet", 50_604),
    "quicksrnet_large_2x": ("quicksrnet", 414_972),
}
TWIN = "encoder.encoder.embed_tokens.weight"


def weights_of(case: str) -> dict[str, np.ndarray]:
    return read_tensors(next((GOLDEN / case).glob("*.safetensors")))


def write(folder: Path, config: dict, tensors: dict[str, np.ndarray], stem: str = "model") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_checkpoint(folder, stem, [pending(name, array) for name, array in tensors.items()])
    return folder


def config_of(case: str) -> dict:
    return json.loads((GOLDEN / case / "config.json").read_text())


def assert_same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert array.dtype == two[name].dtype, name
        assert array.shape == two[name].shape, name
        assert array.tobytes() == two[name].tobytes(), name


def assert_same_tree(one: dict, two: dict) -> None:
    as_dict = [{"/".join(path): np.asarray(leaf) for path, leaf in flatten(tree)} for tree in (one, two)]
    assert_same(*as_dict)


@pytest.mark.parametrize("case", CASES)
def test_import_and_export_are_byte_equal(tmp_path, case):
    stored = weights_of(case)
    config, params = load_component(GOLDEN / case)
    kind = kind_of(config)
    assert kind.name == CASES[case]
    found = {path: leaf.shape for path, leaf in flatten(params)}
    assert found == {path: leaf.shape for path, leaf in flatten(kind.definition(config).abstract())}

    save_component(tmp_path / "official", config, params)
    stored.pop(TWIN, None)
    assert_same(stored, read_tensors(tmp_path / "official" / f"{kind.stem}.safetensors"))
    again, params_again = load_component(tmp_path / "official")
    assert again == config
    assert_same_tree(params, params_again)

    save_component(tmp_path / "native", config, params, native=True, shard_size=20_000)
    native, params_native = load_component(tmp_path / "native")
    assert native == config
    assert_same_tree(params, params_native)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("case", ["mmdit", "clip_text_gelu"])
def test_narrow_checkpoints_stay_narrow(tmp_path, case, dtype):
    stored = {name: array.astype(dtype) for name, array in weights_of(case).items()}
    config, params = load_component(write(tmp_path / "in", config_of(case), stored))
    save_component(tmp_path / "out", config, params, shard_size=30_000)
    exported = {}
    for file in (tmp_path / "out").glob("*-of-*.safetensors"):
        exported |= read_tensors(file)
    assert_same(stored, exported)


def test_conversion_between_dtypes(tmp_path):
    stored = weights_of("context_adapter")
    config, narrow = load_component(GOLDEN / "context_adapter", dtype="bf16")
    save_component(tmp_path / "bf16", config, narrow)
    assert_same(
        {name: array.astype(ml_dtypes.bfloat16) for name, array in stored.items()},
        read_tensors(tmp_path / "bf16" / "diffusion_pytorch_model.safetensors"),
    )
    config, params = load_component(GOLDEN / "context_adapter")
    save_component(tmp_path / "fp16", config, params, dtype="fp16")
    assert_same(
        {name: array.astype(np.float16) for name, array in stored.items()},
        read_tensors(tmp_path / "fp16" / "diffusion_pytorch_model.safetensors"),
    )
    config, wide = load_component(tmp_path / "bf16", dtype="fp32")
    assert {leaf.dtype for _, leaf in flatten(wide)} == {np.dtype("float32")}
    with pytest.raises(UserError, match="fp32, bf16, fp16"):
        load_component(GOLDEN / "context_adapter", dtype="int8")


def test_fp16_overflow_is_an_error(tmp_path):
    stored = weights_of("context_adapter")
    stored["network_layers.1.1.bias"][3] = 70000.0
    folder = write(tmp_path / "in", config_of("context_adapter"), stored)
    with pytest.raises(UserError, match=r"network_layers\.1\.1\.bias.*65504"):
        load_component(folder, dtype="fp16")
    config, params = load_component(folder)
    with pytest.raises(UserError, match="65504"):
        save_component(tmp_path / "out", config, params, dtype="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("vae_encoder", ("encoder", "quant_conv")),
        ("vae_decoder", ("decoder", "post_quant_conv")),
        ("vae_decoder_variant_partial_time", ("decoder", "post_quant_conv")),
    ],
)
def test_parts_of_a_codec(case, parts):
    stored = weights_of(case)
    _, params = load_component(GOLDEN / case, parts=parts)
    assert params.keys() == set(parts)
    assert sum(leaf.size for _, leaf in flatten(params)) == sum(array.size for array in stored.values())
    with pytest.raises(UserError, match="is missing"):
        load_component(GOLDEN / case)
    with pytest.raises(UserError, match="post_quant_conv"):
        load_component(GOLDEN / case, parts=("middle",))


@pytest.mark.parametrize("layout", FULL_SIZE)
def test_full_size_layouts_both_ways(layout):
    kind, count = FULL_SIZE[layout]
    content = json.loads((LAYOUTS / f"{layout}.json").read_text())
    found = {name: tuple(shape) for name, shape in content["tensors"].items()}
    config = read_config(KINDS[kind], content["config"], layout, set(found))
    table = KINDS[kind].table(config)
    assert {name: shape for name, (shape, _) in abstract_tensors(kind, config).items()} == {
        name: shape for name, shape in found.items() if name != TWIN
    }
    abstract = {path: leaf.shape for path, leaf in flatten(KINDS[kind].definition(config).abstract())}
    assert table.path_shapes(found, layout) == abstract
    assert sum(map(math.prod, abstract.values())) == count == content["total_parameters"]
    official = config.to_dict()
    assert {key: official.get(key) for key in content["config"] if key in official} == {
        key: value for key, value in content["config"].items() if key in official
    }


def test_t5_xxl_names():
    config = t5_xxl()
    tensors = abstract_tensors("t5", config)
    assert tensors["shared.weight"][0] == (32128, 4096)
    assert tensors["encoder.block.23.layer.1.DenseReluDense.wi_1.weight"][0] == (10240, 4096)
    assert tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][0] == (32, 64)
    assert len(tensors) == 24 * 9 + 3
    assert sum(math.prod(shape) for shape, _ in tensors.values()) == 4_762_310_656


def plain_t5(tmp_path: Path, **more: np.ndarray) -> Path:
    stored = {
        name.removeprefix("encoder."): array
        for name, array in weights_of("dt5_relu").items()
        if name.startswith("encoder.")
    }
    drop = ("out_dim", "project_in_dim", "project_out_dim")
    config = {key: value for key, value in config_of("dt5_relu").items() if key not in drop}
    return write(tmp_path / "t5", config | {"architectures": ["T5ForConditionalGeneration"]}, stored | more)


def test_plain_t5_and_its_decoder(tmp_path):
    folder = plain_t5(tmp_path, **{"decoder.block.0.x": np.zeros(3, "<f4"), "lm_head.weight": np.zeros(3, "<f4")})
    config, params = load_component(folder)
    _, projected = load_component(GOLDEN / "dt5_relu")
    assert config.out_dim is None
    del projected["final_projection"]
    assert_same_tree(params, projected)
    save_component(tmp_path / "out", config, params)
    names = read_tensors(tmp_path / "out" / "model.safetensors").keys()
    assert "shared.weight" in names
    assert not any(name.startswith(("decoder", "lm_head")) or "embed_tokens" in name for name in names)
    assert load_component(tmp_path / "out")[0] == config


def test_tied_twin(tmp_path):
    stored, config = weights_of("dt5_relu"), config_of("dt5_relu")
    _, params = load_component(GOLDEN / "dt5_relu")
    first = "encoder.shared.weight"
    only_second = {name: array for name, array in stored.items() if name != first}
    assert_same_tree(load_component(write(tmp_path / "second", config, only_second))[1], params)
    only_first = {name: array for name, array in stored.items() if name != TWIN}
    assert_same_tree(load_component(write(tmp_path / "first", config, only_first))[1], params)
    different = stored | {TWIN: stored[first] + 1}
    with pytest.raises(UserError, match="differ in this checkpoint"):
        load_component(write(tmp_path / "different", config, different))
    neither = {name: array for name, array in only_first.items() if name != first}
    with pytest.raises(UserError, match=r"encoder\.shared\.weight' is missing"):
        load_component(write(tmp_path / "neither", config, neither))


def test_clip_without_projection_and_old_position_ids(tmp_path):
    stored = weights_of("clip_text_gelu")
    del stored["text_projection.weight"]
    stored["text_model.embeddings.position_ids"] = np.arange(77)[None]
    config = config_of("clip_text_gelu") | {"architectures": ["CLIPTextModel"]}
    loaded, params = load_component(write(tmp_path / "in", config, stored))
    assert "text_projection" not in params
    save_component(tmp_path / "out", loaded, params)
    del stored["text_model.embeddings.position_ids"]
    assert_same(stored, read_tensors(tmp_path / "out" / "model.safetensors"))


def test_wrapped_training_checkpoint(tmp_path):
    case = "mmdit_teacher_pyramid_flow"
    stored = {f"dit.{name}": array for name, array in weights_of(case).items()}
    stored |= {"vae.encoder.x": np.zeros(3, "<f4"), "text_encoder.shared.weight": np.zeros(3, "<f4")}
    config, params = load_component(write(tmp_path / "in", config_of(case), stored))
    plain, expected = load_component(GOLDEN / case)
    assert config == plain
    assert config.context_embedder
    assert_same_tree(params, expected)


def test_missing_surplus_and_misshapen_keys(tmp_path):
    stored, config = weights_of("mmdit"), config_of("mmdit")
    for number, name in enumerate(sorted(stored)):
        less = {other: array for other, array in stored.items() if other != name}
        if number % 7 == 0 or name == "pos_embed.pos_embed":
            with pytest.raises(UserError) as caught:
                load_component(write(tmp_path / f"less{number}", config, less))
            assert f"key '{name}' is missing" in str(caught.value)
            assert str(list(stored[name].shape)) in str(caught.value)
    with pytest.raises(UserError, match=r"'transformer_blocks\.9\.x' of shape \[3\] is not expected"):
        load_component(write(tmp_path / "more", config, stored | {"transformer_blocks.9.x": np.zeros(3, "<f4")}))
    name = "transformer_blocks.1.attn.to_q.weight"
    for shape in [(64, 65), (4096,), (64, 64, 1)]:
        wrong = stored | {name: np.zeros(shape, "<f4")}
        with pytest.raises(UserError) as caught:
            load_component(write(tmp_path / f"shape{len(shape)}", config, wrong))
        assert f"key '{name}' has shape {list(shape)}; expected [64, 64]" in str(caught.value)
    renamed = {key.replace("to_q", "query"): array for key, array in stored.items()}
    with pytest.raises(UserError, match=r"to_q.* is missing .*; it has '.*query"):
        load_component(write(tmp_path / "renamed", config, renamed))


def test_projections_cannot_be_missing(tmp_path):
    for case, names in (
        ("clip_text_gelu", ["text_projection.weight"]),
        ("dt5_relu", ["final_projection.0.weight", "final_projection.3.weight"]),
    ):
        stored = {name: array for name, array in weights_of(case).items() if name not in names}
        with pytest.raises(UserError, match=f"{names[0]}' is missing"):
            load_component(write(tmp_path / case, config_of(case), stored))


def test_depth_in_config_and_weights_must_agree(tmp_path):
    stored, config = weights_of("mmdit"), config_of("mmdit")
    with pytest.raises(UserError, match=r"transformer_blocks\.\d.* is missing"):
        load_component(write(tmp_path / "deeper", config | {"num_layers": 4}, stored))
    with pytest.raises(UserError, match="transformer_blocks"):
        load_component(write(tmp_path / "shallower", config | {"num_layers": 2}, stored))
    for value in (10**9, -1, "3", None, 2.5, [3]):
        with pytest.raises(UserError, match="num_layers"):
            load_component(write(tmp_path / f"odd{value}", config | {"num_layers": value}, stored))
    for case, key in (("dt5_relu", "num_layers"), ("clip_text_gelu", "num_hidden_layers")):
        for value in (10**9, "3", None):
            with pytest.raises(UserError):
                load_component(write(tmp_path / f"{case}{value}", config_of(case) | {key: value}, weights_of(case)))


def test_stored_dtypes_that_are_not_parameters(tmp_path):
    stored, config = weights_of("mmdit"), config_of("mmdit")
    name = "transformer_blocks.0.attn.to_q.bias"
    with pytest.raises(UserError, match=f"{name}.*int64"):
        load_component(write(tmp_path / "int", config, stored | {name: np.zeros(64, "<i8")}))
    mixed = write(tmp_path / "mixed", config, stored | {name: stored[name].astype("<f2")})
    with pytest.raises(UserError, match=f"{name}.*layers of one parameter"):
        load_component(mixed)
    assert load_component(mixed, dtype="fp32")[1]["blocks"]["attn"]["to_q"]["bias"].dtype == np.float32
    double = write(tmp_path / "double", config, {key: array.astype("<f8") for key, array in stored.items()})
    with pytest.raises(UserError, match="float64"):
        load_component(double)
    assert_same_tree(load_component(double, dtype="fp32")[1], load_component(GOLDEN / "mmdit")[1])


def test_position_table_is_checked(tmp_path):
    stored, config = weights_of("mmdit"), config_of("mmdit")
    wrong = stored["pos_embed.pos_embed"].copy()
    wrong[0, 500, 3] += 1e-3
    with pytest.raises(UserError, match=r"pos_embed\.pos_embed.*rows 480 to 503"):
        load_component(write(tmp_path / "value", config, stored | {"pos_embed.pos_embed": wrong}))
    with pytest.raises(UserError, match=r"pos_embed\.pos_embed"):
        load_component(write(tmp_path / "scale", config | {"sample_size": 32}, stored))


def test_wrong_folders_and_configs(tmp_path):
    stored, config = weights_of("mmdit"), config_of("mmdit")
    with pytest.raises(UserError, match="is not a folder"):
        load_component(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        load_component(tmp_path)
    with pytest.raises(UserError, match=r"UNet3D.*expected one of"):
        load_component(write(tmp_path / "unet", {"_class_name": "UNet3DConditionModel"}, stored))
    with pytest.raises(UserError, match=r"PyramidMMDiT.*expected T5"):
        load_component(GOLDEN / "mmdit", "t5")
    with pytest.raises(UserError, match="expected one of mmdit"):
        load_component(GOLDEN / "mmdit", "denoiser")
    folder = write(tmp_path / "twice", config, stored)
    (folder / "config.json").write_text('{"_class_name": "PyramidMMDiT", "num_layers": 3, "num_layers": 2}')
    with pytest.raises(UserError, match="appears twice"):
        load_component(folder)
    (folder / "config.json").write_text(" " * (2 << 20))
    with pytest.raises(UserError, match="expected at most"):
        load_component(folder)


def test_parameters_that_do_not_fit_their_config(tmp_path):
    config, params = load_component(GOLDEN / "context_adapter")
    wrong = jax.tree.map(lambda leaf: leaf, params)
    wrong["output_layer"]["kernel"] = wrong["output_layer"]["kernel"].T
    with pytest.raises(UserError, match=r"output_layer/kernel has shape .* its config asks for"):
        save_component(tmp_path / "out", config, wrong)
    del wrong["output_layer"]["kernel"]
    with pytest.raises(UserError, match="output_layer/kernel is missing"):
        save_component(tmp_path / "out", config, wrong)
    with pytest.raises(UserError, match=r"extra.* is not one of"):
        save_component(tmp_path / "out", config, params | {"extra": {"bias": np.zeros(3)}})
    assert list(tmp_path.iterdir()) == []
    save_component(tmp_path / "out", config, params)
    with pytest.raises(UserError, match="--overwrite"):
        save_component(tmp_path / "out", config, params)
    save_component(tmp_path / "out", config, params, dtype="bf16", overwrite=True)
    assert load_component(tmp_path / "out")[1]["output_layer"]["kernel"].dtype == ml_dtypes.bfloat16


def test_tables_refuse_collisions_and_unknown_paths():
    leaf = jax.ShapeDtypeStruct((2, 3), np.float32)
    tree = {"a": {"kernel": leaf}, "b": {"kernel": leaf}}
    with pytest.raises(UserError, match="a/kernel and b/kernel both map to 'same'"):
        Table([Rule("{word}/kernel", "same", LINEAR)], tree)
    with pytest.raises(UserError, match="b/kernel has no rule"):
        Table([Rule("a/kernel", "a.weight", LINEAR)], tree)
    with pytest.raises(UserError, match="does not fit"):
        Table([Rule("{word}/kernel", "{layer}.{word}", LINEAR)], tree)


def shardings_for(params: dict, mesh: Mesh) -> dict:
    """Every leaf split over the last axis that divides, so that stacks, transposes and convolutions all are."""

    def one(leaf):
        spec = [None] * leaf.ndim
        for axis in range(leaf.ndim):
            if leaf.shape[axis] % mesh.size == 0:
                spec = [None] * leaf.ndim
                spec[axis] = mesh.axis_names
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, params)


@pytest.mark.parametrize("case", ["mmdit", "generation/checkpoint/causal_video_vae", "dt5_gated_gelu"])
@pytest.mark.parametrize("native", [False, True])
def test_restore_onto_a_mesh(tmp_path, case, native):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    config, params = load_component(GOLDEN / case)
    folder = tmp_path / "in"
    save_component(folder, config, params, native=native)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "data"))
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = shardings_for(params, mesh)
    assert_same_tree(params, load_component(folder, sharding=replicated)[1])
    with open_component(folder) as component:
        restored = component.load(sharding=shardings)
    assert_same_tree(params, restored)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings


def test_every_slice_is_read_once(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    config, params = load_component(GOLDEN / "context_adapter")
    save_component(tmp_path / "in", config, params)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "data"))
    size = sum(leaf.nbytes for _, leaf in flatten(params))
    for shardings in (NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))):
        with open_component(tmp_path / "in") as component:
            component.load(sharding=shardings)
            # Short runs of transposed kernels are read with their gaps, twice for two column blocks.
            assert size <= component.checkpoint.bytes_read <= (2 if shardings.spec else 1) * size


def test_stacked_transposed_and_sharded_slices_agree():
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    _, params = load_component(GOLDEN / "mmdit")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("layers", "width"))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    kernel = shardings["blocks"]["ff"]["up"]
    for spec in (("layers", "width", None), ("layers", None, "width"), (None, "width", "layers")):
        kernel["kernel"] = NamedSharding(mesh, PartitionSpec(*spec))
        _, restored = load_component(GOLDEN / "mmdit", sharding=shardings)
        leaf = restored["blocks"]["ff"]["up"]["kernel"]
        assert leaf.sharding == kernel["kernel"]
        np.testing.assert_array_equal(leaf, params["blocks"]["ff"]["up"]["kernel"])


def test_loaded_networks_run():
    config, params = load_component(GOLDEN / "context_adapter")
    case = GOLDEN / "context_adapter"
    x = np.load(case / "inputs.npz")["b2/x"]
    y = KINDS["context_adapter"].definition(config)(params, x)
    np.testing.assert_allclose(y, np.load(case / "outputs.npz")["b2/y"], atol=1e-5)


def test_copies_of_a_file_under_another_name(tmp_path):
    shutil.copytree(GOLDEN / "context_adapter", tmp_path / "in")
    (tmp_path / "in" / "weights.safetensors").rename(tmp_path / "in" / "diffusion_pytorch_model.fp16.safetensors")
    assert_same_tree(load_component(tmp_path / "in")[1], load_component(GOLDEN / "context_adapter")[1])
