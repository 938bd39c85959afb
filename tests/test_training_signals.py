"""Signals at awkward moments, through the command line: one line, exit code 130, nothing lost."""

from __future__ import annotations

import os
import signal
import time

import jax
import pytest
import training_toy as toy

from nd_jax import cli
from nd_jax.training import checkpoint
from nd_jax.training.checkpoint import CheckpointStore, read_record
from nd_jax.training.checkpoint_files import steps_in
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.program import Program

ONE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with toy.compiled_once(tmp_path_factory.mktemp("compiled")) as environment:
        yield environment


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The final state of a run that nothing interrupts."""
    return toy.numbers(toy.run(tmp_path_factory.mktemp("whole"), steps=8, mesh=ONE).state)


@pytest.fixture
def train(monkeypatch, capfd, tmp_path):
    """Function from options to exit code and standard error."""
    monkeypatch.setitem(cli.VERBS, "toy", "training_toy:command")
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell started the tests in the background

    def call(*options: str) -> tuple[int, str]:
        capfd.readouterr()
        code = cli.main(["toy", "--folder", str(tmp_path), "--steps", "8", *options])
        told = capfd.readouterr()
        assert told.out == ""
        return code, told.err

    yield call
    assert signal.getsignal(signal.SIGINT) is before


def test_one_ctrl_c_saves_where_it_stands_and_two_stop_at_once(train, tmp_path, whole):
    assert train("--strike=2", "--save-every=0") == (130, "")
    assert read_record(tmp_path)["step"] == 2
    assert train("--strike=5", "--strikes=2", "--save-every=0") == (130, "interrupted\n")
    assert steps_in(tmp_path / "checkpoints") == [2]
    toy.assert_same(toy.numbers(toy.run(tmp_path, steps=8, mesh=ONE).state), whole)


def signals(monkeypatch, owner, name, number=signal.SIGTERM, times=1):
    """Lets a function send signals to its own process, once, before it does its work."""
    original, sent = getattr(owner, name), []

    def noisy(*args):
        if not sent:
            for _ in range(times):
                sent.append(number)
                os.kill(os.getpid(), number)
                time.sleep(0.05)
        return original(*args)

    monkeypatch.setattr(owner, name, noisy)


def test_sigterm_while_compiling_takes_no_step(train, tmp_path, monkeypatch):
    signals(monkeypatch, Program, "compile_step")
    assert train() == (130, "")
    assert steps_in(tmp_path / "checkpoints") == []
    assert train() == (0, "")


def test_sigterm_while_restoring_leaves_the_checkpoint(train, tmp_path, whole, monkeypatch):
    assert train("--strike=3") == (130, "")
    signals(monkeypatch, CheckpointStore, "restore")
    assert train() == (130, "")
    assert steps_in(tmp_path / "checkpoints") == [3]
    toy.assert_same(toy.numbers(toy.run(tmp_path, steps=8, mesh=ONE).state), whole)


@pytest.mark.parametrize("times", [1, 2])
def test_signals_while_a_checkpoint_is_written_do_not_spoil_it(train, tmp_path, whole, monkeypatch, times):
    """The handler runs in the main thread, which trains, or waits for the writing thread that is in here."""
    signals(monkeypatch, checkpoint, "write_seal", signal.SIGINT, times)
    code, told = train("--save-every=4")
    assert (code, told) in {(130, "") if times == 1 else (130, "interrupted\n"), (0, "")}
    newest = read_record(tmp_path)["step"]
    assert newest >= 4
    outcome = toy.run(tmp_path, steps=8, mesh=ONE)
    toy.assert_same(toy.numbers(outcome.state), whole)


def test_a_second_signal_during_the_last_write_lets_it_finish(train, tmp_path, monkeypatch):
    signals(monkeypatch, checkpoint, "write_seal", signal.SIGINT, 2)
    assert train("--save-every=0") == (130, "interrupted\n")
    assert read_record(tmp_path)["step"] == 8
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))
