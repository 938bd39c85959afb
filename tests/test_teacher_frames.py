"""Hybrid generation in the shapes world: a system continues the first frames of another."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_system

from nd_jax.generate import generate
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.teacher_frames import teacher_frames

PROMPTS = ["a red circle", "two blue squares"]


def student_of(tiny):
    """Other denoiser weights, one step, no guidance."""
    other = tiny_system.random_params(tiny.definitions["diffusion_transformer"], 99)
    plan = SamplePlan((1, 1, 1), (1, 1, 1), 0.0, 0.0, "plain")
    return dataclasses.replace(tiny, params=tiny.params | {"diffusion_transformer": other}, sampling=plan)


def test_they_are_those_of_the_teachers_own_videos(tiny):
    first = teacher_frames(tiny, PROMPTS, height=64, width=64, seed=2)
    own = generate(tiny, PROMPTS, seed=2)
    assert first.shape == (2, 64, 64, 3)
    assert first.dtype == np.uint8
    assert np.abs(first.astype(int) - own[:, 0]).max() <= 1
    assert np.abs(first[0].astype(int) - first[1]).mean() > 1


@pytest.mark.heavy
def test_the_command_continues_them(tiny, tiny_folder, tmp_path, run, refused, monkeypatch):
    from nd_jax.converters.folders import load_folder
    from nd_jax.data import video_out
    from nd_jax.system import save_system

    written, write = [], video_out.write_video
    monkeypatch.setattr(
        video_out, "write_video", lambda path, clip, **k: written.append(clip) or write(path, clip, **k)
    )
    student = student_of(tiny)
    save_system(tmp_path / "student", student, dict(load_folder(tiny_folder / "system").tokenizers))
    base = ["generate", "--checkpoint", tmp_path / "student", "--out", tmp_path / "out", "--prompt", PROMPTS[0]]
    refused(*base, "--first-frames", "x", "--image", "y", told="found both")
    code, _, err = run(*base, "--first-frames", tiny_folder / "system", "--seed", 4)
    assert code == 0, err
    first = teacher_frames(tiny, PROMPTS[:1], height=64, width=64, seed=4)
    expected = generate(student, PROMPTS[:1], seed=4, first_frames=first)[0]
    assert len(written) == 1
    assert np.abs(written[0].astype(int) - expected).max() <= 1


@pytest.mark.heavy
def test_evaluation_shows_both(tiny, tiny_folder, tmp_path, run, monkeypatch):
    from nd_jax import evaluate
    from nd_jax.data.world import world_named

    world = world_named("64x64")
    asked = []
    kept = evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda *a, **k: asked.append(k["first_frames"]) or kept(*a, **k))
    student = student_of(tiny)
    plain = evaluate.evaluate_system(student, world, count=2, seed=1)
    hybrid = evaluate.evaluate_system(student, world, count=2, seed=1, teacher=tiny)
    assert asked[0] is None
    assert asked[1].shape == (2, 64, 64, 3)
    assert not np.array_equal(plain.videos, hybrid.videos)
    monkeypatch.undo()
    told = ["evaluate", tiny_folder / "system", "--prompts", 2, "--out", tmp_path / "report"]
    code, _, err = run(*told, "--first-frames", tiny_folder / "system")
    assert code == 0, err
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert any("first frame by" in name for name in json.dumps(summary).split('"'))
