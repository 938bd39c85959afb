"""NaN and infinity: named by step, loss term and parameter group, and never in a checkpoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_toy as toy

from nd_jax.training.checkpoint import load_tree
from nd_jax.training.checkpoint_files import steps_in
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.metrics import TrainingDiverged, read_metrics

ONE = make_mesh(MeshConfig(), jax.devices()[:1])
BAD = 6


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with toy.compiled_once(tmp_path_factory.mktemp("compiled")) as environment:
        yield environment


class Stream:
    """Examples drawn from their number, but for one step's, which are all ``value``."""

    def __init__(self, value: float):
        self.taken, self.value = 0, value

    def __next__(self):
        self.taken += 1
        x = np.stack([toy.draw(toy.BATCH * self.taken + n)["x"] for n in range(toy.BATCH)])
        return {"x": np.full_like(x, self.value) if self.taken == BAD else x}

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


@pytest.mark.parametrize(("value", "save_every"), [(np.nan, 1), (np.inf, 4)])
def test_bad_data_never_reaches_a_checkpoint_and_stops_the_run_again_when_resumed(tmp_path, value, save_every):
    """On one device the host learns of a step's numbers two steps later, when the state is long spoilt."""
    lines = []
    for _ in range(2):
        with pytest.raises(TrainingDiverged) as error:
            toy.run(tmp_path, steps=20, mesh=ONE, stream=Stream(value), save_every=save_every, keep=99)
        lines.append(str(error.value))
        assert (error.value.step, error.value.metric, error.value.groups) == (BAD, "loss", ["blocks", "out"])
    kept = [step for step in range(1, BAD) if step % save_every == 0]
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"step {BAD}: metric loss is {'nan' if np.isnan(value) else ''}")
    assert f"the checkpoint of step {kept[-1]} is kept" in lines[0]
    assert steps_in(tmp_path / "checkpoints") == kept
    for step in kept:
        for part in ("params", "opt_state", "ema"):
            for leaf in jax.tree.leaves(load_tree(tmp_path, part, step=step)):
                assert np.isfinite(leaf).all()
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, BAD))


class Cusp(toy.Toy):
    """Its loss has a term whose gradient by one parameter is 0 / 0 when all data is zero."""

    def loss(self, params, examples):
        loss, metrics = super().loss(params, examples)
        return loss + jnp.sqrt(jnp.mean(examples["x"] ** 2) * jnp.sum(params["out"]["scale"] ** 2)), metrics


def test_a_gradient_alone_that_is_not_finite_is_named_by_its_group(tmp_path):
    with pytest.raises(TrainingDiverged) as error:
        toy.run(tmp_path, steps=20, mesh=ONE, stream=Stream(0.0), recipe=Cusp(), save_every=5)
    assert (error.value.step, error.value.groups, error.value.kept) == (BAD, ["out"], 5)
    assert "the gradient of out is nan, expected a finite number; every loss is finite" in str(error.value)
