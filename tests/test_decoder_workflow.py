"""Decoder distillation from folder to folder: one run through the command line, what it leaves, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny_system
from folder_clips import ramp, write_clip

from nd_jax import cli
from nd_jax.converters.component import load_component
from nd_jax.data.clips import read_video
from nd_jax.data.mixture import Mixture
from nd_jax.decoder_clips import held_out_clips, training_source
from nd_jax.decoder_report import Cost, DecoderFigures, Quality, decoder_table, flicker
from nd_jax.decoder_workflow import replace_decoder, with_constants
from nd_jax.errors import UserError
from nd_jax.models.causal_vae import AsymmetricVAEConfig, definition
from nd_jax.models.functional import count_parameters
from nd_jax.models.system import CODEC, DENOISER
from nd_jax.recipes.decoder_distillation import ENCODER
from nd_jax.recipes.preset import DecoderRun, load_preset
from nd_jax.recipes.tiny_student import student_config
from nd_jax.system import VideoSystem, latent_stats, load_system, save_system
from nd_jax.training.paths import named_leaves

GROWTH = ((True, True, True), (True, True, True))
NATIVE = tiny_system.CONFIG.causal_video_vae
ROWS = ((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """Folder of a system whose codec has measured constants."""
    measured = dataclasses.replace(NATIVE, latents_mean=ROWS, latents_std=ROWS)
    config = dataclasses.replace(tiny_system.CONFIG, causal_video_vae=measured)
    made = VideoSystem(config, tiny_system.random_system_params(), {}, tiny_system.VIDEO, tiny_system.PLAN)
    return save_system(tmp_path_factory.mktemp("decoder") / "system", made, {})


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.Generator(np.random.Philox(0))
    for name in "ab":
        pixels = ramp(19, 64, 64).copy()
        pixels[:, :24, :24] = rng.integers(0, 256, 3)
        write_clip(folder / f"{name}.mp4", pixels)
    return folder / "a.mp4", folder / "b.mp4"


@pytest.fixture(scope="module")
def finished(system, videos, tmp_path_factory):
    """The folder of a run of two steps; b.mp4 is named twice, to be trained on and to be held out."""
    out = tmp_path_factory.mktemp("runs") / "decoder"
    words = ["train", "shapes_base", "decoder", "--start", system, "--out", out, "--videos", *videos]
    words += ["--held-out", videos[1], "--recipe.batch", 8, "--recipe.frames", 9, "--recipe.channels", 24, 12, 6, 3]
    words += ["--loop.steps", 2, "--loop.log-every", 1]
    assert cli.main([str(word) for word in words]) == 0
    return out


def test_the_codec_that_comes_out(finished, system):
    """The same encoder, bit for bit, the same constants, and a decoder of the wanted form."""
    config, params = load_component(finished / "codec")
    start = load_system(system)
    assert isinstance(config, AsymmetricVAEConfig)
    assert config.decoder_num_features == (24, 12, 6, 3)
    assert (config.latents_mean, config.latents_std) == (ROWS, ROWS)
    for name in ENCODER:
        for (path, ours), (_, theirs) in zip(
            named_leaves(params[name]), named_leaves(start.params[CODEC][name]), strict=True
        ):
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), path
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    wanted = {"loss", "psnr", *(f"term/{name}" for name in ("squared", "pyramid", "gradient", "structure", "motion"))}
    assert wanted <= lines[0].keys()


def test_the_system_that_comes_out(finished, system):
    """Everything but the decoder is the start's, the normalisation of latents above all."""
    before, after = load_system(system), load_system(finished / "system")
    assert after.stats == before.stats == latent_stats(before.config.causal_video_vae)
    assert isinstance(after.config.causal_video_vae, AsymmetricVAEConfig)
    same = {name for name in before.params if name != CODEC}
    assert same == {name for name in after.params if name != CODEC}
    for name in same:
        for (path, ours), (_, theirs) in zip(
            named_leaves(after.params[name]), named_leaves(before.params[name]), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs, err_msg=path)


def test_the_figures_that_come_out(finished):
    """Both decoders on the clip that was not trained on, and streaming equal to the whole."""
    content = json.loads((finished / "decoders.json").read_text())
    assert set(content) == {"native", "distilled"}
    config, _ = load_component(finished / "codec")
    for name, network in (("native", NATIVE), ("distilled", config)):
        found = content[name]
        assert found["parameters"] == count_parameters(definition(network, half="decoder").abstract())
        assert set(found["quality"]) == {"b.mp4"}
        quality, cost = found["quality"]["b.mp4"], found["cost"]
        assert 0 <= quality["streaming_difference"] < 1e-4
        assert 0 < quality["psnr"] < 60
        assert -1 < quality["ssim"] < 1
        assert quality["flicker_of_clips"] > 1
        assert cost["first_frame_seconds"] > 0
        assert cost["weights"] == 4 * found["parameters"]
        assert cost["weights"] < cost["streaming_memory"] < cost["memory"]


def test_other_encoders_are_refused(system, finished):
    start = load_system(system)
    config, params = load_component(finished / "codec", dtype="fp32")
    moved = {**params, "quant_conv": {**params["quant_conv"], "bias": np.asarray(params["quant_conv"]["bias"]) + 1e-6}}
    with pytest.raises(UserError, match="parameter quant_conv/bias differs"):
        replace_decoder(start, config, moved)
    wider = dataclasses.replace(config, encoder_layers_per_block=(2, 1, 1, 1))
    with pytest.raises(UserError, match="encoder_layers_per_block"):
        replace_decoder(start, wider, params)
    assert DENOISER in replace_decoder(start, config, params).params


def test_constants_carry_over_where_there_are_none():
    """The two classes of codecs mean different constants by saying nothing."""
    written = with_constants(NATIVE)
    silent = student_config(NATIVE, (24, 12, 6, 3), *GROWTH)
    assert latent_stats(silent) != latent_stats(NATIVE)
    student, teacher = latent_stats(student_config(written, (24, 12, 6, 3), *GROWTH)), latent_stats(NATIVE)
    for name in ("shift", "scale", "video_shift", "video_scale"):
        np.testing.assert_allclose(getattr(student, name), getattr(teacher, name), rtol=1e-12)
    measured = dataclasses.replace(NATIVE, latents_mean=ROWS, latents_std=ROWS)
    assert with_constants(measured) is measured


# ---- the clips


class Listed:
    def __init__(self, first: int, count: int, height: int = 8):
        self.first, self.count, self.height, self.width = first, count, height, 8

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        assert 0 <= index < self.count
        return {"video": self.first + index}


def test_a_mixture_gives_every_source_its_share():
    mixed = Mixture([Listed(0, 7), Listed(100, 2)], (3, 1))
    found = [mixed[index]["video"] for index in range(len(mixed))]
    assert found == [0, 1, 2, 100, 3, 4, 5, 101, 6, 0, 1, 100]
    with pytest.raises(IndexError):
        mixed[12]
    for shares in ((3,), (3, 0)):
        with pytest.raises(UserError, match="share of at least 1"):
            Mixture([Listed(0, 7), Listed(100, 2)], shares)
    with pytest.raises(UserError, match="8x8 and 16x8"):
        Mixture([Listed(0, 7), Listed(100, 2, height=16)], (1, 1))


def test_held_out_files_are_never_trained_on(videos):
    preset, run = load_preset("shapes_base"), DecoderRun()
    source = training_source(run, NATIVE, (64, 64), videos=videos, held_out=[videos[1].parent / "." / "b.mp4"])
    assert len(source.clips) == 1
    np.testing.assert_array_equal(source.clips[0], read_video(videos[0], shorter_side=128))
    with pytest.raises(UserError, match="every video file is held out"):
        training_source(run, NATIVE, (64, 64), videos=videos, held_out=videos)
    with pytest.raises(UserError, match="no clips to train on"):
        training_source(run, NATIVE, (64, 64))
    clips = [{"video": np.zeros((33, 64, 64, 3), np.uint8)}]
    both = training_source(run, NATIVE, (32, 32), clips=clips, videos=videos, shares=(1, 2))
    assert both[0]["video"].shape == both[1]["video"].shape == (17, 64, 64, 3)
    held = held_out_clips(preset, videos=videos[1:])
    assert {name: clip.shape for name, clip in held.items()} == {"b.mp4": (1, 17, 64, 64, 3)}


def test_flicker_and_the_table():
    video = np.zeros((4, 2, 2, 3), np.uint8)
    video[1::2] = 10
    assert flicker(video) == 10
    assert flicker(video[:1]) == 0
    quality = {"x": Quality(30.0, 0.9, 2.0, 1.0, 0.0), "y": Quality(20.0, 0.5, 2.0, 1.0, 0.0)}
    cost = Cost(1.0, 2.0, 0.5, 3_000_000, 2_000_000, 100)
    table = decoder_table({"tiny": DecoderFigures(1_500_000, quality, cost, "cpu")})
    assert [row[:5] for row in table.rows] == [
        ["tiny", "x", "30.00", "0.900", "2.00 (1.00)"],
        ["", "y", "20.00", "0.500", "2.00 (1.00)"],
    ]
    assert table.rows[0][5:] == ["1.500 M", "1.000", "2.000", "3.0", "2.0"]
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_command_wants_one_teacher(capsys, tmp_path):
    for words in ((), ("--start", "a", "--codec", "b")):
        assert cli.main(["train", "shapes_base", "decoder", "--out", str(tmp_path / "x"), *words]) == 2
        assert "either --start SYSTEM or --codec FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
