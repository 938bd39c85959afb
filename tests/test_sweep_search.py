"""Searches over a made-up cost, and the table that brings them back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.sweep import search
from nd_jax.sweep.scores import bootstrap_weights, by_stage, score
from nd_jax.sweep.table import SweepTable

BLOCKS = 10
LEVELS = [(0, 900.0), (0, 500.0), (1, 100.0)]
WEIGHT = np.random.Generator(np.random.Philox(1)).permutation(BLOCKS) + 1.0


def cost(drop):
    """Blocks cost their weight, and neighbours cost more together: not what adding up single costs would say."""
    together = sum(8.0 for a, b in itertools.pairwise(drop) if b == a + 1)
    return sum(WEIGHT[k] for k in drop) + together


def new_table(**changes):
    settings = {"seed": 0, **changes}
    return SweepTable(settings, LEVELS, 2, units=BLOCKS)


def sweep(table, count=4, candidates=10_000, seed=0, stop=lambda: None, names=None):
    asked = []

    def evaluate(drops, name):
        assert 0 < len(drops) <= 8
        asked.extend(drops)
        for drop in drops:
            table.add(drop, np.full((3, 2), cost(drop)), name)

    strategies = search.plan(BLOCKS, count, candidates, seed)
    if names:
        strategies = {name: strategies[name] for name in names}
    return search.run(strategies, table, evaluate, size=8, candidates=candidates, stop=stop), asked


def best_of(count):
    return min(itertools.combinations(range(BLOCKS), count), key=lambda drop: (cost(drop), drop))


def test_exhaustive_search_asks_everything_once():
    table = new_table()
    ended, asked = sweep(table)
    assert ended == "complete"
    assert len(asked) == len(set(asked))
    for count in (1, 2, 4):
        assert {drop for drop in asked if len(drop) == count} == set(itertools.combinations(range(BLOCKS), count))
    assert table.best(4) == best_of(4)
    assert table.best(9) is not None, "on the way back from the last block alone"


@pytest.mark.parametrize("name", ["greedy removal", "greedy return"])
def test_greedy_takes_what_is_best_at_every_step(name):
    table = new_table()
    sweep(table, names=[name])
    if name == "greedy removal":
        dropped, sizes = (), range(1, 5)
    else:
        dropped, sizes = tuple(range(BLOCKS)), range(9, 3, -1)
    for size in sizes:
        near = [
            drop for drop in itertools.combinations(range(BLOCKS), size)
            if set(drop) >= set(dropped) or set(drop) <= set(dropped)
        ]  # fmt: skip
        assert set(near) <= set(table.rows)
        dropped = min(near, key=lambda drop: (cost(drop), drop))
    assert table.best(4) == dropped
    assert all(row.strategy == name for row in table.rows.values())


def test_intervals_are_runs_of_every_length():
    (asked,) = list(search.intervals(5, 3))
    assert len(asked) == 5 + 4 + 3
    assert all(drop == tuple(range(drop[0], drop[-1] + 1)) for drop in asked)


def test_evolution_finds_the_best_with_few_candidates():
    pytest.importorskip("cmaes")
    table = new_table()
    ended, asked = sweep(table, candidates=200, names=["remove-one", "evolution"])
    assert ended in ("complete", "candidates")
    assert len(asked) <= 200 < 210 + BLOCKS, "fewer than there are"
    assert table.best(4) == best_of(4)
    assert sweep(new_table(), candidates=200, names=["remove-one", "evolution"])[1] == asked, "same seed, same search"
    other = sweep(new_table(), candidates=200, seed=1, names=["remove-one", "evolution"])[1]
    assert other != asked


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path):
    pytest.importorskip("cmaes")
    whole = new_table()
    _, asked = sweep(whole, candidates=150)
    assert len(asked) == 150
    part, calls = new_table(), iter(range(100))
    ended, first = sweep(part, candidates=150, stop=lambda: next(calls) == 14)
    assert ended == "stopped"
    assert first == asked[: len(first)]
    part.save(tmp_path / "sweep.parquet")
    again = new_table()
    again.load(tmp_path / "sweep.parquet")
    assert list(again.rows) == first
    _, rest = sweep(again, candidates=150)
    assert first + rest == asked
    assert again.errors == whole.errors
    with pytest.raises(UserError, match="other settings"):
        new_table(seed=1).load(tmp_path / "sweep.parquet")
    (tmp_path / "sweep.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(UserError, match="not a table of ours"):
        new_table().load(tmp_path / "sweep.parquet")


def test_budgets_that_leave_nothing():
    for count in (0, 11):
        with pytest.raises(UserError, match=f"{count} blocks to remove"):
            search.plan(BLOCKS, count, 100, 0)


def test_scores_and_their_intervals():
    rng = np.random.Generator(np.random.Philox(0))
    truth, covered = 3.0, 0
    weights = bootstrap_weights(30)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    for _ in range(200):
        errors = np.tile(rng.normal(truth, 1.0, 30), (3, 1))
        found = score(errors, weights)
        np.testing.assert_allclose(found.error, errors.mean())
        covered += found.low <= truth <= found.high
    assert 0.88 < covered / 200 < 0.99
    errors = np.array([[1.0, 3.0], [3.0, 5.0], [7.0, 9.0]])
    assert [stage.error for stage in by_stage(errors, LEVELS, bootstrap_weights(2))] == [3.0, 8.0]


def test_intervals_are_over_prompts_and_seeds():
    """Videos of a prompt that are alike say no more than one; where they differ, so do the seeds' resamples."""
    rng = np.random.Generator(np.random.Philox(1))
    once, twice = bootstrap_weights(40), bootstrap_weights(40, samples=2)
    np.testing.assert_allclose(twice.sum(axis=1), 1)
    prompts = rng.normal(size=40)
    alike = score(np.repeat(prompts, 2)[None], twice)
    np.testing.assert_allclose(alike[1:], score(prompts[None], once)[1:], atol=0.06)
    seeds = np.tile([-1.0, 1.0], 40)
    low, high = score(seeds[None], twice)[1:]
    assert -0.35 < low < -0.1 < 0.1 < high < 0.35, "the prompts are all the same, their seeds are not"
