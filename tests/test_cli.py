"""The command line: help, options, and one line and exit code 2 for everything a user can put right."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_system
from conftest import GOLDEN
from PIL import Image

from nd_jax import cli
from nd_jax.commands import train as train_command
from nd_jax.data.clips import read_video
from nd_jax.errors import UserError

# ---- help


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb(run, verb):
    arguments = verb.split() if verb != "train" else ["train", "shapes_tiny", "teacher"]
    code, out, err = run(*arguments, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: nd-jax " + " ".join(arguments))
    if verb != "verify":
        assert "(default:" in out


def test_help_without_a_verb(run):
    for arguments in ((), ("--help",), ("help",)):
        code, out, _ = run(*arguments)
        assert code == 0
        assert all(verb in out for verb in cli.VERBS)
    assert set(cli.SUMMARIES) == set(cli.VERBS)


def test_help_of_a_group_lists_its_verbs_only(run):
    code, out, _ = run("prune", "--help")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [
        verb.split() for verb in cli.VERBS if verb.startswith("prune ")
    ]


def test_help_of_train_lists_presets_and_runs(run):
    for arguments in (["train", "--help"], ["train", "shapes_tiny", "--help"]):
        code, out, _ = run(*arguments)
        assert code == 0
        assert "shapes_tiny: codec, teacher, recovery" in out
    _, out, _ = run("train", "shapes_tiny", "codec", "--help")
    for told in ("--recipe.batch INT", "--loop.steps INT", "Clips per update.", "--loop.mesh.fsdp INT"):
        assert told in out


# ---- what tyro complains about


def test_options_that_do_not_exist(refused, monkeypatch):
    refused("fly", told=("'fly'", "generate", "train"))
    refused("prune", "away", told=("prune importance", "prune apply"))
    refused("generate", "--chekpoint", "x", told=("--chekpoint", "perhaps --checkpoint?"))
    refused("generate", "--checkpoint", "x", "--seed", "many", told=("--seed", "many"))
    refused("generate", "--checkpoint", "x", "--mode", "odd", told=("--mode", "'odd'", "hybrid", "monolithic"))
    refused("generate", "--checkpoint", told="--checkpoint")
    refused("verify", told="PATH")


def test_unknown_presets_runs_and_fields(refused, tmp_path):
    refused("train", told=("PRESET RUN", "shapes_tiny: codec"))
    refused("train", "shapes_huge", "codec", told=("'shapes_huge'", "shapes_tiny"))
    refused("train", "shapes_tiny", "dessert", told=("'dessert'", "codec, teacher, recovery"))
    refused("train", "shapes_tiny", told=("PRESET RUN", "codec"))
    codec = ("train", "shapes_tiny", "codec", "--out", tmp_path / "x")
    refused(*codec, "--recipe.bach", 3, told=("--recipe.bach", "perhaps --recipe.batch?"))
    refused(*codec, "--recipe.batch", "few", told=("--recipe.batch", "few"))
    refused(*codec, "--recipe.optim.schedule", "zigzag", told=("--recipe.optim.schedule", "cosine"))
    refused("data", "prepare", "shapes_huge", "--out", tmp_path / "x", told=("'shapes_huge'", "shapes_tiny"))
    refused("data", "prepare", "neodragon_320p", "--out", tmp_path / "x", told=("neodragon_320p", "no shapes world"))
    assert list(tmp_path.iterdir()) == []


def test_every_preset_loads():
    from nd_jax.recipes.preset import as_settings, load_preset, preset_names

    for name in preset_names():
        preset = load_preset(name)
        assert preset.name == name
        assert json.dumps({run: as_settings(settings) for run, settings in preset.runs.items()})
        units, height, width = preset.latent_size
        assert units > 1
        assert height % 4 == width % 4 == 0


def test_numbers_out_of_range(refused, tmp_path):
    base = ("generate", "--checkpoint", tmp_path, "--prompt", "a", "--out", tmp_path / "videos")
    refused(*base, "--seed", -1, told=("--seed is -1", "at least 0"))
    refused(*base, "--batch", 0, told=("--batch is 0", "at least 1"))
    refused("data", "prepare", "shapes_tiny", "--out", tmp_path / "x", "--clips", 0, told="--clips is 0")
    refused("evaluate", tmp_path, "--prompts", 0, told="--prompts is 0")


# ---- folders and files of checkpoints


def test_wrong_folders(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path, told in (("nowhere", "does not exist"), ("empty", "not a checkpoint folder"), ("file", "is a file")):
        place = tmp_path / path
        for arguments in (
            ("convert", "import", place, tmp_path / "out"),
            ("convert", "export", place, tmp_path / "out"),
            ("generate", "--checkpoint", place, "--prompt", "a", "--out", tmp_path / "out"),
            ("prune", "apply", place, "--drop", 0, "--out", tmp_path / "out"),
            ("prune", "importance", place),
            ("evaluate", place, "--out", tmp_path / "out"),
            ("data", "features", place, "--captions", 9, "--out", tmp_path / "out"),
        ):
            refused(*arguments, told=(str(place), told))
    adapter = GOLDEN / "context_adapter"
    refused(
        "generate", "--checkpoint", adapter, "--prompt", "a", "--out", tmp_path / "out", told="diffusion_transformer"
    )
    refused("verify", tmp_path / "empty", told=str(tmp_path / "empty"))
    refused("verify", tmp_path / "nowhere", told=str(tmp_path / "nowhere"))
    refused("data", "latents", "--data", tmp_path, "--codec", adapter, "--out", tmp_path / "out", told="data prepare")
    assert not (tmp_path / "out").exists()


# ---- outputs


def test_existing_outputs_ask_for_overwrite(refused, run, tiny_folder, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("keep me")
    system = tiny_folder / "system"
    component = GOLDEN / "context_adapter"
    for arguments in (
        ("convert", "import", component, taken),
        ("convert", "export", component, taken),
        ("prune", "apply", system, "--drop", 0, "--out", taken),
        ("data", "prepare", "shapes_tiny", "--out", taken),
        ("data", "latents", "--data", tmp_path, "--codec", component, "--out", taken),
        ("data", "prompts", tmp_path / "a.txt", "--out", taken),
        ("data", "features", system, "--captions", 9, "--out", taken),
    ):
        refused(*arguments, told=(str(taken), "--overwrite"))
        refused(*arguments, "--overwrite", told=(str(taken), "not a folder written by nd-jax"))
    (taken / "000-a-ball.mp4").write_text("mine")
    (taken / "report.html").write_text("mine")
    refused(
        "generate", "--checkpoint", system, "--prompt", "a ball", "--out", taken, told=("000-a-ball.mp4", "--overwrite")
    )
    refused("evaluate", system, "--out", taken, told=("report.html", "--overwrite"))
    refused("prune", "importance", system, "--out", taken / "letter.txt", told=("letter.txt", "--overwrite"))
    assert (taken / "letter.txt").read_text() == "keep me"

    assert run("convert", "import", component, tmp_path / "ours")[0] == 0
    refused("convert", "import", component, tmp_path / "ours", told="--overwrite")
    code, out, _ = run("convert", "import", component, tmp_path / "ours", "--overwrite", "--dtype", "bf16")
    assert (code, out.strip()) == (0, str(tmp_path / "ours"))


def test_outputs_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    component = GOLDEN / "context_adapter"
    refused("convert", "import", component, tmp_path / "file" / "out", told=str(tmp_path / "file"))
    refused("convert", "import", component, component / "out", told="nested")


def test_conversion_there_and_back(run, tiny_folder, tmp_path):
    """By the command line: every file of the folder comes back byte for byte, settings and tokenizers included."""
    system = tiny_folder / "system"
    assert run("convert", "import", system, tmp_path / "ours")[0] == 0
    assert (tmp_path / "ours" / "causal_video_vae" / "params.safetensors").exists()
    assert run("convert", "export", tmp_path / "ours", tmp_path / "torch")[0] == 0
    files = sorted(path.relative_to(system) for path in system.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "torch") for path in (tmp_path / "torch").rglob("*") if path.is_file()
    )
    for file in files:
        assert (system / file).read_bytes() == (tmp_path / "torch" / file).read_bytes(), file


def test_pruning_by_name(run, refused, tiny_folder, tmp_path):
    from nd_jax.system import load_system

    system = tiny_folder / "system"
    refused("prune", "apply", system, "--out", tmp_path / "p", told=("--drop", "--count"))
    refused("prune", "apply", system, "--drop", 2, "--out", tmp_path / "p", told=("[2]", "last"))
    code, out, err = run("prune", "apply", system, "--drop", 1, "--out", tmp_path / "p")
    assert (code, out.strip()) == (0, str(tmp_path / "p"))
    assert "removed 1; kept 0, 2" in err
    smaller = load_system(tmp_path / "p")
    assert smaller.config.diffusion_transformer.num_layers == 2
    assert smaller.video == tiny_system.VIDEO
    assert set(smaller.tokenizers) == {"t5", "clip", "clip_2"}


# ---- generate


def test_prompts_that_cannot_be_read(refused, tmp_path):
    base = ("generate", "--checkpoint", tmp_path, "--out", tmp_path / "videos")
    refused(*base, told="--prompt")
    refused(*base, "--prompts", tmp_path / "none.txt", told="none.txt")
    (tmp_path / "latin.txt").write_bytes("père".encode("latin-1"))
    refused(*base, "--prompts", tmp_path / "latin.txt", told=("latin.txt", "UTF-8"))
    (tmp_path / "empty.txt").write_text("")
    refused(*base, "--prompts", tmp_path / "empty.txt", told=("empty.txt", "is empty"))
    refused(*base, "--prompts", tmp_path / "empty.txt", "--prompt", "x", told="either")


def test_sizes_that_do_not_fit(refused, tiny_folder, tmp_path):
    base = ("generate", "--checkpoint", tiny_folder / "system", "--prompt", "a", "--out", tmp_path / "videos")
    refused(*base, "--height", 70, told=("70x64", "nearest is 64x64"))
    refused(*base, "--width", 120, told=("64x120", "nearest is 64x128"))
    refused(*base, "--frames", 12, told=("12 frames", "nearest is 9"))
    refused(*base, "--steps", 1, 1, told="3")
    refused(*base, "--steps", 0, 1, 1, told="at least 1")
    refused(*base, "--guidance", "nan", told="finite")
    refused(*base, "--mode", "hybrid", told="--image")
    refused(*base, "--mode", "hybrid", "--image", tiny_folder, told="not a file")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    refused(*base, "--image", tmp_path / "broken.png", told=("broken.png", "does not decode"))
    assert not (tmp_path / "videos").exists()


def test_generate_writes_videos_and_warns(run, monkeypatch, tiny, tiny_generator, tmp_path):
    """From a file of prompts: one too long, one empty. Warnings on standard error, paths on standard output."""
    asked = []
    monkeypatch.setattr("nd_jax.system.load_system", lambda *given, **options: asked.append((given, options)) or tiny)
    monkeypatch.setattr(
        "nd_jax.generate.Generator", lambda *given, **size: asked.append((given, size)) or tiny_generator
    )
    (tmp_path / "prompts.txt").write_text("a red ball\n\n" + "very " * 20 + "large zebra\n")
    arguments = ("generate", "--checkpoint", tmp_path / "system", "--prompts", tmp_path / "prompts.txt")
    arguments += ("--out", tmp_path / "videos", "--batch", 2, "--width", 128, "--frames", 17, "--mode", "monolithic")
    code, out, err = run(*arguments)
    assert code == 0, err
    assert asked == [
        ((tmp_path / "system",), {"mode": "monolithic"}),
        ((tiny,), {"height": 64, "width": 128, "frames": 17}),
    ]
    warnings = err.splitlines()
    assert len(warnings) == 2
    assert all(line.startswith("warning: prompt cut to 12 tokens") and "zebra" in line for line in warnings)
    paths = [Path(line) for line in out.splitlines()]
    assert [path.name for path in paths[:2]] == ["000-a-red-ball.mp4", "001-video.mp4"]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == sorted(path.name for path in paths)
    for path in paths[:3]:
        assert read_video(path).shape == (17, 64, 128, 3)
    assert Image.open(paths[3]).size[0] > 2 * 128
    code, _, err = run(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert "--overwrite" in err


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_first_frames_of_any_mode_and_size(run, monkeypatch, tiny_folder, tmp_path, mode):
    """The image reaches generation in the video's size, as RGB."""
    grey = np.linspace(0, 255, 37 * 91).reshape(37, 91)
    if mode == "I;16":
        image = Image.fromarray((grey * 257).astype(np.uint16))
    else:
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    seen = []

    def instead(system, lines, *, first_frames, generator, **_):
        seen.append(first_frames)
        yield np.zeros((len(lines), 1, generator.height, generator.width, 3), np.uint8)

    monkeypatch.setattr("nd_jax.generate.generate_batches", instead)
    out = tmp_path / "videos"
    base = ("generate", "--checkpoint", tiny_folder / "system", "--prompt", "a", "b", "--out", out, "--width", 128)
    assert run(*base, "--image", path)[0] == 0
    (frames,) = seen
    assert frames.shape == (2, 64, 128, 3)
    assert frames.dtype == np.uint8
    thirds = frames[0, :63].astype(float).reshape(3, -1).mean(1)
    assert thirds[0] + 40 < thirds[1] < thirds[2] - 40, "the picture's ramp from dark to light is gone"


# ---- train


OUTCOME = SimpleNamespace(step=7, reason="steps", seconds=1.0, finished=True)


def test_overrides_reach_the_run(run, monkeypatch, tmp_path):
    """Every field of recipe and loop, checked where the work would begin."""
    seen = []

    def train_codec(preset, settings, out, *, clips, videos):
        seen.append((preset.name, settings, out, clips, videos))
        return OUTCOME

    monkeypatch.setattr("nd_jax.workflow.train_codec", train_codec)
    arguments = ("train", "shapes_tiny", "codec", "--out", tmp_path / "run", "--videos", "a.mp4", "b.mp4")
    changes = ("--recipe.batch", 2, "--recipe.optim.learning-rate", 0.5, "--loop.steps", 7, "--loop.mesh.data", 2)
    code, out, err = run(*arguments, *changes)
    assert (code, out.strip()) == (0, str(tmp_path / "run" / "codec"))
    assert "step 7" in err
    ((name, settings, folder, clips, videos),) = seen
    assert (name, folder, clips, videos) == ("shapes_tiny", tmp_path / "run", None, (Path("a.mp4"), Path("b.mp4")))
    assert (settings.recipe.batch, settings.recipe.optim.learning_rate, settings.loop.steps) == (2, 0.5, 7)
    assert settings.loop.mesh.data == 2
    from nd_jax.recipes.preset import load_preset

    unchanged = load_preset("shapes_tiny").run("codec")
    assert settings.recipe.optim.b2 == unchanged.recipe.optim.b2


def test_interrupted_training_says_how_to_go_on(run, monkeypatch, tmp_path):
    stopped = SimpleNamespace(step=7, reason="SIGINT", seconds=1.0, finished=False)
    monkeypatch.setattr("nd_jax.workflow.train_codec", lambda *_, **__: stopped)
    code, out, err = run("train", "shapes_tiny", "codec", "--out", tmp_path, "--videos", "a.mp4")
    assert (code, out) == (130, "")
    assert "SIGINT" in err
    assert "run the same command again" in err


def test_training_needs_its_inputs(refused, tiny_folder, tmp_path):
    codec = ("train", "shapes_tiny", "codec", "--out", tmp_path / "run")
    refused(*codec, told=("--data", "--videos"))
    refused(*codec, "--data", tmp_path, told=(str(tmp_path), "nd-jax data prepare"))
    refused(*codec, "--videos", tmp_path / "none.mp4", told="none.mp4")
    flow = ("train", "shapes_tiny", "teacher", "--out", tmp_path / "run")
    refused(*flow, told="--latents")
    refused(*flow, "--latents", tmp_path, told=("--data", "--codec", "--start"))
    refused(*flow, "--latents", tmp_path, "--start", tiny_folder / "system", told=(str(tmp_path), "data latents"))
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_its_own_folder(monkeypatch, tiny_folder, tmp_path):
    """With --start, tokenizers and codec come from there."""
    from nd_jax.recipes.preset import load_preset

    seen = {}

    def train_flow(preset, run, settings, out, **given):
        seen.update(given)
        return OUTCOME, None

    monkeypatch.setattr("nd_jax.workflow.train_flow", train_flow)
    settings = load_preset("shapes_tiny").run("recovery")
    options = train_command.FlowOptions(tmp_path, settings, latents=tmp_path, start=tiny_folder / "system")
    assert train_command.train("shapes_tiny", "recovery", options) == 0
    assert seen["codec_folder"] == tiny_folder / "system" / "causal_video_vae"
    assert seen["start"].config.diffusion_transformer == tiny_system.CONFIG.diffusion_transformer
    assert {path.parent for path in seen["tokenizers"].values()} == {tiny_folder / "system"}


# ---- endings


def test_interruption_and_broken_disks(run, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    for error, code, told in ((interrupt, 130, "interrupted\n"), (full, 2, "No space left on device")):
        monkeypatch.setattr("nd_jax.converters.convert.convert_import", error)
        found, out, err = run("convert", "import", tmp_path, tmp_path / "y")
        assert (found, out, err.count("\n")) == (code, "", 1)
        assert told in err


def test_messages_are_one_line():
    assert str(UserError("two\nlines  and\ttabs")) == "two lines and tabs"


def test_exit_codes_of_verify(run, monkeypatch, tmp_path):
    for failed in (0, 1):
        monkeypatch.setattr("nd_jax.verify.run", functools.partial(lambda code, *_: code, failed))
        assert run("verify", tmp_path)[0] == failed


def test_the_module_is_the_command(monkeypatch):
    import runpy
    import sys

    monkeypatch.setattr(sys, "argv", ["nd-jax", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("nd_jax", run_name="__main__")
    assert not stop.value.code


# ---- the dataset


def test_data_prepare_is_quiet_and_whole(run, refused, tmp_path):
    from nd_jax.data.tokenizers import load_tokenizers
    from nd_jax.datasets import open_data, shapes_captions

    out = tmp_path / "data"
    code, printed, err = run("data", "prepare", "shapes_tiny", "--out", out, "--clips", 6, "--seed", 2)
    assert (code, printed.strip()) == (0, str(out))
    assert err == "6 clips and three tokenizers\n"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    clips = open_data(out)
    assert len(clips) == 6
    assert clips[0]["video"].shape == (33, 64, 64, 3)
    captions = shapes_captions(clips, per_clip=3, seed=1)
    assert [len(each) for each in captions] == [3] * 6
    assert captions == shapes_captions(clips, per_clip=3, seed=1)
    assert captions != shapes_captions(clips, per_clip=3, seed=2)
    tokens = load_tokenizers(out / "tokenizers", tokenizer_3=40)["tokenizer_3"]([captions[0][0]])
    assert tokens.mask.sum() > 3
    refused("data", "prepare", "shapes_tiny", "--out", out, told="--overwrite")
    assert run("data", "prepare", "shapes_tiny", "--out", out, "--clips", 5, "--overwrite")[0] == 0
    assert len(open_data(out)) == 5
    record = json.loads((out / "dataset.json").read_text())
    for damage in ({**record, "clips": "5"}, {"world": "64x64"}, [1]):
        (out / "dataset.json").write_text(json.dumps(damage))
        with pytest.raises(UserError, match=r"dataset\.json"):
            open_data(out)


def test_statistics_are_those_of_the_latents():
    from nd_jax.system import latent_stats
    from nd_jax.workflow import with_statistics

    rng = np.random.Generator(np.random.Philox(1))
    latents = (rng.standard_normal((50, 3, 4, 4, 4)) * [1, 2, 3, 4] + [0, 1, 2, 3]).astype(np.float32)
    latents[:, 0] = latents[:, 0] * 0.5 - 7
    config = with_statistics(tiny_system.CONFIG.causal_video_vae, latents, chunk=7)
    normal = np.asarray(latent_stats(config).normalise(latents))
    for frames in (normal[:, :1], normal[:, 1:]):
        np.testing.assert_allclose(frames.mean((0, 1, 2, 3)), 0, atol=1e-4)
        np.testing.assert_allclose(frames.std((0, 1, 2, 3)), 1, atol=1e-4)
    still = with_statistics(config, latents[:, :1])
    assert dataclasses.asdict(still)["latents_mean"][0] == dataclasses.asdict(still)["latents_mean"][1]


@pytest.mark.parametrize(
    "words",
    [
        ("train", "shapes_tiny", "teacher", "--out", "gs://bucket/run", "--latents", "l"),
        ("train", "shapes_tiny", "teacher", "--out", "run", "--latents=s3://bucket/latents"),
        ("data", "latents", "--data", "gs://bucket/data", "--codec", "c", "--out", "o"),
    ],
)
def test_addresses_of_buckets_are_refused(run, words):
    code, _, err = run(*words)
    assert code == 2
    assert "://bucket/" in err
    assert "expected a path; mount the bucket" in err
    assert err.count("\n") == 1


def test_what_others_read_from_buckets_is_left_to_them():
    cli.refuse_buckets(["--loop.compile-cache", "gs://bucket/compiled", "--beam", "temp_location=gs://b/t"], "nd-jax")
    cli.refuse_buckets(["--prompt", "a film of gs://bucket"], "nd-jax")
