"""Damaged checkpoints, full disks, folders that cannot be written: one line, exit code 2, the last good state kept."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import training_toy as toy

from nd_jax import cli
from nd_jax.errors import UserError
from nd_jax.training import checkpoint
from nd_jax.training.checkpoint import load_tree, read_record
from nd_jax.training.checkpoint_files import steps_in
from nd_jax.training.lock import run_lock
from nd_jax.training.mesh import MeshConfig, make_mesh
from nd_jax.training.metrics import MetricsWriter, read_metrics
from nd_jax.training.seal import check_seal

ONE = make_mesh(MeshConfig(), jax.devices()[:1])
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    with toy.compiled_once(tmp_path_factory.mktemp("compiled")) as environment:
        yield environment


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps with checkpoints at 4 and 8: folder and final state."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, toy.numbers(toy.run(folder, steps=8, mesh=ONE).state)


@pytest.fixture
def copy(whole, tmp_path):
    """That run's folder, to be damaged."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


@pytest.fixture
def train(monkeypatch, capfd):
    """Function from folder and options to the line of an error; the command line must refuse, and leave no more."""
    monkeypatch.setitem(cli.VERBS, "toy", "training_toy:command")

    def call(folder: Path, steps: int = 9, *options: str, code: int = 2) -> str:
        capfd.readouterr()
        assert cli.main(["toy", "--folder", str(folder), "--steps", str(steps), *options]) == code
        told = capfd.readouterr()
        if code == 2:
            assert told.err.startswith("error: ")
        assert (told.out, told.err.count("\n")) == ("", int(code != 0)), told.err
        return told.err

    return call


# ---- damaged checkpoints


def arrays(folder: Path) -> Path:
    """The largest file of the newest checkpoint."""
    return max((folder / "checkpoints" / "8" / "state").rglob("*"), key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing array": (lambda run: arrays(run).unlink(), "is missing"),
    "truncated array": (lambda run: truncate(arrays(run)), "bytes, "),
    "one bit": (lambda run: flip(arrays(run)), "has other contents than were written"),
    "record": (lambda run: truncate(run / "checkpoints/8/config/metadata"), "config/metadata has"),
    "iterator": (lambda run: (run / "checkpoints/8/data/process_0-of-1.json").unlink(), "is missing"),
    "no state": (lambda run: shutil.rmtree(run / "checkpoints/8/state"), "is missing"),
    "seal": (lambda run: truncate(run / "checkpoints/8/seal.json"), "seal.json is not readable"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_with_what_to_go_on_from(kind, copy, train):
    damage, told = DAMAGE[kind]
    damage(copy)
    line = train(copy)
    assert f"checkpoint {copy / 'checkpoints' / '8'} is damaged: " in line
    assert told in line
    assert line.endswith("delete that folder to go on from step 4, which is intact\n")
    for read in (load_tree, read_record):
        with pytest.raises(UserError, match="checkpoints/8 is damaged"):
            read(copy)
    assert steps_in(copy / "checkpoints") == [4, 8]
    assert len(read_metrics(copy)) == 8


UNSEALED = {
    "record": lambda folder: truncate(folder / "config/metadata"),
    "foreign record": lambda folder: (folder / "config/metadata").write_text("[1]"),
    "iterator": lambda folder: truncate(folder / "data/process_0-of-1.json"),
    "no items": lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
    "metadata": lambda folder: truncate(folder / "state/_METADATA"),
}


@pytest.mark.parametrize("kind", UNSEALED)
def test_a_damaged_checkpoint_of_an_older_version_is_refused_as_well(kind, copy, train):
    for step in ("4", "8"):
        (copy / "checkpoints" / step / "seal.json").unlink()
    UNSEALED[kind](copy / "checkpoints" / "8")
    line = train(copy)
    assert "checkpoints/8 is damaged: " in line
    assert line.endswith("delete that folder to go on from step 4\n")


def test_without_an_intact_checkpoint_the_advice_is_to_begin_anew(copy, train):
    for step in ("4", "8"):
        flip(copy / "checkpoints" / step / "state" / "_METADATA")
    assert "no older one is intact: delete that folder to train from the beginning" in train(copy)


def test_following_the_advice_loses_only_the_steps_since(whole, copy):
    """Also where the older checkpoint was written before there were seals, or a third one was half deleted."""
    expected = whole[1]
    shutil.rmtree(copy / "checkpoints" / "8")
    (copy / "checkpoints" / "4" / "seal.json").unlink()
    shutil.copytree(copy / "checkpoints" / "4" / "config", copy / "checkpoints" / "2" / "config")
    toy.assert_same(toy.numbers(toy.run(copy, steps=8, mesh=ONE).state), expected)
    assert steps_in(copy / "checkpoints") == [4, 8]
    assert check_seal(copy / "checkpoints" / "8")
    assert [row["step"] for row in read_metrics(copy)] == list(range(1, 9))


def test_another_number_of_processes_is_refused(copy, train):
    folder = copy / "checkpoints" / "8"
    (folder / "seal.json").unlink()
    (folder / "data" / "process_0-of-1.json").rename(folder / "data" / "process_0-of-2.json")
    assert "was written by 2 processes, this run has 1; the order of the data depends on that" in train(copy)


def test_a_part_can_be_read_while_the_run_replaces_its_newest_checkpoint(whole, copy, monkeypatch):
    newest, read = copy / "checkpoints" / "8", checkpoint.state_metadata

    def interrupted(folder):
        if folder == newest:
            shutil.copytree(newest, copy / "checkpoints" / "12")
            shutil.rmtree(newest)
        return read(folder)

    monkeypatch.setattr(checkpoint, "state_metadata", interrupted)
    np.testing.assert_array_equal(load_tree(copy, "params/out")["kernel"], whole[1]["params/out/kernel"])


# ---- metrics


def test_a_damaged_line_of_metrics_is_named(copy, train):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join([*lines[:2], lines[2][:9] + "\n", *lines[3:]]))
    assert f"{copy / 'metrics.jsonl'} is damaged in line 3: expected one JSON object" in train(copy)


def test_a_full_disk_under_the_metrics_is_one_line(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    with open("/dev/full", "w", buffering=1) as full:
        writer._lines = full
        for act in (lambda: writer.write(2, {"loss": 1.0}), writer.flush):
            with pytest.raises(UserError, match=rf"cannot write metrics to {tmp_path} \(No space left on device\)"):
                act()
        writer.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


# ---- folders that cannot be written


def test_a_file_in_place_of_the_folder(tmp_path, train):
    (tmp_path / "run").write_text("")
    assert f"cannot write to run folder {tmp_path / 'run'} (File exists)" in train(tmp_path / "run")
    assert "(Not a directory)" in train(tmp_path / "run" / "below")


def test_a_file_in_place_of_the_checkpoints(tmp_path, train):
    (tmp_path / "checkpoints").write_text("")
    assert f"cannot keep checkpoints in {tmp_path / 'checkpoints'}" in train(tmp_path)


def test_a_folder_in_use(tmp_path, train):
    with run_lock(tmp_path / "run"):
        assert f"in use by process {os.getpid()} on " in train(tmp_path / "run")
    with run_lock(tmp_path / "run"):
        pass


def test_the_lock_lets_go_after_an_error(tmp_path):
    with contextlib.suppress(ValueError), run_lock(tmp_path):
        raise ValueError
    with run_lock(tmp_path):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few hundred kilobytes: its folder, and a function that mounts it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False).returncode == 0

    if os.geteuid() or not mount("-t", "tmpfs", "-o", "size=400k", "tmpfs"):
        pytest.skip("mounting a small disk needs root")
    yield folder, lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_disk(small_disk, train):
    folder, mount = small_disk
    assert mount("ro")
    assert f"cannot write to run folder {folder / 'run'} (Read-only file system)" in train(folder / "run")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_costs_nothing_but_the_steps_since(whole, small_disk, train):
    """Every write reaches the disk itself; with more space the run goes on as if nothing had happened."""
    folder, mount = small_disk
    line = train(folder / "run", 8, "--save-every=1", "--keep=99")
    assert "No space left on device" in line
    kept = steps_in(folder / "run" / "checkpoints")
    assert kept
    assert all(check_seal(folder / "run" / "checkpoints" / str(step)) for step in kept)
    assert not list((folder / "run" / "checkpoints").glob("*tmp*"))
    assert mount("size=64m")
    outcome = toy.run(folder / "run", steps=8, mesh=ONE)
    toy.assert_same(toy.numbers(outcome.state), whole[1])
    assert [row["step"] for row in read_metrics(folder / "run")] == list(range(1, 9))


def test_a_write_that_fails_in_the_background_is_told_and_leaves_the_last_checkpoint(
    whole, tmp_path, train, monkeypatch
):
    seal, failed = checkpoint.write_seal, []

    def second_fails(folder):
        if folder.name.startswith("4"):
            return seal(folder)
        failed.append(folder)
        raise FULL

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "write_seal", second_fails)
        line = train(tmp_path, 10**6, "--keep=1")
    folder = tmp_path / "checkpoints"
    assert f"the checkpoint of step 8 could not be written to {folder} (No space left on device)" in line
    assert line.endswith("then run the same command again: it goes on from step 4, kept\n")
    assert len(failed) == 1
    assert steps_in(folder) == [4]
    assert not list(folder.glob("*tmp*"))
    toy.assert_same(toy.numbers(toy.run(tmp_path, steps=8, mesh=ONE).state), whole[1])


def test_a_first_write_that_fails_at_the_very_end_is_told(tmp_path, train, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_seal", lambda _: (_ for _ in ()).throw(FULL))
    line = train(tmp_path, 3)
    assert "the checkpoint of step 3 could not be written" in line
    assert line.endswith("it begins anew: no checkpoint was written yet\n")
