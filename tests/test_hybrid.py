"""Hybrid generation from one folder, end to end with random weights: files, sizes, memory, checks, agreement."""

import dataclasses
import json
import shutil

import av
import numpy as np
import pytest
from tiny_hybrid import FIRST_FRAME, write_hybrid

from nd_jax.converters.component import load_component, save_component
from nd_jax.converters.folders import load_folder
from nd_jax.data.clips import read_video
from nd_jax.errors import UserError
from nd_jax.generate import generate
from nd_jax.hybrid import HybridPipeline
from nd_jax.meter import Meter, Part
from nd_jax.parts import FolderParts, parse_dtypes
from nd_jax.prompt_suffix import with_suffix
from nd_jax.system import folder_defaults, load_system

PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return write_hybrid(tmp_path_factory.mktemp("hybrid"))


def pipeline(path, **options):
    folder = load_folder(path)
    video, plan, schedule = folder_defaults(folder, "hybrid")
    parts = FolderParts(folder, options.pop("dtypes", {}))
    return HybridPipeline(parts, video, plan=plan, schedule=schedule, **options)


@pytest.fixture(scope="module")
def made(hybrid, tmp_path_factory):
    """Videos of both prompts, and the pipeline that made them."""
    line = pipeline(hybrid)
    files = [tmp_path_factory.mktemp("made") / f"{n}.mp4" for n in range(2)]
    return line, files, list(line.generate(PROMPTS, files, seed=3))


def test_files_have_twice_the_size(made):
    _, files, results = made
    assert [each.file for each in results] == files
    for file, result in zip(files, results, strict=True):
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height, stream.frames, stream.average_rate) == (128, 128, 9, 24)
        assert [frame.shape for frame in result.frames] == [(128, 128, 3)] * 2  # frames 0 and 8
        read = read_video(file)
        assert np.abs(read[0].astype(int) - result.frames[0]).mean() < 30  # random noise, compressed
    assert not np.array_equal(results[0].frames[0], results[1].frames[0])


def test_every_part_is_measured(made):
    names = [part.name for part in made[0].meter.parts]
    assert len(names) == 9
    assert names[0].startswith("text")
    assert names[3] == "first frame: UNet"
    assert all(part.peak > 50 << 20 and part.seconds > 0 for part in made[0].meter.parts)
    assert str(made[0].meter.parts[3]) in made[0].meter.table()


def test_a_second_call_compiles_nothing_and_makes_the_same(made, tmp_path):
    line, _, results = made
    before = line.compilations
    assert before > 10
    (again, _) = line.generate(PROMPTS, [tmp_path / "a.mp4", tmp_path / "b.mp4"], seed=3)
    assert line.compilations == before
    np.testing.assert_array_equal(again.frames[0], results[0].frames[0])


@pytest.mark.heavy
def test_it_is_what_generation_from_that_first_frame_gives(hybrid, tmp_path):
    """Without super-resolution: the same frames as the ordinary generator's, started from the picture it made."""
    plain = shutil.copytree(hybrid, tmp_path / "plain")
    shutil.rmtree(plain / "super_resolution")
    pictures = []
    line = pipeline(plain)
    kept = line._encode
    line._encode = lambda given, seed: pictures.extend(given.values()) or kept(given, seed)
    (result,) = line.generate(PROMPTS[:1], [tmp_path / "a.mp4"], seed=5)
    system = load_system(plain, mode="hybrid")
    video = generate(system, PROMPTS[:1], seed=5, first_frames=np.stack(pictures))
    assert pictures[0].shape == (64, 64, 3)
    assert np.abs(video[0][::8].astype(int) - np.stack(result.frames)).max() <= 1


def test_parameters_are_kept_in_the_dtype_asked_for(hybrid):
    folder = load_folder(hybrid)
    parts = FolderParts(folder, parse_dtypes("bf16", ["ssd_1b_unet=fp16"]))
    assert parts.load("ssd_1b_unet")["conv_in"]["kernel"].dtype == np.float16
    assert str(parts.load("ssd_1b_vae", ["decoder"])["decoder"]["conv_in"]["kernel"].dtype) == "bfloat16"
    assert FolderParts(folder).load("ssd_1b_unet")["conv_in"]["kernel"].dtype == np.float32
    for bad in ("unet=fp32", "ssd_1b_unet", "ssd_1b_unet=int8"):
        with pytest.raises(UserError):
            parse_dtypes(None, [bad])


def test_nothing_stays_in_memory(made):
    line = made[0]
    assert line._checker is None
    assert "on_device" not in vars(line.system)


def objecting(hybrid, folder):
    """A copy whose checker objects to everything."""
    shutil.copytree(hybrid, folder)
    config, params = load_component(folder / "safety_checker")
    shutil.rmtree(folder / "safety_checker")
    save_component(folder / "safety_checker", config, params | {"concept_embeds_weights": np.full(17, -2, np.float32)})
    return folder


@pytest.mark.heavy
def test_the_command(hybrid, tmp_path, run):
    out = tmp_path / "out"
    told = ["generate", "--checkpoint", hybrid, "--mode", "hybrid", "--frames", "9"]
    code, printed, err = run(*told, "--out", out, "--prompt", PROMPTS[0], "--suffix", "quality")
    assert code == 0, err
    (file, sheet) = printed.splitlines()
    assert "a-red-circle-hyper-quality-ultra-hd-8k" in file
    assert sheet.endswith("contact_sheet.png")
    assert "MiB" in err
    assert "not checked" not in err


@pytest.mark.heavy
def test_withheld_videos(hybrid, tmp_path, run):
    strict, out = objecting(hybrid, tmp_path / "strict"), tmp_path / "out"
    told = ["generate", "--checkpoint", strict, "--mode", "hybrid", "--out", out, "--prompt", PROMPTS[0]]
    code, printed, err = run(*told)
    assert code == 2
    assert printed == ""
    assert "objected to 1 of 1 videos" in err
    assert not out.exists() or not list(out.iterdir())


def test_a_video_that_turns_unsafe_is_not_left_behind(made, tmp_path, monkeypatch):
    line, _, _ = made
    answers = iter([[False], [False], [True]])  # the first frame's picture, then the video's frames 0 and 8
    monkeypatch.setattr(line, "_unsafe", lambda pictures: next(answers))
    (result,) = line.generate(PROMPTS[:1], [tmp_path / "a.mp4"], seed=3)
    assert result.file is None
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(hybrid, tmp_path, refused):
    lacking = shutil.copytree(hybrid, tmp_path / "lacking")
    base = ["generate", "--checkpoint", lacking, "--mode", "hybrid", "--out", tmp_path / "out", "--prompt", "x"]
    refused(*base, "--guidance", "7", told="has no guidance")
    shutil.rmtree(lacking / "ssd_1b_vae")
    refused(*base, told="ssd_1b_vae")
    shutil.rmtree(lacking / "ssd_1b_unet")
    refused(*base, told=("--image", "ssd_1b_unet"))


def test_networks_that_do_not_fit_are_named(hybrid, tmp_path):
    wrong = shutil.copytree(hybrid, tmp_path / "wrong")
    path = wrong / "ssd_1b_text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"projection_dim": 9}))
    with pytest.raises(UserError, match="second text encoder's projection have 9 channels"):
        pipeline(wrong)


def test_suffixes():
    assert with_suffix(["a", ""], "cinematic") == ["a, cinematic, realistic textures, high detail, natural colours", ""]
    assert with_suffix(["a"], " b") == ["a b"]
    assert with_suffix(["a"], "") == ["a"]


def test_meter_tells_and_sums():
    told = []
    meter = Meter(tell=told.append)
    with meter.part("one"):
        block = np.ones(100 << 20, np.uint8)
        del block
    assert told == meter.parts
    assert told[0].peak > 100 << 20
    later = dataclasses.replace(told[0], name="two", seconds=2.0, own=False)
    assert "<=" in str(later)
    assert isinstance(later, Part)
    assert len(FIRST_FRAME) == 6
