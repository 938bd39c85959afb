"""Processes that read data for a run: gone when it is gone, however it ended, and deaf to what is meant for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import training_toy as toy

from nd_jax.training.checkpoint import read_record
from nd_jax.training.metrics import read_metrics

SCRIPT = Path(toy.__file__)
STEPS = 12
PATIENCE = 300


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    with toy.compiled_once(tmp_path_factory.mktemp("compiled")) as environment:
        yield environment


def parent_of(pid: int) -> int:
    """0 for a process that is no more."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def children_of(pid: int) -> set[int]:
    return {int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and parent_of(path.name) == pid}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(folder: Path, log: Path, environment: dict[str, str], *options: str) -> subprocess.Popen:
    """The toy in a session of its own, with two workers."""
    with log.open("a") as out:
        return subprocess.Popen(
            [sys.executable, SCRIPT, "--folder", folder, "--steps", str(STEPS), "--workers=2", *options],
            env=os.environ | environment,
            stdout=out,
            stderr=out,
            cwd=SCRIPT.parent,
            start_new_session=True,
        )


def reach(process: subprocess.Popen, folder: Path, log: Path, step: int) -> set[int]:
    """Waits for a step; returns the processes that have been started by then."""
    deadline = time.monotonic() + PATIENCE
    while not ((folder / "metrics.jsonl").exists() and any(row["step"] >= step for row in read_metrics(folder))):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    found = children_of(process.pid)
    assert len(found) >= 2
    return found


def all_gone(pids: set[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_workers_do_not_survive_kill_9(tmp_path, programs):
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(run, log, programs, "--pause=3")
    workers = reach(process, run, log, 3)
    process.kill()
    process.wait()
    assert all_gone(workers), [Path(f"/proc/{pid}/cmdline").read_text() for pid in workers if alive(pid)]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_everybody_ends_the_run_politely_and_then_its_workers(kind, tmp_path, programs):
    """Ctrl-C on a terminal reaches the whole process group, and so may SIGTERM. On it goes as if nothing had been."""
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    process = start(run, log, programs, "--slow=0.2")
    workers = reach(process, run, log, 2)
    os.killpg(process.pid, kind)
    assert process.wait(timeout=PATIENCE) == 130, log.read_text()
    assert all_gone(workers)
    assert "Traceback" not in log.read_text()
    assert 2 <= read_record(run)["step"] == read_metrics(run)[-1]["step"] < STEPS
    for folder in (run, whole):
        assert start(folder, log, programs).wait(timeout=PATIENCE) == 0, log.read_text()
    curves = [[(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row] for folder in (run, whole)]
    assert curves[0] == curves[1]


@pytest.mark.heavy
def test_workers_do_not_survive_an_error_in_the_run(tmp_path, programs):
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(run, log, programs, "--slow=0.2", "--fail=6")
    workers = reach(process, run, log, 2)
    assert process.wait(timeout=PATIENCE) == 1
    assert "a mistake in a callback" in log.read_text()
    assert all_gone(workers)
