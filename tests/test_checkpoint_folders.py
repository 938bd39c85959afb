"""Whole folders: official layout to nd-jax's own form and back, tokenizers, memory, several processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from nd_jax.converters.component import load_component, save_component
from nd_jax.converters.convert import convert_export, convert_import
from nd_jax.converters.folders import MODES, load_folder, save_folder
from nd_jax.converters.safetensors_io import read_tensors
from nd_jax.errors import UserError

CHECKPOINT = Path(__file__).parent / "golden" / "generation" / "checkpoint"
COMPONENTS = ["causal_video_vae", "context_adapter", "diffusion_transformer_320p", "text_encoder_3"]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{ "model_max_length":77 }')
    (folder / "readme.txt").write_text("not needed")
    return folder


@pytest.fixture
def official(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "official")
    tokenizer(tmp_path / "official" / "tokenizer")
    return tmp_path / "official"


def test_import_then_export_is_byte_equal(tmp_path, official):
    assert convert_import(official, tmp_path / "native", shard_size=40_000) == []
    mark = json.loads((tmp_path / "native" / "nd_jax.json").read_text())
    assert sorted(mark["components"]) == COMPONENTS
    assert not any("diffusion_pytorch_model" in name for name in files(tmp_path / "native"))
    assert convert_export(tmp_path / "native", tmp_path / "back") == []
    assert files(tmp_path / "back") == files(official) - {"tokenizer/readme.txt"}
    for name in files(tmp_path / "back"):
        one, two = official / name, tmp_path / "back" / name
        if name.endswith(".safetensors"):
            first, second = read_tensors(one), read_tensors(two)
            assert first.keys() == second.keys()
            assert all(first[key].tobytes() == second[key].tobytes() for key in first)
        elif name.startswith("tokenizer/"):
            assert one.read_bytes() == two.read_bytes()
        else:
            given, written = json.loads(one.read_text()), json.loads(two.read_text())
            differing = {key for key in given if written.get(key) != given[key]}
            assert differing <= {"transformers_version", "use_cache", "is_encoder_decoder"}


def test_listing_and_loading(official):
    folder = load_folder(official)
    assert sorted(folder.components) == COMPONENTS
    assert folder.kinds["diffusion_transformer_320p"] == "mmdit"
    assert list(folder.tokenizers) == ["tokenizer"]
    assert folder.name_of("diffusion_transformer") == "diffusion_transformer_320p"
    assert folder.name_of("text_encoder_3", "hybrid") == "text_encoder_3"
    with pytest.raises(UserError, match="diffusion_transformer_320p_multistep_t2v"):
        folder.name_of("diffusion_transformer", "monolithic")
    with pytest.raises(UserError, match="hybrid or monolithic"):
        folder.name_of("diffusion_transformer", "both")
    with pytest.raises(UserError, match="has no text_encoder;"):
        folder.load("text_encoder")
    config, params = folder.load("context_adapter", dtype="bf16")
    assert str(params["output_layer"]["kernel"].dtype) == "bfloat16"
    assert config.output_dims == 64


def test_both_modes_side_by_side(tmp_path, official):
    for role, name in MODES["hybrid"].items():
        shutil.copytree(official / name, official / MODES["monolithic"][role])
    folder = load_folder(official)
    assert folder.name_of("context_adapter", "monolithic") == "context_adapter_multistep_t2v"
    with pytest.raises(UserError, match="choose one"):
        folder.name_of("diffusion_transformer")
    convert_import(official, tmp_path / "native")
    assert set(MODES["monolithic"].values()) <= set(os.listdir(tmp_path / "native"))


def test_one_component_alone(tmp_path):
    convert_import(CHECKPOINT / "context_adapter", tmp_path / "native", "bf16")
    assert files(tmp_path / "native") == {"config.json", "params.safetensors", "nd_jax.json"}
    convert_export(tmp_path / "native", tmp_path / "back", "fp32")
    exact = read_tensors(CHECKPOINT / "context_adapter" / "diffusion_pytorch_model.safetensors")
    back = read_tensors(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert exact.keys() == back.keys()
    for name, array in exact.items():
        assert back[name].dtype == np.float32
        np.testing.assert_allclose(back[name], array, rtol=2**-8)


def test_networks_of_later_versions_are_named(tmp_path, official):
    (official / "depth_estimator").mkdir()
    (official / "depth_estimator" / "config.json").write_text('{"_class_name": "SomethingLater"}')
    (notes,) = convert_import(official, tmp_path / "native")
    assert "depth_estimator" in notes


def test_wrong_folders(tmp_path, official):
    with pytest.raises(UserError, match="does not exist"):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a checkpoint folder"):
        convert_import(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(UserError, match="save_file"):
        convert_import(tmp_path / "model.pt", tmp_path / "out")
    (official / "text_encoder").mkdir()
    with pytest.raises(UserError, match=r"text_encoder/config\.json"):
        load_folder(official)
    shutil.rmtree(official / "text_encoder")
    shutil.copytree(official / "text_encoder_3", official / "text_encoder_2")
    with pytest.raises(UserError, match="holds a t5 network; expected clip"):
        load_folder(official)
    shutil.rmtree(official / "text_encoder_2")
    (official / "context_adapter").rename(tmp_path / "elsewhere")
    (official / "context_adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        load_folder(official)


def test_outputs(tmp_path, official):
    for target in (official, official / "inside", tmp_path):
        with pytest.raises(UserError, match="nested"):
            convert_import(official, target, overwrite=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="--overwrite"):
        convert_import(official, tmp_path / "out")
    convert_import(official, tmp_path / "out", overwrite=True)
    before = files(tmp_path / "out")
    # A network that turns out damaged after others were written: the old output stays, nothing else appears.
    path = official / "text_encoder_3" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        convert_import(official, tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match="truncated"):
        convert_import(official, tmp_path / "new")
    assert files(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["official", "out"]
    with pytest.raises(UserError, match="fp32, bf16, fp16"):
        convert_import(official, tmp_path / "new", "fp8")


def test_tokenizers_are_checked(tmp_path, official):
    adapter = {"context_adapter": load_component(CHECKPOINT / "context_adapter")}
    good = official / "tokenizer"
    save_folder(tmp_path / "out", adapter, {"tokenizer": good})
    assert files(tmp_path / "out" / "tokenizer") == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    cases = {
        "vocab.json": lambda path: path.unlink(),
        "tokenizer_config.json": lambda path: path.write_text("{'a': 1}"),
        "merges.txt": lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
    }
    for name, spoil in cases.items():
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        spoil(bad / name)
        with pytest.raises(UserError, match="bad"):
            save_folder(tmp_path / "bad_out", adapter, {"tokenizer": bad})
        assert not (tmp_path / "bad_out").exists()
        shutil.rmtree(bad)


MEMORY = """
    import gc, sys, threading, time
    import jax, numpy as np
    from nd_jax.converters.component import load_component, save_component
    from nd_jax.converters.convert import convert_export, convert_import
    from nd_jax.converters.kinds import KINDS, abstract_tensors
    from nd_jax.converters.safetensors_write import Pending, write_checkpoint
    from nd_jax.models.t5 import T5Config
    from pathlib import Path
    import json

    folder = Path(sys.argv[1])
    config = T5Config(vocab_size=4096, d_model=512, d_ff=4096, num_layers=10, num_heads=8, out_dim=512)
    shapes = {name: shape for name, (shape, _) in abstract_tensors("t5", config).items()}
    tensors = [Pending(n, s, np.dtype("f4"), lambda s=s: [np.full(s, 0.5, "f4")]) for n, s in shapes.items()]
    (folder / "in").mkdir()
    write_checkpoint(folder / "in", "model", tensors)
    (folder / "in" / "config.json").write_text(json.dumps(config.to_dict()))
    tree, largest = (f([t.nbytes for t in tensors]) / 2**20 for f in (sum, max))

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

    def peak_of(work):
        gc.collect()
        before = highest = resident()
        done = threading.Event()
        def watch():
            nonlocal highest
            while not done.is_set():
                highest = max(highest, resident())
                time.sleep(0.0005)
        thread = threading.Thread(target=watch)
        thread.start()
        result = work()
        done.set()
        thread.join()
        return highest - before, result

    jax.device_put(np.zeros(3)).block_until_ready()
    KINDS["t5"].table(config)
    loading, (config, params) = peak_of(lambda: load_component(folder / "in"))
    saving, _ = peak_of(lambda: save_component(folder / "out", config, params))
    del params
    importing, _ = peak_of(lambda: convert_import(folder / "in", folder / "native"))
    exporting, _ = peak_of(lambda: convert_export(folder / "native", folder / "again"))
    narrow, _ = peak_of(lambda: convert_export(folder / "native", folder / "narrow", "bf16"))
    print(json.dumps(dict(tree=tree, largest=largest, loading=loading, saving=saving, importing=importing,
                          exporting=exporting, narrow=narrow)))
"""


def run(code: str, *arguments: str, devices: int = 1) -> subprocess.Popen:
    # With a fixed threshold, glibc hands freed arrays back at once, so that resident memory is what is in use.
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_peak_memory_is_the_tree_and_two_of_its_largest_tensors(tmp_path):
    output, errors = (process := run(MEMORY, str(tmp_path))).communicate(timeout=300)
    assert process.returncode == 0, errors
    found = json.loads(output.splitlines()[-1])
    slack = 6  # MiB for everything that is not an array
    assert found["tree"] > 200
    for step in ("loading", "importing", "exporting", "narrow"):
        tree = found["tree"] / (2 if step == "narrow" else 1)
        assert found[step] <= tree + 2 * found["largest"] + slack, found
        assert found[step] >= tree / 2, found  # otherwise the measurement measures nothing
    assert found["saving"] <= 2 * found["largest"] + slack, found


TWO_PROCESSES = """
    import sys
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from nd_jax.converters.component import open_component
    from nd_jax.converters.tables import flatten

    folder, address, number = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(number))
    assert jax.device_count() == 4 and jax.local_device_count() == 2
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    with open_component(folder) as component:
        # The input axis of every kernel: an axis in the middle of the torch tensor's memory.
        sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
        params = component.load(sharding=sharding)
        total = sum(tensor.nbytes for tensor in component.tensors.values())
        assert total / 2 <= component.checkpoint.bytes_read < total, (component.checkpoint.bytes_read, total)
    for path, leaf in flatten(params):
        for shard in leaf.addressable_shards:
            expected = np.arange(leaf.size, dtype="f4").reshape(leaf.shape[::-1]).T[shard.index]
            np.testing.assert_array_equal(shard.data, expected)
    print("same")
"""


def test_each_process_reads_its_own_slices(tmp_path):
    from nd_jax.converters.safetensors_write import pending, write_checkpoint

    config = {"_class_name": "ContextAdapter", "input_dims": 8192, "output_dims": 8, "layer_depths": [16]}
    config |= {"skips": [False], "use_biases": False}
    shapes = {"network_layers.0.1.weight": (16, 8192), "network_layers.1.0.weight": (8, 16)}
    tensors = [pending(name, np.arange(np.prod(s), dtype="<f4").reshape(s)) for name, s in shapes.items()]
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_checkpoint(tmp_path, "diffusion_pytorch_model", tensors)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = [run(TWO_PROCESSES, str(tmp_path), address, str(number), devices=2) for number in range(2)]
    try:
        for process in processes:
            output, errors = process.communicate(timeout=120)
            assert output.endswith("same\n"), errors
    finally:
        for process in processes:
            process.kill()


def test_torch_free_and_pickle_free():
    code = "import sys, nd_jax.converters.convert; print('torch' in sys.modules)"
    output, errors = run(code).communicate(timeout=120)
    assert output.strip() == "False", errors
    for path in (Path(__file__).parents[1] / "converters").glob("*.py"):
        text = path.read_text()
        assert "import torch" not in text.replace('"import torch; from safetensors', "")
        assert "import pickle" not in text
        assert "np.load" not in text


def test_save_component_refuses_unknown_configs(tmp_path):
    with pytest.raises(UserError, match="dict"):
        save_component(tmp_path / "out", {}, {})
