"""Joining a cluster by what the environment says, doing things once, and what a run tells of itself."""

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import pytest

from nd_jax.errors import UserError
from nd_jax.training import cluster, watch
from nd_jax.training.cluster import find_cluster, join_cluster, once
from nd_jax.training.watch import BEGAN, Clock, Tracer, Work, first_start, memory, productive_seconds

OURS = {"ND_JAX_COORDINATOR": "host:1234", "ND_JAX_PROCESSES": "2", "ND_JAX_PROCESS": "1"}
GKE = {"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "a,b,c,d", "JAX_PLATFORMS": "tpu,cpu"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("environment", "files", "kind"),
    [
        ({}, [], None),
        (OURS, [], "variables"),
        (OURS | SLURM | GKE, ["/dev/accel0"], "variables"),
        (SLURM, [], "slurm"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, [], None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, [], None),  # sbatch without srun: one process
        (GKE, [], "gke"),
        (GKE | {"TPU_WORKER_HOSTNAMES": "a"}, ["/dev/accel0"], None),  # a slice of one host
        (GKE | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_COORDINATOR_ADDRESS": "x"}, [], "gke"),
        (GKE | {"JAX_PLATFORMS": "cpu"}, ["/dev/accel0"], None),
        ({}, ["/dev/accel0"], "tpu vm"),
        ({}, ["/dev/vfio/0"], "tpu vm"),
    ],
)
def test_environments(environment, files, kind):
    found = find_cluster(environment, files.__contains__)
    assert (found and found.kind) == kind
    if kind == "variables":
        assert found.arguments == {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}
    elif found:
        assert found.arguments == {}, "JAX asks around itself"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ND_JAX_PROCESS": ""}, "ND_JAX_PROCESS is not; expected all three or none"),
        ({"ND_JAX_PROCESS": "2"}, "a lower index"),
        ({"ND_JAX_COORDINATOR": "host"}, "expected HOST:PORT"),
        ({"ND_JAX_PROCESSES": "two"}, "a number of processes"),
    ],
)
def test_variables_that_make_no_cluster(changes, told):
    with pytest.raises(UserError, match=told):
        find_cluster(OURS | changes)


def test_joining_passes_on_what_was_found_and_tells_what_failed(monkeypatch):
    calls = []
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    assert join_cluster() == "variables"
    assert calls == [{"coordinator_address": "host:1234", "num_processes": 2, "process_id": 1}]

    def fail(**_):
        raise RuntimeError("deadline exceeded\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"variables describes \(deadline exceeded\)"):
        join_cluster()
    for name in OURS:
        monkeypatch.delenv(name)
    assert join_cluster() is None


def test_only_the_first_process_does_what_is_done_once(monkeypatch):
    done = []
    once(lambda: done.append("first"), "a test")
    monkeypatch.setattr(cluster, "is_leader", lambda: False)
    once(lambda: done.append("second"), "a test")
    assert done == ["first"]


def test_a_failure_on_the_first_process_is_told_on_all(monkeypatch):
    from jax.experimental import multihost_utils

    monkeypatch.setattr(cluster, "is_leader", lambda: False)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda _: 1)
    with pytest.raises(UserError, match="writing failed on process 0, whose message says why"):
        once(lambda: None, "writing")


def test_rates_utilisation_and_goodput(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch.time, "time", lambda: 5000.0 + now[0])
    (tmp_path / BEGAN).write_text(json.dumps({"began": 5900.0}))  # 100 s before, in an earlier part of the run
    clock = Clock(Work(tokens=1000, videos=8, flops=3e12, peak=1e13), tmp_path, productive=40.0)
    assert not {"steps_per_second", "mfu", "goodput"} & clock.lap(3).keys()
    now[0], clock.waited = 1010.0, 2.0
    told = clock.lap(8)
    assert told["steps_per_second"] == pytest.approx(0.5)
    assert told["step_seconds"] == pytest.approx(2.0)
    assert told["data_wait"] == pytest.approx(0.2)
    assert told["tokens_per_second"] == pytest.approx(500)
    assert told["videos_per_second"] == pytest.approx(4)
    assert told["mfu"] == pytest.approx(0.15)
    assert told["goodput"] == pytest.approx((40 + 8) / 110)
    assert clock.productive == 48.0
    assert told["host_gib"] > 0.01


def test_the_first_start_is_remembered(tmp_path):
    first = first_start(tmp_path)
    assert abs(first - time.time()) < 60
    assert first_start(tmp_path) == first
    (tmp_path / BEGAN).write_text("nonsense")
    assert abs(first_start(tmp_path) - time.time()) < 60
    assert productive_seconds({}) == 0.0
    assert "host_gib" in memory()


def test_a_trace_of_chosen_steps(tmp_path):
    tracer = Tracer((2, 3), tmp_path)
    for step in range(1, 5):
        tracer.before(step)
        tracer.after(step, jnp.ones(3) * step)
        if step == 1:
            assert not (tmp_path / "trace").exists()
    tracer.close()
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    with pytest.raises(UserError, match="steps 3 to 2"):
        Tracer((3, 2), tmp_path)
