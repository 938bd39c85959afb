"""Two processes that train together: one lock, one decision when to stop, checkpoints of both."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import training_toy as toy

from nd_jax.training.checkpoint import load_tree, read_record
from nd_jax.training.checkpoint_files import steps_in
from nd_jax.training.interrupt import AGREE_EVERY
from nd_jax.training.lock import run_lock
from nd_jax.training.metrics import read_metrics
from nd_jax.training.paths import named_leaves

pytestmark = pytest.mark.heavy
SCRIPT = Path(toy.__file__)
STEPS = 20
PATIENCE = 300


def pair(folder: Path, logs: list[Path], *options: str, devices: int = 2) -> list[subprocess.Popen]:
    """Two processes of the toy, ``devices`` each; over all of them, fsdp is as large as one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    started = []
    for index, log in enumerate(logs):
        with log.open("a") as out:
            command = [sys.executable, SCRIPT, "--folder", folder, "--steps", str(STEPS), "--data=2"]
            command += [f"--fsdp={devices}", f"--port={port}", f"--index={index}", "--loud", *options]
            started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=SCRIPT.parent))
    return started


def ends(processes: list[subprocess.Popen], logs: list[Path], code: int) -> None:
    try:
        assert [process.wait(timeout=PATIENCE) for process in processes] == [code] * 2, [
            log.read_text() for log in logs
        ]
    finally:
        for process in processes:
            process.kill()


def wait_for(condition: Callable[[], bool], logs: list[Path]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, [log.read_text() for log in logs]
        time.sleep(0.05)


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]


def test_two_processes_stop_together_resume_and_share_a_lock(tmp_path):
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    ends(pair(whole, logs), logs, 0)
    assert [step for step, _ in curve(whole)] == list(range(1, STEPS + 1))
    files = json.loads((whole / "checkpoints" / str(STEPS) / "seal.json").read_text())
    assert {"data/process_0-of-2.json", "data/process_1-of-2.json"} <= files.keys()
    assert {checksum for _, checksum in files.values()} == {None}

    processes = pair(run, logs, "--slow=0.2", "--save-every=100")
    wait_for(lambda: (run / "metrics.jsonl").exists() and bool(curve(run)), logs)
    processes[1].send_signal(signal.SIGTERM)  # one of them alone is told
    ends(processes, logs, 130)
    stopped = read_record(run)["step"]
    assert stopped in (AGREE_EVERY, 2 * AGREE_EVERY)
    assert steps_in(run / "checkpoints") == [stopped]
    ends(pair(run, logs), logs, 0)
    assert curve(run) == curve(whole)

    with run_lock(run):
        ends(pair(run, logs), logs, 2)
    assert f"in use by process {os.getpid()} on " in logs[0].read_text()  # Gloo may have the last word
    assert "was refused to process 0, whose message says why" in logs[1].read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_of_two_times_four_devices_is_made_up_for(tmp_path, victim):
    """kill -9 of either process after a checkpoint: a restart continues to the same losses and the same averaged
    parameters, bit for bit."""
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    ends(pair(whole, logs, devices=4), logs, 0)

    processes = pair(run, logs, "--slow=0.2", "--save-every=3", devices=4)
    try:
        wait_for(lambda: bool(steps_in(run / "checkpoints")), logs)
        processes[victim].kill()
        assert processes[victim].wait(timeout=PATIENCE) == -signal.SIGKILL
        # Whoever remains waits for a step that cannot come; a pod's manager ends it, as here.
        processes[1 - victim].kill()
        processes[1 - victim].wait(timeout=PATIENCE)
    finally:
        for process in processes:
            process.kill()
    left = steps_in(run / "checkpoints")
    assert left
    assert left[-1] < STEPS
    ends(pair(run, logs, devices=4), logs, 0)
    assert curve(run) == curve(whole)
    assert read_record(run)["step"] == read_record(whole)["step"] == STEPS
    expected, found = (dict(named_leaves(load_tree(folder))) for folder in (whole, run))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value), err_msg=name)
