"""Metrics on their way from the device to files, and checkpoint iterators."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from nd_jax.training.metrics import (
    LaggedMetrics,
    MetricsWriter,
    TrainingDiverged,
    first_non_finite,
    metric_names,
    pack_metrics,
    read_metrics,
)
from nd_jax.training.progress import TrainingProgress


def test_packing_keeps_names_and_values_together():
    metrics = {"loss": jnp.float32(2), "a": {"b": jnp.int32(3), "c": jnp.bfloat16(0.5)}}
    names = metric_names(jax.eval_shape(lambda: metrics))
    assert dict(zip(names, np.asarray(pack_metrics(metrics)).tolist(), strict=True)) == {
        "loss": 2,
        "a/b": 3,
        "a/c": 0.5,
    }
    with pytest.raises(TypeError, match=r"metric a/b has shape \[2\]"):
        metric_names({"a": {"b": jnp.zeros(2)}})


def test_reading_lags_behind_until_everything_is_asked_for():
    metrics = LaggedMetrics(["x"], lag=2)
    for step in range(1, 5):
        metrics.push(step, jnp.full(1, 10.0 * step))
    assert list(metrics.ready()) == [(1, {"x": 10.0}), (2, {"x": 20.0})]
    assert list(metrics.ready()) == []
    assert list(metrics.ready(everything=True)) == [(3, {"x": 30.0}), (4, {"x": 40.0})]


def test_the_blame_goes_to_the_loss_term_first():
    nan, inf = float("nan"), float("inf")
    assert first_non_finite({"grad_norm": nan, "loss": nan, "loss/flow": inf, "size": 1.0}) == "loss/flow"
    assert first_non_finite({"grad_norm": nan, "loss": inf}) == "loss"
    assert first_non_finite({"grad_norm": 1.0}) is None


def test_divergence_names_step_term_and_parameter_groups():
    nan, of = float("nan"), "optim/grad_norm_of"
    both = {"flow/stage_1": nan, "loss": nan, f"{of}/denoiser": nan, f"{of}/text": 1.0, "optim/grad_norm": nan}
    error = TrainingDiverged(7, both, 4)
    assert (error.step, error.metric, error.groups, error.kept) == (7, "flow/stage_1", ["denoiser"], 4)
    assert str(error).startswith(
        "step 7: metric flow/stage_1 is nan, expected a finite number; the gradient of denoiser is not finite either; "
        "the checkpoint of step 4 is kept"
    )
    error = TrainingDiverged(7, both | {"flow/stage_1": 0.5, "loss": 0.5, f"{of}/text": float("inf")}, None)
    assert (error.metric, error.groups) == (f"{of}/denoiser", ["denoiser", "text"])
    assert "step 7: the gradient of denoiser, text is nan, expected a finite number; every loss is finite" in str(error)
    assert "no checkpoint was written yet" in str(error)
    error = TrainingDiverged(7, {"loss": 1.0, "psnr": nan}, None)
    assert (error.metric, error.groups) == ("psnr", [])


def test_resuming_drops_lines_of_later_steps_and_half_lines(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"loss": step / 3})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    writer = MetricsWriter(tmp_path, 3)
    writer.write(4, {"loss": 9.0})
    writer.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        *({"step": step, "loss": step / 3} for step in (1, 2, 3)),
        {"step": 4, "loss": 9.0},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_the_loss_on_terminals_and_stays_quiet_elsewhere(terminal):
    out = io.StringIO()
    progress = TrainingProgress(
        "toy", 0, 10, console=Console(file=out, force_terminal=terminal, force_interactive=terminal, width=120)
    )
    progress.update(3, {"grad_norm": 1.0, "loss": 0.125, "steps_per_second": 4.0})
    progress.close()
    assert ("loss 0.125  steps/s 4" in out.getvalue()) == terminal
