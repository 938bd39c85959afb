"""A whole bundle on Hexagon: every graph compiled, and a video with all of them in the emulator."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_qnn")

from npu_systems import student_system

from nd_jax.converters.runtime.manifest import Bundle
from nd_jax.npu_workflow import build_bundle, quantised

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "cross", "square", "disc")]


@pytest.mark.heavy
def test_a_student(tiny_folder, tmp_path, run):
    system = student_system(tiny_folder / "tokenizers", frames=9)
    then = quantised(None, PROMPTS, samples=6, seed=1, overrides={})
    folder = build_bundle(system, tmp_path / "bundle", check=False, then=then)
    code, _, err = run("npu", "compile", folder, "--target", "sm8750")
    assert code == 0, err
    assert "Qualcomm_LICENSE.pdf" in err
    (tmp_path / "prompts").write_text("\n".join(PROMPTS[:2]))
    code, out, err = run(
        "npu", "emulate", folder, "--target", "sm8750", "--videos", 2, "--prompts", tmp_path / "prompts",
        "--out", tmp_path / "videos",
    )  # fmt: skip
    assert code == 0, err
    bundle = Bundle(folder)
    bundle.check_all()
    entries = bundle.content["hexagon"]["sm8750"]["graphs"]
    assert set(entries) == set(bundle.graphs)
    for name, entry in entries.items():
        graph, snr = bundle.graph(name), entry["snr"]
        assert entry["unsupported"] == 0
        if graph["precision"] == "w8a16" and "int16" not in graph["overrides"].values():
            assert snr["emulator_to_fp32"] > snr["cpu_to_fp32"] - 1, name
        assert snr["emulator_to_fp32"] > graph["snr"].get("goal", 0), name
    assert all(entries[f"denoiser_stage{k}"]["transposes"] == 0 for k in range(3))
    assert entries["decoder"]["transposes"] == 0
    told = json.loads(out.splitlines()[0])
    assert told["videos"] == 2
    assert min(told["psnr_to_cpu"]) > 25
    assert len(list((tmp_path / "videos").glob("sm8750-*-emulator.mp4"))) == 2
