"""A sweep from the command line: stopped, gone on with, and the page that it leaves."""

from __future__ import annotations

import dataclasses
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_system

from nd_jax import cli
from nd_jax.converters.folders import load_folder
from nd_jax.errors import UserError
from nd_jax.models.mmdit import definition
from nd_jax.models.system import DENOISER
from nd_jax.pyramid.sampler import SamplePlan
from nd_jax.pyramid.schedule import Schedule
from nd_jax.sweep.report import difference, front, interaction
from nd_jax.sweep.table import SweepTable
from nd_jax.sweep.workflow import TABLE, SweepOptions, blocks_to_drop, sweep
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

    system, options = load_system(folder, dtype=None), SweepOptions(2, 60, batch=2, chunk=1)
    first = sweep(system, PROMPTS, out, options, progress=interrupt)
    assert first.ended == "SIGINT"
    before = pq.read_table(out / TABLE).to_pydict()
    assert len(before["error"]) == first.scored == known[-1] < 10

    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["prune", "sweep", str(folder), "--out", str(out), "--budget", "3", "--candidates", "60"]
    command += ["--prompt-file", str(tmp_path / "prompts.txt"), "--batch", "2", "--chunk", "1"]
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
    assert html.count("image/svg+xml") == 3
    assert "Interaction of pairs" in html


def test_budgets(folder):
    system = load_system(folder, dtype=None)
    params = system.params[DENOISER]
    whole, block = (sum(np.size(x) for x in leaves(tree)) for tree in (params, params["blocks"]))
    block //= 4
    assert blocks_to_drop(system, 3, None) == 2
    assert blocks_to_drop(system, None, whole - 2 * block) == 2
    assert blocks_to_drop(system, None, whole - 2 * block - 1) == 3
    for budget in ((5, None), (0, None), (None, whole), (None, whole - 4 * block - 1)):
        with pytest.raises(UserError, match="budget of"):
            blocks_to_drop(system, *budget)
    for budget in ((None, None), (3, 4)):
        with pytest.raises(UserError, match="one of --budget"):
            blocks_to_drop(system, *budget)


def leaves(tree):
    return [leaf for child in tree.values() for leaf in leaves(child)] if isinstance(tree, dict) else [tree]


def test_pairs_front_and_differences():
    table = SweepTable({}, [(0, 1.0)], 2, blocks=3, block_parameters=10, other_parameters=1)
    costs = {(0,): 1.0, (1,): 2.0, (2,): 4.0, (0, 1): 3.5, (0, 2): 5.0, (0, 1, 2): 3.0}
    for drop, error in costs.items():
        table.add(drop, np.array([[error - 0.5, error + 0.5]]), "hand")
    np.testing.assert_allclose(interaction(table), [[1, 0.5, 0], [0.5, 2, np.nan], [0, np.nan, 4]])
    assert front(table) == [(0,), (0, 1, 2)], "no pair is better than dropping all three"
    assert [table.parameters(drop) for drop in front(table)] == [21, 1]
    assert difference(table, (0, 2), (0, 1)) == (1.5, 1.5, 1.5), "on the same prompts they always differ alike"
