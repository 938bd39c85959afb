"""Damaged and malicious inputs of the Hexagon tools: bundles, wrappers and folders that came back from a device."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
from npu_mini import write_mini
from onnx import helper

from nd_jax.converters.bundle.targets import TARGETS
from nd_jax.converters.hexagon.compare import compare, read_latencies, read_profile
from nd_jax.converters.hexagon.ends import flat
from nd_jax.converters.hexagon.handover import hand_over
from nd_jax.converters.hexagon.section import compiled, context_files, source_of
from nd_jax.converters.hexagon.vectors import open_vectors
from nd_jax.converters.hexagon.wrapper import check_wrapper, rename
from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.errors import UserError

TARGET = TARGETS["sm8750"]
ERRORS = (UserError, BundleError)


def wrapper(binary="adapter.bin", embed=0, nodes=1, kind="EPContext", domain="com.microsoft", extra=()):
    """A model that stands for a compiled graph."""
    made = [
        helper.make_node(
            kind, ["x"], [f"y{k}"], domain=domain, ep_cache_context=binary, embed_mode=embed, main_context=1,
            onnx_model_filename="/home/somebody/model.onnx",
        )
        for k in range(nodes)
    ]  # fmt: skip
    info = [helper.make_tensor_value_info(name, 1, [1]) for name in ("x", "y0")]
    return helper.make_model(helper.make_graph([*made, *extra], "g", info[:1], info[1:])).SerializeToString()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The mini bundle with a made-up binary for its ``adapter``: nothing here may reach native code."""
    folder = write_mini(tmp_path_factory.mktemp("mini") / "bundle", stages=())
    place = folder / "hexagon" / "sm8750"
    place.mkdir(parents=True)
    (place / "adapter.onnx").write_bytes(wrapper())
    (place / "adapter.bin").write_bytes(b"not a binary")
    content = json.loads((folder / "bundle.json").read_text())
    for name in ("adapter.onnx", "adapter.bin"):
        data = (place / name).read_bytes()
        stated = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        content["files"][f"hexagon/sm8750/{name}"] = stated
    entry = {"model": "hexagon/sm8750/adapter.onnx", "binary": "hexagon/sm8750/adapter.bin", "form": "fp32"}
    entry["source"] = source_of(Bundle(folder), "adapter", "fp32")
    compiler = {"onnxruntime-qnn": "2.7.0", "onnxruntime": "1.31.1", "sdk": "v2.51.0.260929181845"}
    content["hexagon"] = {"sm8750": {"compiler": compiler, "graphs": {"adapter": entry}}}
    (folder / "bundle.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def bundle(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "bundle")


def change(bundle, edit):
    content = json.loads((bundle / "bundle.json").read_text())
    edit(content)
    (bundle / "bundle.json").write_text(json.dumps(content))


def entry_of(content):
    return content["hexagon"]["sm8750"]["graphs"]["adapter"]


def test_a_whole_one_passes(bundle, tmp_path):
    opened = Bundle(bundle)
    model, binary = context_files(opened, compiled(opened, "sm8750")["adapter"])
    assert (model.name, binary.name) == ("adapter.onnx", "adapter.bin")
    (tmp_path / "out").mkdir()
    assert hand_over(bundle, TARGET, tmp_path / "out") == ["adapter"]


def test_nothing_compiled(bundle):
    with pytest.raises(
        BundleError, match=r"nothing compiled for sc8380xp \(only for sm8750\); run `nd-jax npu compile"
    ):
        compiled(Bundle(bundle), "sc8380xp")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: entry_of(c).update(model="../x.onnx"), "not a file inside the bundle"),
        (lambda c: entry_of(c).update(binary="/etc/passwd"), "not a file inside the bundle"),
        (lambda c: entry_of(c).update(binary="hexagon/sm8750/other.bin"), "not among the manifest's files"),
        (lambda c: entry_of(c).update(model=7), "not a file inside the bundle"),
        (lambda c: entry_of(c).update(binary="bundle.json"), "not among the manifest's files"),
        (lambda c: entry_of(c).update(binary=c["graphs"]["adapter"]["files"]["fp32"]["model"]), "different folders"),
        (lambda c: entry_of(c).update(form="int4"), "expected fp32 or w8a16"),
        (lambda c: entry_of(c).update(form="w8a16"), "has no 'w8a16' form"),
        (lambda c: entry_of(c).update(source="0" * 64), "compiled from another graph"),
        (lambda c: entry_of(c).update(snr={"emulator_to_fp32": "| x |"}), "SNR are not numbers"),
        (lambda c: c["hexagon"]["sm8750"].update(graphs={"../x": entry_of(c)}), "cannot name a file"),
        (lambda c: c["hexagon"]["sm8750"].update(graphs={"other": entry_of(c)}), "not a graph of this bundle"),
        (lambda c: c["hexagon"]["sm8750"].update(graphs=[]), "lists no graphs"),
        (lambda c: c["hexagon"].update(sm8750=7), "lists no graphs"),
        (lambda c: c.update(hexagon=[]), "nothing compiled"),
    ],
)
def test_manifests(bundle, edit, told):
    change(bundle, edit)
    opened = Bundle(bundle)
    with pytest.raises(BundleError, match=told) as caught:
        context_files(opened, compiled(opened, "sm8750")["adapter"])
    assert "\n" not in str(caught.value)


def test_versions_that_are_shell(bundle, tmp_path):
    """They go into a script's comments."""
    change(bundle, lambda c: c["hexagon"]["sm8750"]["compiler"].update(sdk="2.51\nrm -rf ~"))
    (tmp_path / "out").mkdir()
    with pytest.raises(BundleError, match="does not say what compiled it"):
        hand_over(bundle, TARGET, tmp_path / "out")


@pytest.mark.parametrize("name", ["a b", "$(reboot)", "a;b", "../x", "/x", "a//b", "", "x" * 121, "a\nb", "-rf"])
def test_names_that_cannot_be_files(name):
    with pytest.raises(BundleError, match="cannot name a file"):
        flat(name)


@pytest.mark.parametrize("name", ["adapter.bin", "adapter.onnx"])
def test_damaged_files(bundle, name):
    path = bundle / "hexagon" / "sm8750" / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    opened = Bundle(bundle)
    with pytest.raises(BundleError, match="damaged"):
        context_files(opened, compiled(opened, "sm8750")["adapter"])
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match="is a link"):
        context_files(Bundle(bundle), compiled(opened, "sm8750")["adapter"])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (wrapper("../adapter.bin"), "keeps its binary in"),
        (wrapper("/etc/passwd"), "keeps its binary in"),
        (wrapper(""), "keeps its binary in"),
        (wrapper("other.bin"), "names the binary 'other.bin'"),
        (wrapper(embed=1), "keeps its binary in"),
        (wrapper(nodes=2), "expected one EPContext"),
        (wrapper(kind="Relu", domain=""), "expected one EPContext"),
        (wrapper(extra=(helper.make_node("Relu", ["y0"], ["z"]),)), "expected one EPContext"),
        (b"\xff" * 50, "not an ONNX file"),
    ],
)
def test_wrappers(tmp_path, data, told):
    path = tmp_path / "adapter.onnx"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=told):
        check_wrapper(path, "adapter.bin")


def test_wrappers_forget_where_they_were_made(tmp_path):
    (tmp_path / "a.onnx").write_bytes(wrapper("context_qnn.bin"))
    rename(tmp_path / "a.onnx", tmp_path / "b.onnx", "b.bin")
    check_wrapper(tmp_path / "b.onnx", "b.bin")
    assert b"somebody" not in (tmp_path / "b.onnx").read_bytes()
    assert onnx.load(tmp_path / "b.onnx").graph.node[0].op_type == "EPContext"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c.pop("vectors"), "has no test vectors"),
        (lambda c: c["vectors"].pop("adapter"), "no proper test vectors"),
        (lambda c: c["vectors"]["adapter"].update(count=0), "0 test vectors"),
        (lambda c: c["vectors"]["adapter"].update(count=10**9), "which is not what its shape takes"),
        (lambda c: c["vectors"]["adapter"]["inputs"]["in/states"].update(file="../x"), "not a file inside"),
        (lambda c: c["vectors"]["adapter"]["inputs"]["in/states"].update(shape=[1 << 40]), "bundle's shapes"),
    ],
)
def test_vectors(bundle, edit, told):
    change(bundle, edit)
    with pytest.raises(ERRORS, match=told):
        open_vectors(Bundle(bundle), ["adapter"])


# ---- what comes back


@pytest.fixture
def pulled(bundle, tmp_path):
    """A device that computes what float32 computes, and times it."""
    expected = np.fromfile(bundle / "vectors" / "adapter.outputs.0.bin", "<f4").reshape(2, -1)
    for k, row in enumerate(expected):
        place = tmp_path / "pulled" / "adapter" / f"Result_{k}" / "out"
        place.mkdir(parents=True)
        row.tofile(place / "text.raw")
    return tmp_path / "pulled"


def test_comparison(bundle, pulled):
    (pulled / "latency.json").write_text(json.dumps({"adapter": {"ms": [3.0, 1.0, 2.0]}}))
    told = []
    found = compare(bundle, pulled, TARGET, told.append)
    assert found["adapter"] == {"snr_to_fp32": 999.0, "vectors": 2, "ms": 2.0, "runs": 3}
    assert told == ["adapter: 999.0 dB to float32, 2.000 ms over 3 runs"]
    assert entry_of(Bundle(bundle).content)["measured"] == found["adapter"]
    for place in (pulled / "adapter").glob("Result_*"):  # the other spelling of a name with a slash
        (place / "out" / "text.raw").rename(place / "out_text.raw")
    assert compare(bundle, pulled, TARGET, told.append)["adapter"]["snr_to_fp32"] == 999.0


def test_profiles(tmp_path):
    rows = [
        "Msg Timestamp,Message,Time,Unit of Measurement,Timing Source,Event Level,Event Identifier",
        "1,INIT,9000,US,BACKEND,ROOT,QNN (init) time",
        "2,EXECUTE,2500,US,BACKEND,ROOT,QNN (execute) time",
        "2,EXECUTE,2000,US,BACKEND,SUB-EVENT,Accelerator (execute) time",
        "2,EXECUTE,1900,US,BACKEND,SUB-EVENT,Accelerator (execute excluding wait) time",
        "2,EXECUTE,123456,CYCLES,BACKEND,SUB-EVENT,Accelerator (execute) time (cycles)",
        "3,EXECUTE,nonsense,US,BACKEND,SUB-EVENT,Accelerator (execute) time",
        "3,EXECUTE,-5,US,BACKEND,SUB-EVENT,Accelerator (execute) time",
    ]
    (tmp_path / "profile.csv").write_text("\n".join(rows))
    assert read_profile(tmp_path) == [2.0]
    (tmp_path / "profile.csv").write_text("\n".join(rows[:3]))
    assert read_profile(tmp_path) == [2.5]
    (tmp_path / "profile.csv").unlink()
    assert read_profile(tmp_path) == []


def test_lengths(bundle, pulled):
    path = pulled / "adapter" / "Result_1" / "out" / "text.raw"
    data = path.read_bytes()
    for wrong in (data[:-4], data + b"\0" * 4, b"", data[: len(data) // 2]):
        path.write_bytes(wrong)
        with pytest.raises(BundleError, match=r"has \d+ bytes; expected 128: float32 of \[4, 8\]"):
            compare(bundle, pulled, TARGET, print)
    path.write_bytes(np.full(32, np.nan, "<f4").tobytes())
    with pytest.raises(BundleError, match="not finite"):
        compare(bundle, pulled, TARGET, print)
    path.unlink()
    with pytest.raises(BundleError, match="is missing"):
        compare(bundle, pulled, TARGET, print)
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse: nothing may read it
    with pytest.raises(BundleError, match="expected 128"):
        compare(bundle, pulled, TARGET, print)


def test_links(bundle, pulled, tmp_path):
    path = pulled / "adapter" / "Result_0" / "out" / "text.raw"
    path.rename(tmp_path / "secret.raw")
    path.symlink_to(tmp_path / "secret.raw")
    with pytest.raises(BundleError, match="is a link"):
        compare(bundle, pulled, TARGET, print)
    path.unlink()
    (pulled / "adapter" / "Result_0" / "out").rmdir()
    (pulled / "adapter" / "Result_0" / "out").symlink_to(tmp_path)
    (tmp_path / "secret.raw").rename(tmp_path / "text.raw")
    with pytest.raises(BundleError, match="is a link"):
        compare(bundle, pulled, TARGET, print)
    (pulled / "adapter").rename(tmp_path / "elsewhere")
    (pulled / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        compare(bundle, pulled, TARGET, print)
    (tmp_path / "link").symlink_to(pulled)
    with pytest.raises(UserError, match="is not a folder"):
        compare(bundle, tmp_path / "link", TARGET, print)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "expected an object"),
        ("{", "not valid JSON"),
        ('{"adapter": {"ms": [NaN]}}', "not valid JSON"),
        ('{"adapter": {"ms": ["1"]}}', "expected milliseconds"),
        ('{"adapter": {"ms": [-1]}}', "expected milliseconds"),
        ('{"adapter": {"ms": [1e300]}}', "expected milliseconds"),
        ('{"adapter": 7}', "expected milliseconds"),
        (" " * ((16 << 20) + 1), "expected at most"),
    ],
)
def test_latencies(tmp_path, content, told):
    (tmp_path / "latency.json").write_text(content)
    with pytest.raises(UserError, match=told):
        read_latencies(tmp_path)


def test_linked_latencies(tmp_path):
    (tmp_path / "latency.json").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="symbolic link"):
        read_latencies(tmp_path)


def test_nothing_came_back(bundle, tmp_path):
    (tmp_path / "pulled").mkdir()
    with pytest.raises(UserError, match="holds no output of adapter"):
        compare(bundle, tmp_path / "pulled", TARGET, print)


def test_commands(refused, bundle, tmp_path):
    for verb in ("compile", "emulate", "handover"):
        refused("npu", verb, bundle, "--target", "sm1", told="target 'sm1' is not known; expected one of sc8380xp")
        refused("npu", verb, bundle, told="--target is missing")
    refused("npu", "compare", tmp_path, "--bundle", bundle, "--target", "60", told="'60' is not known")
    refused("npu", "compile", bundle, "--target", "sm8750", "--timeout", 0, told="--timeout is 0")
    refused("npu", "handover", tmp_path, "--target", "sm8750", "--out", tmp_path / "new", told="has no bundle.json")
    refused("npu", "handover", bundle, "--target", "sm8750", "--out", bundle, told="exists")
    refused("npu", "compare", tmp_path / "no", "--bundle", bundle, "--target", "sm8750", told="is not a folder")
    assert not (tmp_path / "new").exists()
