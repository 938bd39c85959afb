"""The runtime beside JAX: same noise arrays, same latents and videos; and what it imports."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from npu_systems import student_system

import nd_jax.converters.runtime
from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.noise import named_noise
from nd_jax.converters.runtime.pipeline import Pipeline
from nd_jax.converters.runtime.sampler import Plan
from nd_jax.data.captions import corpus
from nd_jax.generate import Generator
from nd_jax.npu_workflow import build_bundle
from nd_jax.pyramid.sampler import SamplePlan

PROMPT = "a small red circle moves right on a white background"
PLANS = {
    "one step": Plan((1, 1, 1), (1, 1, 1), 0.0, 0.0),
    "many steps, guided": Plan((3, 2, 2), (2, 1, 3), 3.0, 1.5, "plain"),
    "official grid": Plan((2, 2, 2), (2, 1, 2), 0.0, 2.0, "official"),
    "renewed noise": Plan((2, 1, 2), (1, 2, 2), 0.0, 0.0, "plain", True),
}


@pytest.fixture(scope="module")
def system(tiny_folder):
    return student_system(tiny_folder / "tokenizers")


@pytest.fixture(scope="module")
def bundle(system, tmp_path_factory):
    return build_bundle(system, tmp_path_factory.mktemp("npu") / "bundle", check=False)


@pytest.fixture(scope="module")
def pipeline(bundle):
    return Pipeline(bundle)


@pytest.fixture(scope="module")
def generator(system):
    return Generator(system, height=64, width=64, frames=17)


def test_texts_and_conditions(system, pipeline):
    texts = [PROMPT, "", "Hello,   World! it's 3 o'clock — naïve"]
    for text, found in zip(texts, pipeline.encode_text(texts), strict=True):
        expected, _ = system.conditions([text])
        np.testing.assert_array_equal(found.mask, expected.mask[0])
        np.testing.assert_allclose(found.text, expected.text[0], atol=2e-5)
        np.testing.assert_allclose(found.pooled, expected.pooled, atol=2e-5)


def test_ids_are_those_of_the_library(system, pipeline):
    lines = [
        *corpus(count=40),
        "don't 12 STOP!",
        "!",
        "a<|endoftext|>b",
        "x" * 200,
        "red " * 40,
        "\tnew\nlines ",
        "日本",
    ]
    for name, tokenizer in zip(("t5", "clip", "clip_2"), pipeline._tokenizers, strict=True):
        expected = system.tokenizers[name](lines)
        for row, line in enumerate(lines):
            ids, mask = tokenizer(line)
            assert (ids.tolist(), mask.tolist()) == (expected.ids[row].tolist(), expected.mask[row].tolist()), line


QUICK = {("one step", False), ("many steps, guided", True)}
RUNS = [(name, given) for name in PLANS for given in (False, True)]


@pytest.mark.parametrize(
    ("name", "given"), [pytest.param(*run, marks=[] if run in QUICK else [pytest.mark.heavy]) for run in RUNS]
)
def test_latents_are_those_of_jax(system, pipeline, generator, name, given):
    plan = PLANS[name]
    expected, noise = generator.noise(7, ["video"]), pipeline.noise(7, "video")
    prompts = ["a blue cross", PROMPT][not plan.guided :]
    conditions = [system.conditions([prompt])[0] for prompt in prompts]
    image = np.random.Generator(np.random.Philox(0)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    firsts = None, None
    if given:
        firsts = (
            generator.encode_first_frame(image[None], expected.first),
            pipeline.encode_first_frame(image, noise.first),
        )
        np.testing.assert_allclose(firsts[1], firsts[0][0, 0], atol=1e-4)
    found = pipeline.latents(pipeline.encode_text(prompts), noise, plan=plan, first=firsts[1])
    negative = conditions[0] if plan.guided else None
    jax_plan = SamplePlan(**vars(plan))
    latents = generator.latents(conditions[-1], expected, jax_plan, negative=negative, first_latent=firsts[0])
    scale = np.abs(latents).max()
    np.testing.assert_allclose(found, latents[0], rtol=0, atol=2e-5 * scale)


def test_videos_are_those_of_jax(pipeline, generator):
    noise = pipeline.noise(3, 0)
    latents = noise.initial.copy()
    video = np.stack(list(pipeline.decode(latents)))
    expected = generator.decode(latents[None])[0]
    assert video.shape == expected.shape == (17, 64, 64, 3)
    assert np.abs(video.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_first_frames_of_any_mode(mode, tmp_path):
    """The same pixels as nd-jax's own reader."""
    from PIL import Image

    from nd_jax.converters.runtime.video import read_image
    from nd_jax.data.clips import read_image as read_ours

    pixels = np.random.Generator(np.random.Philox(0)).integers(0, 256, (30, 50, 4), dtype=np.uint8)
    made = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels)
    made = made if mode == "I;16" else made.convert(mode)
    made.save(tmp_path / "image.png")
    found = read_image(tmp_path / "image.png", 16, 24)
    np.testing.assert_array_equal(found, read_ours(tmp_path / "image.png", size=(16, 24)))


def test_noise_is_named_alike(generator):
    sizes = [envelope.clips[-1][1:] for envelope in generator.envelopes]
    found, expected = named_noise(5, 2, 3, sizes, 4, 1 / 3), generator.noise(5, [2])
    np.testing.assert_array_equal(found.initial, expected.initial[0])
    np.testing.assert_array_equal(found.first, expected.first[0, 0])
    np.testing.assert_allclose(found.block(1, 2), expected.block(1, 2)[0, 0], atol=1e-6)
    np.testing.assert_array_equal(found.fresh(1, 2, 0), expected.fresh(1, 2, 0)[0, 0])


def test_graphs_are_loaded_and_unloaded_as_the_schedule_says(bundle):
    pipeline = Pipeline(bundle)
    loaded = []
    pipeline.sessions.watch = lambda graph, *_: loaded.append((graph, sorted(pipeline.sessions._open)))
    pipeline.video(PROMPT, plan=PLANS["one step"])
    steps = {step["step"]: sorted(step["load"]) for step in pipeline.bundle["schedule"]}
    by_graph = {graph: step for step, graphs in steps.items() for graph in graphs}
    assert all(there == steps[by_graph[graph]] for graph, there in loaded)
    assert [graph for graph, _ in loaded].count("conditioning") == 3
    assert not pipeline.sessions._open
    assert 0 < pipeline.sessions.peak < sum(each["bytes"] for each in pipeline.bundle.files.values())


def test_runtime_alone_imports_no_jax(bundle, tmp_path):
    """In a process of its own, under its own name: a whole video, and no jax, flax, torch or nd_jax on the way."""
    (tmp_path / "nd_jax_runtime").symlink_to(Path(nd_jax.converters.runtime.__file__).parent)
    out = tmp_path / "video.mp4"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from nd_jax_runtime.cli import main\n"
        f"code = main([{str(bundle)!r}, '--prompt', 'a red circle', '--out', {str(out)!r}, '--guidance', '0'])\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(code, sorted(loaded & {'jax', 'jaxlib', 'flax', 'torch', 'nd_jax', 'transformers', 'onnx'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert out.stat().st_size > 1000


def test_runtime_is_a_distribution_of_its_own():
    import tomllib

    folder = Path(nd_jax.converters.runtime.__file__).parent
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0] for requirement in project["dependencies"]}
    assert names == {"av", "numpy", "onnxruntime", "pillow", "sentencepiece", "tokenizers"}


def test_plans_that_make_no_sense(bundle, pipeline):
    good = vars(pipeline.plan)
    for change in ({"first_steps": [1, 1]}, {"grid": "other"}, {"later_guidance": float("nan")}, {"steps": 3}):
        with pytest.raises(BundleError, match="expected 3 step counts"):
            Plan.from_dict(good | change, 3)
    with pytest.raises(BundleError, match="expected 2"):
        pipeline.latents(
            pipeline.encode_text([PROMPT]), pipeline.noise(0, 0), plan=replace(pipeline.plan, first_guidance=3)
        )
