"""A sweep from the command line: stopped, gone on with, and the page that it leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_system

from nd_jax import cli
from nd_jax.converters.bundle.targets import TARGETS
from nd_jax.converters.folders import load_folder
from nd_jax.errors import UserError
from nd_jax.influence import generator_of
from nd_jax.models.mmdit import definition
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.pyramid.schedule import Schedule
from nd_jax.sweep.costs import cost_model
from nd_jax.sweep.report import difference, front, interaction
from nd_jax.sweep.table import SweepTable
from nd_jax.sweep.units import Units
from nd_jax.sweep.workflow import TABLE, SweepOptions, sweep, units_to_drop
from nd_jax.system import load_system, save_system

PROMPTS = ["a ball", "a small red circle moves right"]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A system of five blocks, one stage and one frame."""
    config = dataclasses.replace(tiny.config.diffusion_transformer, num_layers=5)
    changes = {
        "config": dataclasses.replace(tiny.config, diffusion_transformer=config),
        "params": {**tiny.params, DENOISER: tiny_system.random_params(definition(config), seed=9)},
        "schedule": Schedule(stages=1),
        "sampling": SamplePlan((2,), (1,)),
        "video": dataclasses.replace(tiny.video, frames=1),
    }
    path = tmp_path_factory.mktemp("sweep") / "system"
    save_system(path, dataclasses.replace(tiny, **changes), load_folder(tiny.folder).tokenizers, dtype=None)
    return path


def test_a_stopped_sweep_is_gone_on_with(folder, tmp_path, capsys):
    """Stopped from Python, finished from the command line: same prompts and settings, same table."""
    out, known = tmp_path / "out", []

    def interrupt(table):
        known.append(len(table.rows))
        if len(known) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    system, options = load_system(folder, dtype=None), SweepOptions(2, 60, batch=2, chunk=1, gate_steps=4)
    first = sweep(system, PROMPTS, out, options, progress=interrupt)
    assert first.ended == "SIGINT"
    before = pq.read_table(out / TABLE).to_pydict()
    assert len(before["error"]) == first.scored == known[-1] < 10

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["prune", "sweep", str(folder), "--out", str(out), "--budget", "3", "--candidates", "60"]
    command += ["--prompt-file", str(tmp_path / "prompts.txt"), "--batch", "2", "--chunk", "1", "--gate-steps", "4"]
    command += ["--judge", "1", "--judge-prompts", "2", "--videos", "1"]
    assert cli.main(command) == 0
    told = capsys.readouterr()
    assert f"going on with {first.scored} known candidates" in told.err
    whole = pq.read_table(out / TABLE).to_pydict()
    for name, column in before.items():
        assert whole[name][: first.scored] == column
    right = [n for n, dropped in enumerate(whole["dropped"]) if len(dropped) == 2]
    assert len(right) == 6, "all pairs of four blocks"
    assert all(
        low <= error <= high for low, error, high in zip(*(whole[c] for c in ("low", "error", "high")), strict=True)
    )
    best = whole["dropped"][min(right, key=lambda n: whole["error"][n])]
    assert told.out.split() == [str(k) for k in best]
    assert f"--drop {best[0]} {best[1]}" in told.err
    html = (out / "report.html").read_text()
    assert html.count("image/svg+xml") == 3 + 3 + len(TARGETS), (
        "two maps and pairs; parameters, operations, bytes; chips"
    )
    assert "Interaction of pairs" in html
    assert "Judged accuracy of short generations" in html
    finalists = told.err.count("judged accuracy ")
    assert 2 <= finalists <= 5, "the whole network, the best, and up to three choices of other scores"
    assert html.count("video/mp4") == finalists == len(list((out / "videos").glob("*.mp4")))
    assert whole["left"] == [4 - len(dropped) for dropped in whole["dropped"]]
    sizes = {len(d): m for d, m in zip(whole["dropped"], whole["macs"], strict=True)}
    assert sorted(sizes.values(), reverse=True) == [sizes[count] for count in sorted(sizes)], "fewer blocks, less work"
    assert set(whole["strategy"]) >= {"block influence", "remove-one"}
    assert set(json.loads((out / "scores.json").read_text())["scores"]) == {
        "block influence",
        "Taylor",
        "learned gates",
    }


def test_budgets(folder):
    system = load_system(folder, dtype=None)
    params = system.params[DENOISER]
    whole, block = (sum(np.size(x) for x in leaves(tree)) for tree in (params, params["blocks"]))
    block //= 4
    units = Units(system.config.diffusion_transformer)
    costs = cost_model(generator_of(system), units)
    assert costs().parameters == whole
    assert units_to_drop(costs, units, 3) == 2
    assert units_to_drop(costs, units, parameters=whole - 2 * block) == 2
    assert units_to_drop(costs, units, parameters=whole - 2 * block - 1) == 3
    for name, value in costs((0, 1)).figures().items():
        assert units_to_drop(costs, units, **{name: value * (1 + 1e-9)}) == 2, name
    bad = [{"left": 5}, {"left": 0}, {"parameters": whole}, {"parameters": whole - 4 * block - 1}, {"macs": 1.0}]
    for budget in bad:
        with pytest.raises(UserError, match="budget of"):
            units_to_drop(costs, units, **budget)
    for budget in ({}, {"left": 3, "parameters": 4}):
        with pytest.raises(UserError, match="one of --budget"):
            units_to_drop(costs, units, **budget)


def leaves(tree):
    return [leaf for child in tree.values() for leaf in leaves(child)] if isinstance(tree, dict) else [tree]


def test_pairs_front_and_differences():
    table = SweepTable({}, [(0, 1.0)], 2, units=3)
    costs = {(0,): 1.0, (1,): 2.0, (2,): 4.0, (0, 1): 3.5, (0, 2): 5.0, (0, 1, 2): 3.0}
    for drop, error in costs.items():
        table.add(drop, np.array([[error - 0.5, error + 0.5]]), "hand")
    np.testing.assert_allclose(interaction(table), [[1, 0.5, 0], [0.5, 2, np.nan], [0, np.nan, 4]])
    assert front(table) == [(0,), (0, 1, 2)], "no pair is better than dropping all three"
    assert difference(table, (0, 2), (0, 1)) == (1.5, 1.5, 1.5), "on the same prompts they always differ alike"
