"""The weights that come with the package: small, whole, and what their README says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nd_jax.converters.safetensors_io import read_tensors
from nd_jax.data.clips import read_video
from nd_jax.models.functional import count_parameters
from nd_jax.models.system import CODEC, DENOISER, TEXT_PARTS
from nd_jax.protocol.definition import QUICK
from nd_jax.protocol.figures import system_figures
from nd_jax.protocol.run import run_protocol
from nd_jax.recipes.preset import load_preset
from nd_jax.system import codec_folder, load_system
from nd_jax.weights import SHIPPED, shipped_folder

LIMIT = 20_000_000
"""Bytes of all shipped files together."""


def test_they_are_small_and_hold_sixteen_bit_tensors():
    folder = shipped_folder(SHIPPED)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert tensors
    assert {tensor.dtype.itemsize for path in tensors for tensor in read_tensors(path).values()} == {2}


def test_they_are_the_preset():
    system, preset = load_system(SHIPPED), load_preset(SHIPPED)
    networks = {name: count_parameters(params) for name, params in system.params.items()}
    wanted = {name: count_parameters(part.abstract()) for name, part in preset.system.definitions().items()}
    assert networks == wanted
    assert {CODEC, DENOISER} | {name for name in TEXT_PARTS if name in wanted} == set(networks)
    assert (system.video, system.sampling, system.schedule) == (preset.video, preset.sampling, preset.schedule)
    assert system.config.causal_video_vae.latents_mean is not None


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    assert shipped_folder(tmp_path / "other") == tmp_path / "other"
    monkeypatch.chdir(tmp_path)
    assert shipped_folder(SHIPPED).is_dir()
    (tmp_path / SHIPPED).mkdir()
    assert str(shipped_folder(SHIPPED)) == SHIPPED


def test_a_system_stands_for_its_codec(tmp_path):
    codec = codec_folder(SHIPPED)
    assert codec == shipped_folder(SHIPPED) / CODEC
    assert codec_folder(codec) == codec
    assert codec_folder(tmp_path / "none") == tmp_path / "none"


@pytest.mark.heavy
def test_a_prompt_alone_is_enough(tmp_path):
    """The command of the README, in a process of its own, as it is compiled for users."""
    command = [sys.executable, "-m", "nd_jax", "generate", "--out", str(tmp_path / "videos"), "--prompt"]
    prompt = "a small red circle drifts up over a blue background"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([*command, prompt], capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    video, sheet = done.stdout.split()
    assert read_video(video).shape == (33, 64, 64, 3)
    assert sheet.endswith("contact_sheet.png")


@pytest.mark.heavy
def test_they_make_what_prompts_ask_for():
    figures = system_figures(run_protocol(load_system(SHIPPED), QUICK, splits=("seen",), controls=()))
    seen = figures.splits["seen"]
    assert seen.accuracy["mean"].value > 0.6
    assert seen.shuffled.at_chance
