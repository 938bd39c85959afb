"""Context binaries: targets, processes, compilation, the emulator, hand-over and what comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from npu_mini import STAGES, write_mini

from nd_jax.converters.bundle.targets import TARGETS, chosen, named
from nd_jax.converters.hexagon import extra
from nd_jax.converters.hexagon.jobs import run_process, run_worker
from nd_jax.converters.hexagon.trace import facts
from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.errors import UserError

TARGET = TARGETS["sm8750"]
needs_compiler = pytest.mark.skipif(not extra.installed(), reason="needs the extra hexagon")


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return write_mini(tmp_path_factory.mktemp("mini") / "bundle")


@pytest.fixture(scope="module")
def compiled_bundle(mini):
    """The mini bundle with binaries for SM8750 and SC8380XP."""
    from nd_jax.converters.hexagon.compile import compile_graphs
    from nd_jax.converters.hexagon.shared import compile_shared

    folder = shutil.copytree(mini, mini.parent / "compiled")
    compile_graphs(folder, [TARGET, TARGETS["sc8380xp"]], timeout=300)
    compile_shared(folder, TARGET, timeout=300)
    return folder


# ---- targets


def test_targets():
    known = {name: (target.number, target.arch) for name, target in TARGETS.items()}
    assert known == {
        "sc8380xp": (60, "v73"),
        "sm8750": (69, "v79"),
        "sm8850": (87, "v81"),
        "sc8480xp": (88, "v81"),
        "sm8550": (43, "v73"),
        "sm8650": (57, "v75"),
    }
    assert chosen(named(("SM8750", "sm8750"))) == [TARGET]
    for name in ("sm1", "60", "60,69", "60;69", "sm8750\n", "../x"):
        with pytest.raises(UserError, match="is not known; expected one of sc8380xp, sm8750") as caught:
            chosen(named((name,)))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--target is missing"):
        named(())


def test_without_the_extra_it_says_so(monkeypatch, mini):
    from nd_jax.converters.hexagon.compile import compile_graphs

    monkeypatch.setattr(extra.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'nd-jax\[hexagon\]'.*Qualcomm_LICENSE.pdf"):
        compile_graphs(mini, [TARGET], timeout=1)


# ---- processes


def gone(child: int) -> bool:
    """Whether a process has ended, perhaps without anybody who has asked for its exit code."""
    stat = Path(f"/proc/{child}/stat")
    return not stat.exists() or stat.read_text().split()[2] == "Z"


def script(body: str) -> list[str]:
    return [sys.executable, "-c", body]


def test_processes_that_take_too_long_are_ended_with_their_children(tmp_path):
    body = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open('pid', 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(UserError, match="compile it: not done after 2 s; allow it more with --timeout"):
        run_process(script(body), tmp_path, timeout=2, what="compile it")
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if gone(child):
            return
        time.sleep(0.1)
    raise AssertionError("the child is still there")


def test_children_are_ended_when_the_process_is_done(tmp_path):
    body = "import subprocess; open('pid', 'w').write(str(subprocess.Popen(['sleep', '60']).pid))"
    assert run_process(script(body), tmp_path, timeout=30, what="it") < 30
    child = int((tmp_path / "pid").read_text())
    time.sleep(0.2)
    assert gone(child)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            "import os; os.kill(os.getpid(), 11)",
            r"it: ended by SIGSEGV \(a crash of the native library\); it wrote noth",
        ),
        ("import os; print('bye', flush=True); os.kill(os.getpid(), 9)", r"SIGKILL \(perhaps out of memory\).*bye"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("print('first'); print('\\x1b[31mred\\x07'); raise SystemExit(3)", r"exit code 3; last words: \[31mred$"),
        ("print('x' * 100000); raise SystemExit(1)", "exit code 1; last words: x{300}$"),
    ],
)
def test_failures_are_one_line(tmp_path, body, told):
    with pytest.raises(UserError, match=told) as caught:
        run_process(script(body), tmp_path, timeout=60, what="it")
    assert "\n" not in str(caught.value)


def test_what_a_worker_says_of_its_failure(tmp_path):
    with pytest.raises(UserError, match="it: 'nothing'"):
        run_worker("nothing", {}, tmp_path, timeout=60, what="it")


# ---- what the compiler says


def trace(**changes):
    mappings = [{"dst_name": name, "dst_qnn_op_type": kind} for name, kind in (("a", "MatMul"), ("t", "Transpose"))]
    whole = {
        "subgraph_traces": [{"op_mappings": mappings}],
        "summary": {"total_onnx_nodes": 3},
        "unsupported_nodes": [],
    }
    return whole | changes


def test_traces():
    found = facts(trace(), "it").entry()
    assert found["operators"] == {"MatMul": 1, "Transpose": 1}
    assert (found["qnn_ops"], found["onnx_nodes"], found["unsupported"], found["transposed"]) == (2, 3, 0, ["t"])
    assert facts(trace(unsupported_nodes=[{"name": "n"}]), "it").unsupported == ["n"]
    with pytest.raises(UserError, match="into 2 parts"):
        facts(trace(subgraph_traces=2 * trace()["subgraph_traces"]), "it")
    for broken in (trace(summary={}), {}, trace(subgraph_traces=[1])):
        with pytest.raises(UserError, match="expected schema 2"):
            facts(broken, "it")


# ---- compilation


@needs_compiler
def test_compiled_graphs(compiled_bundle):
    bundle = Bundle(compiled_bundle)
    bundle.check_all()
    for name in ("sm8750", "sc8380xp"):
        entry = bundle.content["hexagon"][name]
        assert (entry["soc_model"], entry["arch"]) == (TARGETS[name].number, TARGETS[name].arch)
        assert set(entry["graphs"]) == set(bundle.graphs)
        for graph in entry["graphs"].values():
            assert graph["unsupported"] == 0
            assert graph["qnn_ops"] >= graph["onnx_nodes"] > 0 or graph["form"] == "w8a16"
            assert bundle.files[graph["binary"]]["bytes"] == graph["bytes"] > 1000
            assert 0 < graph["seconds"] < 300
            assert graph["peak_bytes"] > 50e6
        assert entry["graphs"]["adapter"]["form"] == "fp32"
        assert entry["graphs"]["attention"]["transposes"] == 0
        assert entry["graphs"]["twice"]["transposes"] == 2, "at its ends alone: channels come first there"
    assert not list(compiled_bundle.glob(".*")), "no unfinished files"
    a, b = (compiled_bundle / f"hexagon/{name}/attention.bin" for name in ("sm8750", "sc8380xp"))
    assert a.read_bytes() != b.read_bytes()


@needs_compiler
def test_stages_share_their_weights(compiled_bundle):
    entry = Bundle(compiled_bundle).content["hexagon"]["sm8750"]["shared"]
    assert entry["run"] is False
    assert set(entry["models"]) == set(STAGES[:2])
    assert entry["bytes"] < 0.75 * entry["separate_bytes"]


@needs_compiler
def test_sizes(compiled_bundle):
    from nd_jax.converters.hexagon.sizes import binary_sizes, resident, size_lines

    bundle = Bundle(compiled_bundle)
    sizes, apart = binary_sizes(bundle, "sm8750"), binary_sizes(bundle, "sc8380xp")
    assert set(sizes) == {"adapter", "attention", "twice", "wide", "denoiser_shared"}
    assert set(apart) == set(bundle.graphs)
    assert resident(bundle, "sm8750") == {
        "text": sizes["adapter"] + sizes["attention"],
        "denoise": sizes["denoiser_shared"],
        "decode": sizes["twice"] + sizes["wide"],
    }
    assert resident(bundle, "sc8380xp")["denoise"] == sum(apart[name] for name in STAGES[:2])
    assert "most at once" in list(size_lines(bundle, "sm8750"))[1]


@needs_compiler
def test_the_emulator_agrees_with_the_cpu(compiled_bundle):
    """Products of two values, a layer used twice, Tanh in front of a bias, 16-bit weights: each was wrong on the NPU
    alone once."""
    from nd_jax.converters.hexagon.emulate import emulate_graphs

    found = emulate_graphs(compiled_bundle, TARGET, timeout=300)
    for name, told in found.items():
        assert told["emulator_to_cpu"] > 50, name
        assert told["emulator_to_fp32"] > told["cpu_to_fp32"] - 1 or name in ("adapter", "wide")
    assert found["wide"]["emulator_to_fp32"] > 60
    assert Bundle(compiled_bundle).content["hexagon"]["sm8750"]["graphs"]["twice"]["snr"] == found["twice"]


@needs_compiler
def test_nothing_is_left_of_a_failed_compilation(mini, tmp_path):
    from nd_jax.converters.hexagon.compile import compile_graphs

    folder = shutil.copytree(mini, tmp_path / "bundle")
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    with pytest.raises(UserError, match=r"compile adapter for sm8750: not done after"):
        compile_graphs(folder, [TARGET], ["adapter"], timeout=0.01)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    Bundle(folder).check_all()


def test_graphs_without_integers_are_refused(mini, tmp_path):
    from nd_jax.converters.hexagon.compile import chosen_graphs

    folder = shutil.copytree(mini, tmp_path / "bundle")
    content = json.loads((folder / "bundle.json").read_text())
    del content["graphs"]["twice"]["files"]["w8a16"]
    (folder / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="graph twice has no w8a16 form"):
        chosen_graphs(Bundle(folder), ())
    with pytest.raises(UserError, match="has no graph 'other'; it has adapter"):
        chosen_graphs(Bundle(folder), ("other",))


# ---- hand-over


@pytest.fixture(scope="module")
def handed(compiled_bundle):
    from nd_jax.converters.hexagon.emulate import emulate_graphs
    from nd_jax.converters.hexagon.handover import hand_over

    emulate_graphs(compiled_bundle, TARGET, ["adapter"], timeout=300)
    folder = compiled_bundle.parent / "handover"
    folder.mkdir()
    hand_over(compiled_bundle, TARGET, folder)
    return folder


@needs_compiler
def test_handed_over(handed, compiled_bundle):
    bundle, ends = Bundle(compiled_bundle), json.loads((handed / "io.json").read_text())
    assert set(ends) == set(bundle.graphs)
    assert ends["adapter"]["inputs"] == {
        "in/states": {"shape": [4, 16], "dtype": "float32", "file": "in_states.raw", "inner": None}
    }
    inner = ends["twice"]["inputs"]["x"]["inner"]
    assert inner["dtype"] == "uint16"
    assert inner["offset"] == -inner["zero_point"] < 0 < inner["scale"]
    for name in bundle.graphs:
        for kind in ("bin", "onnx"):
            made = (handed / "contexts" / f"{name}.{kind}").read_bytes()
            assert made == (compiled_bundle / "hexagon" / "sm8750" / f"{name}.{kind}").read_bytes()
            assert str(compiled_bundle).encode() not in made
    raw = np.fromfile(handed / "vectors/adapter/1/in_states.raw", "<f4")
    expected = np.fromfile(handed / "vectors/adapter/1/expected/out_text.raw", "<f4")
    assert (raw.size, expected.size) == (64, 32)
    lines = (handed / "vectors/adapter/input_list.txt").read_text().splitlines()
    assert lines == ["in/states:=adapter/0/in_states.raw", "in/states:=adapter/1/in_states.raw"]
    assert (handed / "shared/denoiser_shared.bin").stat().st_size > 1000
    text = (handed / "push_and_run.sh").read_text()
    assert "libQnnHtpV79Skel.so" in text
    assert "adapter) echo Result_0/out Result_1/out ;;" in text
    assert subprocess.run(["bash", "-n", handed / "push_and_run.sh"]).returncode == 0
    assert os.access(handed / "push_and_run.sh", os.X_OK)
    page = (handed / "README.md").read_text()
    assert "never been on a device" in page
    assert "| twice | w8a16 |" in page
    metadata = (handed / "metadata.yaml").read_text()
    assert metadata.startswith("model_files:\n  contexts/adapter.bin:\n    inputs:\n      in/states:\n")
    names = {path.name for path in handed.rglob("*")}
    assert not [name for name in names if name.endswith((".so", ".dll", ".pdf"))], "nothing of Qualcomm's"
    stated = json.loads((handed / "handover.json").read_text())["files"]
    assert set(stated) == {p.relative_to(handed).as_posix() for p in handed.rglob("*") if p.is_file()} - {
        "handover.json"
    }


@needs_compiler
def test_the_script_without_libraries_says_so(handed):
    done = subprocess.run(
        ["bash", handed / "push_and_run.sh"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode != 0
    assert "QNN_SDK_ROOT" in done.stderr


ADB = """\
#!/bin/sh
# A phone that is a folder of this machine.
case "$1" in
  shell) sh -c "$2" ;;
  push) cp -r "$2" "$3" ;;
  pull) cp -r "$2" "$3" ;;
esac
"""
NET_RUN = """\
#!/bin/sh
# Answers what is expected, where qnn-net-run would write it.
while [ $# -gt 0 ]; do
  case "$1" in
    --input_list) list=$2 ;;
    --output_dir) out=$2 ;;
    --retrieve_context) [ -s "$2" ] || exit 3 ;;
  esac
  shift
done
k=0
while read -r first rest; do
  file=${first#*:=}
  [ -s "$file" ] || exit 4
  mkdir -p "$out/Result_$k"
  for found in "$(dirname "$file")"/expected/*.raw; do
    case "$(basename "$found")" in
      out_text.raw) cp "$found" "$out/Result_$k/out/text.raw" || exit 5 ;;
      *) cp "$found" "$out/Result_$k/" ;;
    esac
  done
  k=$((k + 1))
done < "$list"
"""
LIBRARIES = ("android/libQnnHtp.so", "android/libQnnSystem.so", "android/libQnnHtpV79Stub.so")


@needs_compiler
def test_the_script_for_phones(handed, compiled_bundle, tmp_path, run):
    """With an adb and a qnn-net-run of straw: what is pushed where, and what is pulled, is what `npu compare` reads."""
    folder, sdk = shutil.copytree(handed, tmp_path / "handover"), tmp_path / "sdk"
    files = {f"lib/aarch64-{name}": "library" for name in LIBRARIES} | {"bin/aarch64-android/qnn-net-run": NET_RUN}
    files["lib/hexagon-v79/unsigned/libQnnHtpV79Skel.so"] = "library"
    for name, text in [*((sdk / name, text) for name, text in files.items()), (tmp_path / "bin" / "adb", ADB)]:
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(text)
    (tmp_path / "bin" / "adb").chmod(0o755)
    place = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "QNN_SDK_ROOT": str(sdk)}
    place["DEVICE_FOLDER"] = str(tmp_path / "phone")
    done = subprocess.run(["bash", folder / "push_and_run.sh"], capture_output=True, text=True, env=place, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "phone" / "libQnnHtpV79Skel.so").exists()
    code, out, err = run("npu", "compare", folder / "pulled", "--bundle", compiled_bundle, "--target", "sm8750")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == len(Bundle(compiled_bundle).graphs)
    assert all("999.0 dB to float32" in line and line.endswith("not timed") for line in lines), out


@needs_compiler
def test_laptops_get_no_script_for_phones(compiled_bundle, tmp_path):
    from nd_jax.converters.hexagon.handover import hand_over

    hand_over(compiled_bundle, TARGETS["sc8380xp"], tmp_path)
    assert not (tmp_path / "push_and_run.sh").exists()
    page = (tmp_path / "README.md").read_text()
    assert "Snapdragon X Elite" in page
    assert "adb" not in page
    assert "windows_run.py --out pulled" in page


@needs_compiler
def test_there_and_back(handed, compiled_bundle, tmp_path, run):
    """The script for laptops, run in the emulator: what it writes is what `npu compare` reads."""
    command = [sys.executable, handed / "windows_run.py", "--out", tmp_path / "pulled", "--repeat", "2"]
    command += ["--soc-model", "69", "--graphs", "adapter", "twice"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    code, out, err = run("npu", "compare", tmp_path / "pulled", "--bundle", compiled_bundle, "--target", "sm8750")
    assert code == 0, err
    assert "attention: nothing came back" in out
    measured = Bundle(compiled_bundle).content["hexagon"]["sm8750"]["graphs"]["twice"]["measured"]
    assert measured["runs"] == 4
    assert measured["ms"] > 0
    assert measured["snr_to_fp32"] > 30
