"""The ablation's table: what is counted, how motion is read unit by unit, and first frames that are given."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import protocol_videos
import pytest
import tiny_system

from nd_jax.commands.report import in_steps, named_folders
from nd_jax.data.judge import read
from nd_jax.data.world import MOTIONS
from nd_jax.errors import UserError
from nd_jax.generate import first_unit, generate
from nd_jax.protocol.ablation import Entry, check_latents, figures, measure_row, undistilled
from nd_jax.protocol.ablation_report import ablation_table, markdown, steps_of, units_tables, write_ablation
from nd_jax.protocol.definition import QUICK, SPLITS, prompt_list
from nd_jax.protocol.units import asked, read_units
from nd_jax.pyramid.sampler import SamplePlan

PROTOCOL = dataclasses.replace(QUICK, prompts=9, resamples=200)
SPLIT = "seen"


def stops(clip: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The drawn clip until its second unit ends, then a still."""
    return np.concatenate([clip[:17], np.repeat(clip[16:17], len(clip) - 17, axis=0)])


@pytest.fixture(scope="module")
def rows():
    """A teacher that makes drawn clips, and a student whose motion dies after two units."""
    entry = Entry(protocol_videos.system())
    student = dataclasses.replace(entry.system, sampling=SamplePlan((1, 1, 1), (1, 1, 1), grid="plain"))
    options = {"protocol": PROTOCOL, "splits": (SPLIT,)}
    return {
        "teacher": measure_row(entry, **options, videos=protocol_videos.Drawn(PROTOCOL)),
        "student": measure_row(Entry(student), **options, videos=protocol_videos.Drawn(PROTOCOL, stops)),
    }


def test_motion_is_read_where_it_is():
    """Each unit of a drawn clip moves as the whole does; the direction asked for is that of the labels."""
    prompts, world = prompt_list(PROTOCOL, SPLIT), SPLITS[SPLIT].world
    for n, label in enumerate(prompts.labels[:, 0]):
        clip = prompts.clip(n, world.frames)
        read_of_units = read_units(clip, world, 8)
        assert (read_of_units.labels[..., :3] == label[:3]).all()
        found = read_of_units.displacement
        assert found.shape == (4, 1, 2)
        np.testing.assert_allclose(found.mean(0), read(clip, world).displacement, atol=2)
        along = asked(found[None], prompts.labels[n : n + 1])[0]
        if label[3] == 0:
            assert not along.any()
        else:
            assert (along > 8).all()
            opposite = next(
                k for k, d in enumerate(MOTIONS.values()) if np.allclose(d, -np.array([*MOTIONS.values()][label[3]]))
            )
            turned = prompts.labels[n : n + 1].copy()
            turned[..., 3] = opposite
            np.testing.assert_allclose(asked(found[None], turned)[0], -along)


def test_a_motion_that_dies_is_told_by_its_unit(rows):
    found = figures(rows, SPLIT)
    shares = [each.value for each in found["student"]["speed_by_unit_of_teacher"]]
    np.testing.assert_allclose(shares[:2], 1, atol=0.05)
    np.testing.assert_allclose(shares[2:], 0, atol=0.1)
    right, teachers = ([each.value for each in found[name]["accuracy_by_unit"]] for name in ("student", "teacher"))
    np.testing.assert_allclose(right[:2], teachers[:2], atol=0.03)
    moving = (prompt_list(PROTOCOL, SPLIT).labels[:, 0, 3] != 0).mean()
    np.testing.assert_allclose(teachers, 1, atol=0.03)
    np.testing.assert_allclose(right[2:], 1 - moving / 5, atol=0.03)
    assert found["student"]["accuracy_by_unit_of_teacher"][-1].value < 1
    assert found["student"]["accuracy_of_teacher"].value <= 1
    assert 0.2 < found["student"]["motion_of_teacher"].value < 0.9
    for name in ("accuracy_of_teacher", "motion_of_teacher"):
        np.testing.assert_allclose(found["teacher"][name], 1)
    assert found["teacher"]["cpu_seconds"] > 0


def test_calls_and_passes():
    """Nine frames are two units; guidance doubles passes, not calls; given first frames count as the teacher's."""
    teacher = protocol_videos.system()
    assert Entry(teacher).calls() == (6, 12)
    many = dataclasses.replace(teacher, sampling=SamplePlan((8, 8, 8), (4, 4, 4), 2.0, 1.5, "plain"))
    few = dataclasses.replace(teacher, sampling=SamplePlan((1, 1, 1), (2, 2, 1), grid="plain"))
    assert Entry(many).calls() == (36, 72)
    assert Entry(few).calls() == (8, 8)
    assert Entry(few, many).calls() == (29, 53)
    others = undistilled(many, few.sampling)
    plans = [each.system.sampling for each in others.values()]
    assert [plan.grid for plan in plans] == ["plain", "official", "plain"]
    assert {(plan.first_steps, plan.later_steps) for plan in plans} == {((1, 1, 1), (2, 2, 1))}
    assert [(plan.first_guidance, plan.later_guidance) for plan in plans] == [(2.0, 1.5)] * 2 + [(1.0, 1.0)]
    assert [entry.calls() for entry in others.values()] == [(8, 16), (8, 16), (8, 8)]
    one = undistilled(many, SamplePlan((1, 1, 1), (1, 1, 1), grid="plain"))
    assert list(one) == ["teacher, the student's calls, either grid", "teacher, the student's passes, not guided"]
    assert steps_of(Entry(many).about()) == "8-8-8 / 4-4-4"
    assert steps_of(Entry(few, many).about()) == "given / 2-2-1"
    codec = dataclasses.replace(
        few.config.causal_video_vae, latents_mean=((1.0,) * 4,) * 2, latents_std=((1.0,) * 4,) * 2
    )
    other = dataclasses.replace(few, config=dataclasses.replace(few.config, causal_video_vae=codec))
    with pytest.raises(UserError, match="normalised otherwise"):
        check_latents({"student": Entry(other, many)})


def test_the_report_holds_every_figure(rows, tmp_path):
    report = write_ablation(tmp_path / "out", rows, "student")
    summary = json.loads((tmp_path / "out" / "ablation.json").read_text())
    student = summary["splits"][SPLIT]["student"]
    assert student["calls"] == 6
    assert len(student["speed_by_unit_of_teacher"]) == 4
    text = (tmp_path / "out" / "ablation.md").read_text()
    found = figures(rows, SPLIT)
    for table in (ablation_table(found, SPLIT), *units_tables(found, SPLIT)):
        assert len(table.rows) == 2
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert markdown([table]).strip() in text
    assert "## Compared prompt by prompt with teacher" in text
    against = text.split("## Compared prompt by prompt with student")[1]
    assert f"| {SPLIT} | teacher |" in against
    assert report.read_text().count("<video") >= 2
    assert (tmp_path / "out" / "readings.json").exists()


def test_given_first_frames_are_those_of_their_own_videos(tiny, tiny_generator):
    """A system that continues its own first frames makes its own videos."""
    prompts, options = ["a red ball", "a blue square"], {"generator": tiny_generator, "seed": 3}
    alone = generate(tiny, prompts, **options)
    given = generate(tiny, prompts, **options, first_latents=first_unit(tiny, height=64, width=128))
    assert np.abs(alone.astype(int) - given.astype(int)).max() <= 1
    other = generate(tiny, prompts, **(options | {"seed": 4}), first_latents=first_unit(tiny, height=64, width=128))
    assert np.abs(alone.astype(int) - other.astype(int)).max() > 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("student",), "expected NAME=FOLDER"),
        (("a=x", "a=y"), "each name once"),
        (("teacher=x",), "the teacher is --teacher"),
        (("a=x", "--hybrid", "b"), "expected some of a"),
        (("a=x", "--prompts", "0"), "--prompts is 0"),
        (("a=shapes_base@2-2",), "a in steps 2-2, expected 3 numbers"),
        (("a=shapes_base@2-0-1",), "a in steps 2-0-1, expected 3 numbers from 1 on"),
        (("a=there/is@none",), "there/is@none"),
    ],
)
def test_rows_that_cannot_be(refused, words, told, tmp_path):
    refused("report", "steps", *words, "--out", tmp_path / "ablation", told=told)


def test_steps_may_be_asked_for(tiny):
    """A network trained on many steps of a stage has met the levels of fewer."""
    assert named_folders(["a=x/system@2-2-1", "b=y"]) == {"a": (Path("x/system"), (2, 2, 1)), "b": (Path("y"), None)}
    assert in_steps(tiny, None, "a") is tiny
    plan = in_steps(tiny, (2, 2, 1), "a").sampling
    assert plan == dataclasses.replace(tiny.sampling, first_steps=(2, 2, 1), later_steps=(2, 2, 1))


@pytest.mark.heavy
def test_the_report_by_command(run, tiny_folder, tmp_path):
    """Two prompts through every row: teacher, teacher at the same calls, student, and the student's hybrid."""
    system = tiny_folder / "system"
    code, out, err = run(
        *("report", "steps", f"student={system}", "--teacher", system, "--hybrid", "student", "--prompts", 2),
        *("--splits", "seen", "--out", tmp_path / "ablation"),
    )
    assert code == 0, err
    assert out.strip() == str(tmp_path / "ablation" / "report.html")
    found = json.loads((tmp_path / "ablation" / "ablation.json").read_text())["splits"]["seen"]
    assert list(found)[-2:] == ["student", "student, first frame given"]
    assert len(found) == 5
    same = found["student, first frame given"], found["teacher"]
    assert same[0]["accuracy"] == same[1]["accuracy"], "it is the teacher that continues its own first frames"
    assert tiny_system.PLAN.first_guidance == found["teacher"]["sampling"]["first_guidance"]
