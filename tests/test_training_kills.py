"""Runs interrupted at random moments by kill -9, SIGTERM and Ctrl-C: in the end nobody can tell."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import training_toy as toy
from tensorboardX.proto.event_pb2 import Event, SessionLog

from nd_jax import cli
from nd_jax.training.checkpoint import read_record
from nd_jax.training.checkpoint_files import steps_in
from nd_jax.training.loop import Every
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.metrics import read_metrics

STEPS = 40
MESH = MeshConfig(data=2, fsdp=4)
SCRIPT = Path(toy.__file__)
PATIENCE = 300
"""Seconds before a process that does not get anywhere fails the test."""


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with toy.compiled_once(tmp_path_factory.mktemp("compiled")) as environment:
        yield environment


def finish(folder: Path) -> tuple[dict, dict, list[dict]]:
    """Trains to the end in this process: state, iterator position, and metrics without what depends on the clock."""
    stream = toy.batches()
    outcome = toy.run(
        folder, steps=STEPS, mesh=make_mesh(MESH), stream=stream, save_every=3, callbacks=[Every(5, toy.probe)]
    )
    assert outcome.reason == "steps"
    rows = [{name: value for name, value in row.items() if name not in toy.MEASURED} for row in read_metrics(folder)]
    return toy.numbers(outcome.state), stream.get_state(), rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory, programs):
    """A run that nothing interrupts."""
    state, position, rows = finish(tmp_path_factory.mktemp("whole"))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "probe" in row] == list(range(5, STEPS + 1, 5))
    return state, position, rows


def tensorboard(folder: Path, tag: str) -> list[tuple[int, float]]:
    """A curve as TensorBoard shows it: what a restart trains again is forgotten."""
    points: list[tuple[int, float]] = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while len(data) >= 12:
            (length,) = struct.unpack("<Q", data[:8])
            if len(data) < 16 + length:
                break  # a killed process left half a record
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.session_log.status == SessionLog.START:
                points = [point for point in points if point[0] < event.step]
            points += [(event.step, value.simple_value) for value in event.summary.value if value.tag == tag]
    return points


class Struck:
    """A run in a process of its own, to be struck."""

    def __init__(self, folder: Path, log: Path, environment: dict[str, str]):
        self.folder, self.log = folder, log
        options = [f"--data={MESH.data}", f"--fsdp={MESH.fsdp}", "--save-every=3", "--slow=0.02", "--loud"]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, SCRIPT, "--folder", folder, "--steps", str(STEPS), *options],
                env=os.environ | environment,
                stdout=out,
                stderr=out,
                cwd=SCRIPT.parent,
            )

    def until(self, reached: Callable[[], bool]) -> None:
        """Returns when something is so, or the process has ended."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and not reached():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.003)

    def compiling(self) -> bool:
        return "compiling for" in self.log.read_text()

    def writing(self) -> bool:
        return any((self.folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def step(self) -> int:
        """Of the last line of metrics."""
        return max((row["step"] for row in read_metrics(self.folder)), default=0)

    def end(self, kind: signal.Signals, times: int) -> int:
        """Strikes; returns the exit status."""
        for _ in range(times):
            self.process.send_signal(kind)
        return self.process.wait(timeout=PATIENCE)


def strike(folder: Path, log: Path, environment: dict, kind: signal.Signals, moment: str, rng: random.Random) -> int:
    """One part of a run, up to its interruption. Returns its exit status, 0 if it was too late."""
    run = Struck(folder, log, environment)
    kept = max(steps_in(folder / "checkpoints"), default=0)
    goal = kept + rng.randint(1, 6)
    try:
        run.until(run.compiling)
        if moment != "compile":
            run.until(lambda: (folder / "metrics.jsonl").exists() and run.step() >= goal)
        if moment == "write":
            run.until(run.writing)
        time.sleep(rng.uniform(0, 0.05))
        times = 1 if kind == signal.SIGKILL else rng.choice([1, 1, 2])
        status = run.end(kind, times)
    finally:
        run.process.kill()
        run.process.wait()
    told = log.read_text()
    assert "Traceback" not in told, told
    assert status in ({-kind, 0} if kind == signal.SIGKILL else {130, 0}), told
    newest = max(steps_in(folder / "checkpoints"), default=0)
    assert newest >= kept
    if kind != signal.SIGKILL and times == 1 and run.step() > kept:
        assert newest == run.step(), "a polite end costs nothing"
    return status


def chain(
    folder: Path, programs: dict, strikes: list[tuple[signal.Signals, str]], rng: random.Random, whole: tuple
) -> None:
    """Strikes one after the other, then the end of the run, which is compared with one that nothing interrupted."""
    run = folder / "run"
    logs = [folder / f"{number}.log" for number in range(len(strikes))]
    found = [strike(run, log, programs, *each, rng) for log, each in zip(logs, strikes, strict=True)]
    assert sum(status != 0 for status in found) > len(strikes) / 2
    state, position, rows = finish(run)
    toy.assert_same(state, whole[0])
    assert position == whole[1]
    assert rows == whole[2]
    expected = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    found = tensorboard(run, "loss")
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-6)
    assert read_record(run)["step"] == STEPS
    assert not list((run / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def test_three_interruptions_cannot_be_seen_in_the_result(tmp_path, programs, whole):
    strikes = [(signal.SIGKILL, "write"), (signal.SIGTERM, "step"), (signal.SIGINT, "compile")]
    chain(tmp_path, programs, strikes, random.Random(0), whole)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(4))
def test_twenty_interruptions_cannot_be_seen_in_the_result(seed, tmp_path, programs, whole):
    """Five in each of four runs, at moments that the seed chooses."""
    rng = random.Random(100 + seed)
    kinds = rng.sample([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGINT], 5)
    strikes = [(kind, rng.choice(["compile", "step", "step", "write", "write"])) for kind in kinds]
    chain(tmp_path, programs, strikes, rng, whole)


def test_a_second_run_on_the_folder_is_refused_until_the_first_is_killed(tmp_path, programs, monkeypatch, capfd):
    """The lock goes with its holder, even by kill -9."""
    monkeypatch.setitem(cli.VERBS, "toy", "training_toy:command")
    run = Struck(tmp_path / "run", tmp_path / "log", programs)
    second = ["toy", "--folder", str(tmp_path / "run"), "--steps", "2"]
    try:
        run.until(run.compiling)
        assert cli.main(second) == 2
        told = capfd.readouterr().err
        assert told.count("\n") == 1
        assert f"run folder {tmp_path / 'run'} is in use by process {run.process.pid} on " in told
    finally:
        assert run.end(signal.SIGKILL, 1) == -signal.SIGKILL
    assert cli.main(second) == 0
