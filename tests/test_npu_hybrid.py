"""Bundles of hybrid folders: first frame, video and super-resolution beside JAX; W8A16 forms of their graphs."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import jax.numpy as jnp
from npu_hybrid import write_sharing_hybrid

from nd_jax import first_frame
from nd_jax.converters.bundle.full_size import full_size_picture
from nd_jax.converters.bundle.measure import GOALS
from nd_jax.converters.bundle.picture import lcm_steps, write_picture
from nd_jax.converters.bundle.quantise import quantise_graph
from nd_jax.converters.bundle.ranges import value_ranges
from nd_jax.converters.bundle.writer import BundleWriter
from nd_jax.converters.folders import load_folder
from nd_jax.converters.graphs.builder import DataFile
from nd_jax.converters.graphs.picture_parts import TOWERS
from nd_jax.converters.graphs.session import open_session, run_session, snr
from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.pipeline import Pipeline
from nd_jax.errors import UserError
from nd_jax.hybrid import HybridPipeline
from nd_jax.models.unet_config import UNetConfig
from nd_jax.npu_picture import shared_towers
from nd_jax.npu_workflow import build_bundle, quantised
from nd_jax.parts import FolderParts
from nd_jax.pyramid.lcm import LCMSchedule
from nd_jax.system import folder_defaults, load_system

pytestmark = pytest.mark.heavy
PROMPT, SEED = "a small red circle moves right on white", 3
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "cross", "square", "disc")]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return write_sharing_hybrid(tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def bundle(hybrid, tmp_path_factory):
    """Quantised; every float graph has been compared with JAX while it was built."""
    then = quantised(None, PROMPTS, samples=8, seed=1, overrides={})
    return build_bundle(load_system(hybrid), tmp_path_factory.mktemp("npu") / "bundle", then=then)


@pytest.fixture(scope="module")
def pipeline(bundle):
    return Pipeline(bundle, precision="fp32")


@pytest.fixture(scope="module")
def made(hybrid, tmp_path_factory):
    """What JAX makes of the prompt: states, latent and picture of the first frame, latents and frames of the video."""
    folder = load_folder(hybrid)
    video, plan, schedule = folder_defaults(folder, "hybrid")
    line, found = HybridPipeline(FolderParts(folder), video, plan=plan, schedule=schedule), {}

    def kept(name, function):
        def call(*arguments, **options):
            made = function(*arguments, **options)
            found[name] = dict(made) if isinstance(made, dict) else made  # the pipeline empties its own
            return made

        return call

    patch = pytest.MonkeyPatch()
    for name in ("read_prompts", "sample_latents", "fit"):
        patch.setattr(first_frame, name, kept(name, getattr(first_frame, name)))
    patch.setattr(line, "_encode", kept("first", line._encode))
    patch.setattr(line, "_sample", kept("latents", line._sample))
    (result,) = line.generate([PROMPT], [tmp_path_factory.mktemp("made") / "a.mp4"], seed=SEED)
    patch.undo()
    return found | {"frames": result.frames}


def test_a_shared_tower_has_one_graph(pipeline, hybrid):
    graphs, text = pipeline.bundle.graphs, pipeline.bundle["picture"]["text"]
    assert [entry["graph"] for entry in text] == ["picture_text_encoder", "text_encoder_2"]
    assert list(graphs["picture_text_encoder"]["outputs"]) == ["penultimate"]
    assert set(graphs["text_encoder_2"]["outputs"]) == {"text_embeds", "penultimate"}
    assert {"unet", "image_decoder", "upscaler"} <= graphs.keys()
    assert "picture_text_encoder_2" not in graphs
    assert not (pipeline.bundle.folder / "ssd_1b_tokenizer_2").exists()
    system = load_system(hybrid)
    parts, readers = FolderParts(load_folder(hybrid)), [system.tokenizers[name] for name in ("clip", "clip_2")]
    assert shared_towers(parts, system, readers) == {"picture_text_encoder_2": "text_encoder_2"}
    weights = system.params["text_encoder_2"]["text_projection"]
    system.params["text_encoder_2"]["text_projection"] = {"kernel": np.asarray(weights["kernel"]) + 1}
    assert not shared_towers(parts, system, readers)


def test_first_frames_are_those_of_jax(pipeline, made):
    condition = pipeline.encode_text([PROMPT])[0]
    states, pooled = pipeline.picture.text(PROMPT, condition.towers)
    (expected,) = made["read_prompts"]
    np.testing.assert_allclose(states, expected.states[0], atol=2e-5)
    np.testing.assert_allclose(pooled, expected.pooled, atol=2e-5)
    latent = pipeline.picture.sample((states, pooled), SEED, 0)
    (expected,) = made["sample_latents"]
    assert latent.shape == (16, 16, 4)
    np.testing.assert_allclose(latent, expected[0], rtol=0, atol=2e-5 * np.abs(expected).max())
    picture = pipeline.picture.decode(latent)
    assert picture.shape == made["fit"].shape == (64, 64, 3)
    assert np.abs(picture.astype(int) - made["fit"]).max() <= 1
    np.testing.assert_array_equal(picture, pipeline.make_picture(PROMPT, condition, SEED, 0))


def test_videos_are_those_of_jax(pipeline, made):
    """The latents that follow JAX's first frame, and their enlarged frames."""
    noise = pipeline.noise(SEED, 0)
    first = pipeline.encode_first_frame(made["fit"], noise.first)
    np.testing.assert_allclose(first, made["first"][0][0, 0], atol=1e-4)
    latents, expected = pipeline.latents(pipeline.encode_text([PROMPT]), noise, first=first), made["latents"][0][0]
    np.testing.assert_allclose(latents, expected, rtol=0, atol=5e-5 * np.abs(expected).max())
    frames = np.stack(list(pipeline.decode(latents)))
    assert frames.shape == (9, 128, 128, 3)
    assert np.abs(frames[::8].astype(int) - np.stack(made["frames"])).max() <= 1
    assert np.stack(list(pipeline.decode(latents, upscale=False))).shape == (9, 64, 64, 3)


def test_from_prompt_to_enlarged_video(pipeline, made):
    video = pipeline.video(PROMPT, seed=SEED)
    difference = np.abs(video[::8].astype(int) - np.stack(made["frames"]))
    assert difference.max() <= 3
    assert difference.mean() < 0.1


def test_steps_follow_the_schedule(bundle):
    """Order of loading, and what is run how often, with a first frame of its own and with a given one."""
    runner, seen = Pipeline(bundle), []
    runner.sessions.watch = lambda graph, *_: seen.append((graph, frozenset(runner.sessions._open)))
    runner.video(PROMPT)
    steps = {step["step"]: frozenset(step["load"]) for step in runner.bundle["schedule"]}
    assert list(steps) == [
        *("text", "picture_text", "picture", "picture_decode", "first_frame", "conditioning", "denoise", "decode")
    ]
    assert all(loaded in steps.values() for _, loaded in seen)
    ran = [graph for graph, _ in seen]
    assert ran.count("unet") == 4
    assert ran.count("text_encoder_2") == 1, "shared: run once"
    assert ran.count("upscaler") == 9
    assert ran.index("unet") < ran.index("image_decoder") < ran.index("vae_encoder") < ran.index("denoiser_stage0")
    assert not runner.sessions._open
    del seen[:]
    runner.video(PROMPT, image=np.zeros((64, 64, 3), np.uint8), upscale=False)
    assert not {"unet", "image_decoder", "picture_text_encoder", "upscaler"} & {graph for graph, _ in seen}


def test_quantised_first_frames(bundle):
    """A random UNet's latents grow fifteenfold from step to step, which costs its first steps the precision of its
    last: less is asked of it here than below."""
    deployed = Pipeline(bundle)
    for name, least in (("unet", 12), ("image_decoder", 31), ("upscaler", 40)):
        graph = deployed.bundle.graph(name)
        assert deployed.sessions.variant(name) == "w8a16"
        assert graph["snr"]["fp32_to_jax"] >= 100
        assert graph["snr"]["w8a16_test"] >= least, name
    deployed.bundle.check_all()
    video, expected = (Pipeline(bundle, precision=each).video(PROMPT) for each in ("deployed", "fp32"))
    assert np.abs(video.astype(int) - expected).mean() < 8


def test_a_unet_on_latents_of_one_size(pipeline, tmp_path):
    """As a trained one sees them; ranges of fewer draws would cut off the means of small groups."""
    source, rng = pipeline.bundle.model("unet", "fp32"), np.random.Generator(np.random.Philox(0))
    shapes = pipeline.bundle.graph("unet")["inputs"]
    runs = [{name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()} for _ in range(14)]
    ranges, session = value_ranges(source, runs[:12]), open_session(source)
    expected = np.stack([run_session(session, run)["noise"] for run in runs[12:]])
    for kind, least in (("int8", GOALS["unet"]), ("int16", 50)):
        target = tmp_path / f"{kind}.onnx"
        with DataFile(tmp_path / f"{kind}.data") as data:
            quantise_graph(source, target, data, ranges, {"*": kind})
        session = open_session(target)
        assert snr(expected, np.stack([run_session(session, run)["noise"] for run in runs[12:]])) >= least, kind


@pytest.mark.parametrize(("count", "after"), [(4, [999, 749, 499, 249]), (1, [999]), (2, [999, 499])])
def test_steps_are_the_schedules(count, after):
    rng, schedule = np.random.Generator(np.random.Philox(0)), LCMSchedule()
    x, predicted, noise = rng.standard_normal((3, 1, 2, 2, 4), np.float32)
    steps = lcm_steps(count)
    assert [step["timestep"] for step in steps] == after
    for step, following in zip(steps, [*after[1:], None], strict=True):
        expected = schedule.step(predicted, x, step["timestep"], following, noise).prev_sample
        signal, level, skip, out = (np.float32(step[key]) for key in ("signal", "noise", "skip", "out"))
        found = out * ((x - level * predicted) / signal) + skip * x
        if following is not None:
            found = np.float32(step["next"][0]) * found + np.float32(step["next"][1]) * noise
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c["picture"].pop("steps"), "does not read"),
        (lambda c: c["picture"]["steps"][0].update(signal=0), "does not read"),
        (lambda c: c["picture"]["steps"][0].update(next=None), "makes no sense"),
        (lambda c: c["picture"]["steps"].pop(), "makes no sense"),
        (lambda c: c["picture"].update(latent=[1, 2]), "makes no sense"),
        (lambda c: c["picture"].update(scale=0), "makes no sense"),
        (lambda c: c["picture"].update(times="picture/none"), "has no table"),
        (lambda c: c.update(picture=[]), "'picture' is not an object"),
        (lambda c: c["upscaler"].update(margin=-1), "'upscaler' makes no sense"),
        (lambda c: c["upscaler"].update(factor="inf"), "'upscaler' makes no sense"),
        (lambda c: c["upscaler"].pop("graph"), "'upscaler' makes no sense"),
    ],
)
def test_sections_that_make_no_sense(bundle, tmp_path, edit, told):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    content = json.loads((copy / "bundle.json").read_text())
    edit(content)
    (copy / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=told):
        Pipeline(copy)


def test_networks_that_are_missing(hybrid, tmp_path):
    lacking = shutil.copytree(hybrid, tmp_path / "lacking")
    shutil.rmtree(lacking / "ssd_1b_vae")
    with pytest.raises(UserError, match="has no ssd_1b_vae"):
        build_bundle(load_system(lacking), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_commands(bundle, hybrid, tmp_path, run):
    from nd_jax.data.clips import read_video

    for name, options in (("large", ()), ("small", ("--no-upscale",))):
        code, out, err = run(
            *("npu", "run", "--bundle", bundle, "--prompt", PROMPT, "--out", tmp_path / f"{name}.mp4"), *options
        )
        assert (code, out.strip()) == (0, str(tmp_path / f"{name}.mp4")), err
    assert read_video(tmp_path / "large.mp4").shape == (9, 128, 128, 3)
    assert read_video(tmp_path / "small.mp4").shape == (9, 64, 64, 3)
    code, out, err = run("npu", "inspect", "--bundle", bundle)
    assert code == 0, err
    assert "picture_decode" in out
    told = ["npu", "build", "--checkpoint", hybrid, "--out", tmp_path / "built", "--float-only"]
    code, out, err = run(*told, "--super-resolution", hybrid / "super_resolution")
    assert code == 0, err
    assert "upscaler: " in err


def test_guidance_tables(tmp_path):
    """A UNet with guidance distilled into it reads the embedding of guidance 0; shared towers bring nothing along."""
    from nd_jax.models.unet import guidance_embedding

    writer, names = BundleWriter(tmp_path), {name: f"text_encoder{'_2' * k}" for k, name in enumerate(TOWERS)}
    picture = dataclasses.replace(full_size_picture(), shared=names, unet=UNetConfig(time_cond_proj_dim=6))
    write_picture(writer, picture, "text")
    assert writer.content["picture"]["guidance"] == "picture/guidance"
    assert [entry["table"] for entry in writer.content["picture"]["text"]] == [f"{n}/embedding" for n in names.values()]
    assert set(writer.content["tables"]) == {"picture/times", "picture/sizes", "picture/guidance"}
    stored = np.fromfile(tmp_path / "tables" / "picture.guidance.bin", "<f4")
    np.testing.assert_array_equal(stored, np.asarray(guidance_embedding(jnp.zeros(1), 6))[0])
    np.testing.assert_allclose(stored[0], np.sin(-1000.0), atol=1e-4)
