"""What ``nd-jax evaluate --protocol`` writes, reads back and refuses; and that a real system compiles once per size."""

from __future__ import annotations

import copy
import dataclasses
import html
import json

import numpy as np
import protocol_videos
import pytest
from protocol_videos import Drawn

from nd_jax import cli
from nd_jax.errors import UserError
from nd_jax.protocol import run as protocol_run
from nd_jax.protocol.definition import QUICK, SPLITS, Protocol, prompt_list
from nd_jax.protocol.figures import as_json, system_figures
from nd_jax.protocol.readings import read_readings, write_readings
from nd_jax.protocol.run import SystemVideos, run_protocol
from nd_jax.training.compiles import CompileCounter

SMALL = Protocol("quick, 4 prompts", prompts=4, prompt_seed=QUICK.prompt_seed, sampling_seeds=(0,), resamples=2000)


def late(clip: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Prompt 0 in the wrong colours, everything else right."""
    return clip[..., [1, 2, 0]] if n == 0 else clip


@pytest.fixture(scope="module")
def results():
    """A system that makes ground truth, and one that errs in its first prompt."""
    system = protocol_videos.system()
    splits = ("seen", "heldout_templates", "heldout_templates_reworded", "two_objects")
    return {
        "good <b>": run_protocol(system, SMALL, splits=splits, videos=Drawn(SMALL)),
        "late": run_protocol(system, SMALL, splits=splits, controls=(), videos=Drawn(SMALL, late)),
    }


@pytest.fixture(scope="module")
def file(results, tmp_path_factory):
    return write_readings(tmp_path_factory.mktemp("readings") / "readings.json", results)


def test_readings_come_back(results, file):
    again = read_readings(file)
    assert list(again) == list(results)
    for name, result in again.items():
        assert result.protocol == SMALL
        assert result.samples == {}
        assert as_json(system_figures(result)) == as_json(system_figures(results[name]))
    content = json.loads(file.read_text())["systems"]["late"]
    assert content["splits"]["seen"]["captions"] == list(prompt_list(SMALL, "seen").captions)


DAMAGE = {
    "format": (lambda c: c.update(format=2), "format 2"),
    "no systems": (lambda c: c.update(systems={}), "systems"),
    "systems in a list": (lambda c: c.update(systems=[1]), "systems"),
    "no protocol": (lambda c: c["systems"]["late"].pop("protocol"), "'protocol' is missing"),
    "a field too many": (lambda c: c["systems"]["late"]["protocol"].update(luck=1), "luck"),
    "many prompts": (lambda c: c["systems"]["late"]["protocol"].update(prompts=1 << 40), "prompts"),
    "other prompts": (lambda c: c["systems"]["late"]["protocol"].update(prompt_seed=3), "its prompts are not"),
    "unknown split": (lambda c: c["systems"]["late"]["splits"].update(x={}), "'x'"),
    "no about": (lambda c: c["systems"]["late"]["about"].update(seconds_per_video="fast"), "seconds_per_video"),
    "cut": (lambda c: c["systems"]["late"]["splits"]["seen"].update(cut=5), "cut is 5"),
    "ragged": (lambda c: c["systems"]["late"]["splits"]["seen"]["made"]["labels"][0].pop(), "seen, made"),
    "text": (lambda c: c["systems"]["late"]["splits"]["seen"]["truth"].update(flicker="none"), "seen, truth: flicker"),
    "parts": (
        lambda c: c["systems"]["late"]["splits"]["seen"]["codec"].update(labels=[[[0.5] * 5]] * 4),
        "seen, codec",
    ),
    "controls": (lambda c: c["systems"]["late"].update(controls={"c": {"labels": []}}), "controls, 'c'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_readings_are_refused(file, tmp_path, name):
    change, told = DAMAGE[name]
    content = copy.deepcopy(json.loads(file.read_text()))
    change(content)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"other\.json does not hold readings") as error:
        read_readings(path)
    assert told in str(error.value)


def test_infinite_readings_are_refused(file, tmp_path):
    text = file.read_text()
    content = json.loads(text)
    content["systems"]["late"]["splits"]["seen"]["made"]["flicker"][0][0] = [1e999]
    for bad in (json.dumps(content), json.dumps(content).replace("Infinity", "1e999"), "[]", text[:100]):
        (tmp_path / "other.json").write_text(bad)
        with pytest.raises(UserError, match=r"other\.json"):
            read_readings(tmp_path / "other.json")


# ---- the command


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Function from arguments to (exit code, standard output, standard error); folders called ``late`` err in their
    first prompt, all others make ground truth."""
    made = []

    def load(path):
        made.append(path.name)
        return dataclasses.replace(protocol_videos.system(), folder=path)

    def videos(system, *, batch):
        return Drawn(SMALL, late) if system.folder.name == "late" else Drawn(SMALL)

    monkeypatch.setattr("nd_jax.system.load_system", load)
    monkeypatch.setattr(protocol_run, "SystemVideos", videos)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["evaluate", *(str(argument) for argument in arguments)])
        told = capsys.readouterr()
        return code, told.out, told.err

    call.made = made
    return call


SHORT = ("--protocol", "quick", "--prompts", 4)


def test_report_summary_and_readings(run, tmp_path):
    """Two systems; then the second again in place of which its readings are given."""
    out = tmp_path / "out"
    code, told, err = run("good", "late", "--out", out, *SHORT, "--splits", "seen", "two_objects", "--no-controls")
    assert (code, told.strip()) == (0, str(out / "report.html")), err
    assert err.count("too long") == 4
    summary = json.loads((out / "summary.json").read_text())
    assert summary["protocol"]["prompts"] == 4
    assert summary["baseline"] == "good"
    good, bad = summary["systems"]["good"], summary["systems"]["late"]
    assert set(good["splits"]) == {"seen", "two_objects"}
    seen = good["splits"]["seen"]
    assert seen["accuracy"]["mean"]["value"] == 1
    assert seen["travel_of_truth"]["value"] == pytest.approx(1)
    assert bad["splits"]["seen"]["accuracy"]["colour"]["value"] < 1
    difference = summary["comparisons"]["late"]["seen"]["difference"]["mean"]
    expected = bad["splits"]["seen"]["accuracy"]["mean"]["value"] - 1
    assert difference["value"] == pytest.approx(expected)
    page = (out / "report.html").read_text()
    for told in ("Judged accuracy", "Against the baseline", "Controls", "captions shuffled, two_objects", "flicker"):
        assert told in page
    assert page.count("<video") == 2 * 2 * 4
    assert prompt_list(SMALL, "two_objects").captions[0] in html.unescape(page)

    again = tmp_path / "again"
    options = (*SHORT, "--splits", "seen", "--no-controls")
    assert run("other", out / "readings.json", "--out", again, *options)[0] == 0
    assert run.made == ["good", "late", "other"], "what was read was generated again"
    summary = json.loads((again / "summary.json").read_text())
    assert list(summary["systems"]) == ["other", "good", "late"]
    assert summary["comparisons"]["late"]["seen"]["difference"]["mean"]["value"] == pytest.approx(expected)
    assert summary["comparisons"]["good"]["seen"]["difference"]["mean"]["value"] == 0
    assert set(read_readings(again / "readings.json")) == {"other", "good", "late"}


def test_every_table_is_there(results, tmp_path):
    from nd_jax.protocol.report import write_protocol

    page = write_protocol(tmp_path, results).read_text()
    assert "good <b>" not in page
    assert "good <b>" in html.unescape(page)
    for told in ("What unknown templates cost", "unconditional", "untrained text encoders", "reconstructions"):
        assert told in page
    assert page.count("<section>") == 8 + 4 + 1  # tables, galleries, and the comparison of the two
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "readings.json",
        "report.html",
        "summary.json",
        "videos",
    ]
    assert len(list((tmp_path / "videos").iterdir())) == 4 * 4 * 2


def test_bad_requests(run, file, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "broken.json").write_text("{")
    for arguments, told in (
        (("a", "--protocol", "huge"), "'huge'"),
        (("a", *SHORT, "--splits", "unseen"), "'unseen'"),
        (("a", *SHORT, "--plain", "--splits", "heldout_templates"), "plain"),
        (("a", *SHORT, "--seed", 3), "--seed"),
        (("a", *SHORT, "--split", "heldout_templates"), "--splits"),
        (("a", "--splits", "seen"), "--protocol"),
        (("a", "--no-controls"), "--protocol"),
        (("a", "--protocol", "quick", "--prompts", 0), "--prompts is 0"),
        (("a", *SHORT, "--batch", 0), "--batch is 0"),
        (("a", "a", *SHORT), "each once"),
        (("late", file, *SHORT), "each once"),
        (("a", file, "--protocol", "quick"), "prompts=4"),
        (("a", tmp_path / "broken.json", *SHORT), "broken.json"),
        (("a", tmp_path / "none.json", *SHORT), "none.json"),
    ):
        code, told_out, err = run(*arguments, "--out", out)
        assert (code, told_out, err.count("\n")) == (2, "", 1), (arguments, err)
        assert told in err
    assert run.made == []
    assert not out.exists()
    out.mkdir()
    (out / "readings.json").write_text("mine")
    code, _, err = run("a", *SHORT, "--out", out)
    assert (code, "--overwrite" in err) == (2, True)
    assert (out / "readings.json").read_text() == "mine"


# ---- a real system


@pytest.mark.heavy
def test_programs_are_compiled_once_for_all_splits(tiny):
    """Both two-object splits and both seeds through one generator of 64 x 128; the system is made for 64 x 64."""
    assert (tiny.video.height, tiny.video.width) == (64, 64)
    protocol = dataclasses.replace(SMALL, prompts=2, sampling_seeds=(0, 1))
    videos = SystemVideos(tiny, batch=2)
    assert videos.frames == tiny.video.frames == 9
    world = SPLITS["two_objects"].world
    videos.prepare([world])
    (generator,) = videos.generators.values()
    assert (generator.height, generator.width, generator.latent_frames) == (64, 128, 2)
    splits, seen = ("two_objects", "two_objects_heldout"), []
    result = run_protocol(tiny, protocol, splits=splits, controls=(), videos=videos, warn=seen.append)
    assert generator.compilations == 3
    assert sum(split.cut for split in result.splits.values()) == len(seen) > 0
    assert all("prompt cut to" in line for line in seen)
    with CompileCounter() as counter:
        again = run_protocol(tiny, protocol, splits=splits, controls=(), videos=videos)
    assert counter.count == 0
    first, second = (each.splits["two_objects"].made for each in (result, again))
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(first.displacement[0], first.displacement[1]), "both seeds made the same videos"
    assert {len(kept) for kept in result.samples.values()} == {2}
    assert result.samples["two_objects"][0].shape == (9, 64, 128, 3)
    assert result.about["sampling"]["later_guidance"] == 2.0


def test_controls_of_a_real_system(tiny, monkeypatch):
    """What reaches generation: no prompts and no guidance; the prompts, and other text encoders."""
    asked, generators = [], set()

    def generate_batches(system, captions, *, plan, generator, **_):
        asked.append((list(captions), plan, system))
        generators.add(generator)
        yield np.zeros((len(captions), 9, 64, 64, 3), np.uint8)

    monkeypatch.setattr(protocol_run, "generate_batches", generate_batches)
    videos, world, captions = SystemVideos(tiny), SPLITS["seen"].world, ["a red ball", "a blue box"]
    videos.prepare([world])
    videos.prepare([world])
    for control in (None, protocol_run.UNCONDITIONAL, protocol_run.UNTRAINED_TEXT):
        assert len(list(videos.videos(captions, world, 0, control))) == 2
    assert generators == set(videos.generators.values())
    assert len(generators) == 1, "every generator compiles its programs anew"
    (texts, plan, system), (empty, unguided, same), (again, guided, other) = asked
    assert (texts, empty, again) == (captions, ["", ""], captions)
    assert plan == guided == tiny.sampling
    assert (unguided.first_guidance, unguided.later_guidance) == (0, 0)
    assert unguided.later_steps == plan.later_steps
    assert system is same is tiny
    ours, theirs = (each.conditions(captions)[0] for each in (tiny, other))
    np.testing.assert_array_equal(ours.mask, theirs.mask)
    assert not np.allclose(ours.text, theirs.text, atol=0.1)
    assert not np.allclose(ours.pooled, theirs.pooled, atol=0.1)
    for name in ("diffusion_transformer", "causal_video_vae"):
        assert other.params[name] is tiny.on_device[name]
