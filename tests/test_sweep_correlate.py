"""What cheap scores are worth: rank correlations over recovered candidates, and the chain that gets them."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
import scipy.stats
import tiny_system
from test_sweep_command import PROMPTS, folder  # noqa: F401

from nd_jax import cli
from nd_jax.converters.folders import load_folder
from nd_jax.data.latents import write_latents
from nd_jax.errors import UserError
from nd_jax.influence import generator_of
from nd_jax.models.system import DENOISER
from nd_jax.recipes.flow_matching import FlowRecipeConfig
from nd_jax.recipes.preset import FlowRun, Preset, RecoveryRun
from nd_jax.recipes.recovery import RecoveryRecipeConfig
from nd_jax.sweep.calibration import record
from nd_jax.sweep.correlate import correlation, foretold, sections, spearman, verdict
from nd_jax.sweep.population import Population
from nd_jax.sweep.recover import Distance, recovered_all, spread_choice
from nd_jax.sweep.table import SweepTable, open_table
from nd_jax.system import load_system, save_system
from nd_jax.training.optim import OptimConfig
from nd_jax.workflow import without_blocks

LEVELS = [(0, 900.0), (1, 100.0)]


def philox(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def test_rank_correlation_and_its_interval():
    x, noise = philox().normal(size=(2, 40))
    y = x + noise
    x[3] = x[5]  # a tie
    np.testing.assert_allclose(spearman(x, y), scipy.stats.spearmanr(x, y).statistic)
    rho, low, high = correlation(x, y)
    assert low < rho < high
    assert 0.3 < high - low < 0.7
    assert correlation(x, np.exp(3 * x))[0] > 0.999
    assert correlation(x, -x)[2] < -0.9
    assert np.isnan(correlation(np.ones(9), x[:9])[0])
    covered = 0
    for seed in range(60):  # of the truth, for two normal numbers of correlation 0.6
        a, b = philox(seed).normal(size=(2, 30))
        rho, low, high = correlation(a, 0.6 * a + 0.8 * b, seed)
        covered += low <= 6 / np.pi * np.arcsin(0.3) <= high
    assert covered >= 50
    assert [verdict(*each) for each in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))] == ["better", "worse", "not told apart"]


@pytest.fixture
def table():
    """Six blocks; all sets of one, two and three, of a cost that is additive but for one pair."""
    made = SweepTable({"units": "blocks"}, LEVELS, 2, units=6)
    for count in (1, 2, 3):
        for drop in itertools.combinations(range(6), count):
            cost = sum(1.0 + k for k in drop) + (10.0 if {0, 1} <= set(drop) else 0.0)
            made.add(drop, np.full((2, 2), cost), "hand")
    return made


def test_what_scores_say_of_candidates(table):
    drops = list(itertools.combinations(range(6), 3))
    said = foretold(table, {"given": np.arange(6.0)}, drops)
    truth = np.array([table.errors[drop] for drop in drops])
    np.testing.assert_allclose(said["error before recovery"], truth)
    np.testing.assert_allclose(said["with pairs"], truth, rtol=1e-6, err_msg="pairs say all there is to say")
    assert np.abs(said["sum of remove-one"] - truth).max() == 10
    np.testing.assert_allclose(said["given"], [sum(drop) for drop in drops])
    chosen = {"block influence": (3, 4, 5), "other": (0, 2, 3)}
    picked = spread_choice(table, chosen, 3, 8)
    assert picked[0] == table.best(3)
    assert len(set(picked)) == len(picked) == 8
    assert {(3, 4, 5), table.best(3)} <= set(picked)
    assert len(spread_choice(table, chosen, 3, 99)) == 20
    with pytest.raises(UserError, match="0 candidates that drop 5"):
        spread_choice(table, chosen, 5, 8)


def test_a_table_is_read_as_it_describes_itself(table, tmp_path):
    table.save(tmp_path / "sweep.parquet")
    again = open_table(tmp_path / "sweep.parquet")
    assert (again.units, again.prompts, again.samples, again.settings) == (6, 2, 1, {"units": "blocks"})
    assert again.errors == table.errors
    with pytest.raises(UserError, match="does not exist"):
        open_table(tmp_path / "nothing.parquet")


def test_candidates_recover_and_are_compared(folder, table, tmp_path):  # noqa: F811
    """With a training that does nothing, what comes after is what was before; measured as the sweep measures it."""
    teacher, out = load_system(folder, dtype=None), tmp_path / "out"
    generator = generator_of(teacher)
    calibration = record(generator, PROMPTS, seed=5, batch=2)
    distance = Distance(teacher, generator.envelopes, calibration)
    drops, trained = [(0,), (1,), (3,), (2,)], []

    def train(start, run):
        if len(trained) == 3:
            return None
        run.mkdir(parents=True)
        trained.append(run.name)
        better = jax.tree.map(np.copy, start.params)
        if run.name == "1":
            better[DENOISER] = without_blocks(teacher, (2,))[0].params[DENOISER]
        return dataclasses.replace(start, params=better)

    settings = {"steps": 0}
    found = recovered_all(teacher, drops, out, settings, train, distance)
    assert trained == ["0", "1", "3"]
    assert not list((out / "runs").iterdir()), "runs are removed once they are measured"
    exact = Population(teacher, generator.envelopes, calibration, chunk=1)(drops)
    for drop, errors in zip(drops[:3], exact, strict=False):
        np.testing.assert_allclose(found[drop].before, errors, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found[(0,)].after, found[(0,)].before)
    np.testing.assert_allclose(found[(1,)].after, exact[3], rtol=1e-4, atol=1e-9)
    trained.clear()
    again = recovered_all(teacher, drops, out, settings, train, distance)
    assert trained == ["2"], "what is known is not trained again"
    assert list(again) == drops
    with pytest.raises(UserError, match="other settings"):
        recovered_all(teacher, drops, out, {"steps": 1}, train, distance)
    told = sections(table, {}, {"block influence": (3,)}, again, len(PROMPTS))
    assert [each.title for each in told][::2] == [
        "Do cheap scores foretell quality after recovery?", "The found set after equal recovery"]  # fmt: skip
    assert told[0].rows[-1][0] == "error before recovery"
    assert told[2].rows[0][-1] in ("better", "worse", "not told apart")
    twice = sections(table, {}, {"one": (3,), "other": (3,)}, again, len(PROMPTS))[3]
    assert {row[0]: row[-1] for row in twice.rows}["3"] == "one, other"
    best = min(again, key=lambda drop: table.errors[drop])
    accuracy = {drop: np.full(2, 0.9 if drop == best else 0.1 * drop[0]) for drop in again}
    judged = {drop: dataclasses.replace(each, accuracy=accuracy[drop]) for drop, each in again.items()}
    chance = sections(table, {}, {}, judged, len(PROMPTS))[2].rows[-1]
    others = [drop for drop in again if drop != best]
    apart = np.mean([again[drop].after.mean() for drop in others]) - again[best].after.mean()
    assert float(chance[2]) == pytest.approx(apart, rel=5e-3)
    assert float(chance[5]) == pytest.approx(90 - 10 * np.mean([drop[0] for drop in others]), abs=0.05)
    (out / "recovered.json").write_text(json.dumps({"settings": settings, "candidates": [{"dropped": [1]}]}))
    with pytest.raises(UserError, match="damaged"):
        recovered_all(teacher, drops, out, settings, train, distance)


@pytest.mark.heavy
def test_trained_by_a_presets_run(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The command, on weights stored in float16 as shipped ones are: three candidates, two steps of each stage."""
    half, parts = tmp_path / "half", load_folder(folder)
    teacher = load_system(save_system(half, load_system(folder), parts.tokenizers, dtype="fp16"))
    latents = philox(1).normal(size=(8, 1, 8, 8, 4)).astype(np.float32)
    write_latents(tmp_path / "latents", [latents], [["a ball"]] * 8, info={}, overwrite=True)
    optim = OptimConfig(learning_rate=3e-3, warmup_steps=1, schedule="constant")
    changes = {"batch": 8, "stage_mix": (1,), "train_text": False, "ema_decay": 0.0, "optim": optim}
    stage1 = FlowRun(recipe=FlowRecipeConfig(**changes))
    preset = Preset(
        name="test",
        system=tiny_system.CONFIG,
        video=teacher.video,
        sampling=teacher.sampling,
        schedule=teacher.schedule,
        runs={"both": RecoveryRun(stage1, RecoveryRecipeConfig(**changes), stage1.loop)},
    )
    monkeypatch.setattr("nd_jax.recipes.preset.load_preset", lambda name: preset)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = ["--prompt-file", str(tmp_path / "prompts.txt"), "--prompts", "2", "--batch", "2"]
    swept, out = ["--out", str(tmp_path / "sweep")], tmp_path / "out"
    assert cli.main(["prune", "sweep", str(half), *swept, *asked, "--budget", "4", "--gate-steps", "0"]) == 0
    command = ["prune", "correlate", str(half), "--sweep", str(tmp_path / "sweep"), "--preset", "test", "--run", "both"]
    command += ["--latents", str(tmp_path / "latents"), "--out", str(out), "--keep"]
    command += ["--candidates", "3", "--steps", "2"]
    assert cli.main([*command, *asked]) == 0
    assert "error before recovery: " in capsys.readouterr().out
    found = json.loads((out / "recovered.json").read_text())["candidates"]
    assert len(found) == len(list((out / "runs").iterdir())) == 3
    for each in found:
        assert np.isfinite(each["after"]).all()
        assert np.abs(np.subtract(each["after"], each["before"])).max() > 0
    assert "chance" in (out / "report.html").read_text()
