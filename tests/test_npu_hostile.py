"""Damaged and malicious bundles: one line, before anything native opens a file."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from npu_systems import student_system
from onnx import TensorProto, helper

from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.converters.runtime.onnx_files import external_files
from nd_jax.converters.runtime.pipeline import Pipeline
from nd_jax.npu_workflow import build_bundle


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    system = student_system(tiny_folder / "tokenizers")
    return build_bundle(system, tmp_path_factory.mktemp("npu") / "bundle", check=False)


@pytest.fixture
def bundle(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "bundle")


def change(bundle, edit):
    """Edit the manifest's content in place."""
    path = bundle / "bundle.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def restate(bundle, name):
    """Make the manifest state a file's size and checksum as they are: the attacker writes both."""
    data = (bundle / name).read_bytes()
    stated = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(bundle, lambda content: content["files"].__setitem__(name, stated))


def refused(bundle, told):
    """The whole check ends in one line that says ``told``, and onnxruntime is not reached."""
    with pytest.raises(BundleError, match=told) as caught:
        Bundle(bundle).check_all()
    assert "\n" not in str(caught.value)


def test_a_whole_bundle_passes(whole):
    Bundle(whole).check_all()


@pytest.mark.parametrize("name", ["graphs/denoiser.data", "graphs/decoder.onnx", "tokenizer_3/spiece.model"])
def test_damaged_files(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    refused(bundle, "damaged: its checksum is not the manifest's")
    (bundle / name).write_bytes(data[:-1])
    refused(bundle, "the manifest says")
    (bundle / name).unlink()
    refused(bundle, "is missing")


def test_checksums_come_before_native_code(bundle, monkeypatch):
    import onnxruntime

    def never(*_, **__):
        raise AssertionError("a damaged file reached onnxruntime")

    pipeline = Pipeline(bundle)
    (bundle / "graphs" / "decoder.onnx").write_bytes(b"\0" * (bundle / "graphs" / "decoder.onnx").stat().st_size)
    monkeypatch.setattr(onnxruntime, "InferenceSession", never)
    with pytest.raises(BundleError, match="damaged"):
        pipeline.sessions.load("decoder")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "graphs/../../x", "graphs\\x", "", "a/b/c/d", 7, ".hidden"]
)
def test_manifest_paths_that_leave_the_bundle(bundle, name):
    change(bundle, lambda c: c["graphs"]["decoder"]["files"]["fp32"].__setitem__("model", name))
    refused(bundle, "not a file inside the bundle")
    change(bundle, lambda c: c["files"].__setitem__(str(name) or "..", {"bytes": 1, "sha256": "0" * 64}))
    refused(bundle, "not a file inside the bundle|is missing|not among")


def test_links(bundle, tmp_path):
    secret = tmp_path / "secret"
    (bundle / "graphs" / "decoder.data").rename(secret)
    (bundle / "graphs" / "decoder.data").symlink_to(secret)
    refused(bundle, "is a link")


def test_linked_folders(bundle, tmp_path):
    (bundle / "tables").rename(tmp_path / "elsewhere")
    (bundle / "tables").symlink_to(tmp_path / "elsewhere")
    refused(bundle, "is a link")


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "sub/x", "..", "unlisted.data"])
def test_external_data_elsewhere(bundle, place):
    """Checksums right, but the model itself points out of its folder, or at a file that nobody vouches for."""
    path = bundle / "graphs" / "decoder.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = place
    path.write_bytes(model.SerializeToString())
    restate(bundle, "graphs/decoder.onnx")
    refused(bundle, "keeps weights in")


def hidden_tensor(kind):
    """A model whose external data is where a careless reader would not look."""
    tensor = TensorProto(name="w", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(helper.make_attribute("value", tensor))
    inner = helper.make_graph([node], "inner", [], [helper.make_tensor_value_info("y", 1, [1])])
    if kind == "subgraph":
        node = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([node], "outer", [], [])
    if kind == "domain":
        inner = helper.make_graph([helper.make_node("Anything", [], ["y"], domain="com.example")], "inner", [], [])
    model = helper.make_model(inner)
    if kind == "function":
        model.functions.append(helper.make_function("own", "F", [], ["y"], [node], model.opset_import))
    return model


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("attribute", "keeps weights in"),
        ("subgraph", "graph inside a graph"),
        ("function", "functions"),
        ("domain", "expected standard ones"),
    ],
)
def test_tensors_hidden_in_models(tmp_path, kind, told):
    path = tmp_path / "model.onnx"
    path.write_bytes(hidden_tensor(kind).SerializeToString())
    with pytest.raises(BundleError, match=told):
        external_files(path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 40, b"\x3a\xff\xff\xff\xff\x7f", b"PK\x03\x04archive", b"\x80\x02pickle."]
)
def test_files_that_are_no_models(tmp_path, data):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"not an ONNX file|0 graphs"):
        external_files(path)


def test_pickled_and_misshapen_tables(bundle):
    for edit, told in (
        ({"dtype": "object"}, "expected plain numbers"),
        ({"dtype": "|O"}, "expected plain numbers"),
        ({"shape": [1 << 20, 1 << 20]}, "at most 2\\^31 elements"),
        ({"shape": [2, 2]}, "its shape"),
        ({"shape": [-1, 2]}, "shape"),
        ({"shape": "all"}, "shape"),
    ):
        copy = json.loads((bundle / "bundle.json").read_text())
        change(bundle, lambda c, edit=edit: c["tables"]["positions/0"].update(edit))
        refused(bundle, told)
        (bundle / "bundle.json").write_text(json.dumps(copy))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ('{"format": 1, "format": 1}', "twice"),
        ('{"format": NaN}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format": 2}', "bundle format"),
        ('{"format": 1}', "'files' is missing"),
    ],
)
def test_manifests_that_are_none(bundle, content, told):
    (bundle / "bundle.json").write_text(content)
    refused(bundle, told)


def test_oversized_manifest(bundle, monkeypatch):
    from nd_jax.converters.runtime import files

    monkeypatch.setattr(files, "MANIFEST_LIMIT", 100)
    refused(bundle, "expected at most 100")


def test_wrong_tokenizer(bundle):
    lines = (bundle / "tokenizer" / "merges.txt").read_text().splitlines()
    (bundle / "tokenizer" / "merges.txt").write_text("\n".join(lines[:40]))
    restate(bundle, "tokenizer/merges.txt")
    with pytest.raises(BundleError, match=r"tokenizer .* (gives other ids|does not load)"):
        Pipeline(bundle)


def test_broken_tokenizer(bundle):
    (bundle / "tokenizer_3" / "spiece.model").write_bytes(b"nothing")
    restate(bundle, "tokenizer_3/spiece.model")
    with pytest.raises(BundleError, match="does not load"):
        Pipeline(bundle)


def test_graphs_that_are_not_the_manifests(bundle):
    change(bundle, lambda c: c["graphs"]["decoder"]["inputs"].__setitem__("latent", [1, 9, 9, 4]))
    with pytest.raises(BundleError, match="inputs are not those of the manifest"):
        Pipeline(bundle).sessions.load("decoder")


def test_inputs_that_do_not_fit(bundle):
    sessions = Pipeline(bundle).sessions
    with pytest.raises(BundleError, match="inputs states do not fit"):
        sessions.run("adapter", {"states": np.zeros((3, 3))})


def test_disk_full_leaves_nothing(tiny_folder, tmp_path, monkeypatch):
    from nd_jax.converters.bundle.writer import BundleWriter
    from nd_jax.errors import UserError

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BundleWriter, "finish", full)
    with pytest.raises(UserError, match="No space left on device"):
        build_bundle(student_system(tiny_folder / "tokenizers"), tmp_path / "bundle", check=False)
    assert not list(tmp_path.iterdir())
