"""Commands that edit one bundle's manifest at the same time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("onnxruntime")

from nd_jax.converters.hexagon.section import change_manifest, put
from nd_jax.converters.runtime.errors import BundleError

EDITS, PROCESSES = 40, 3
EDITOR = f"""
import sys
from pathlib import Path
from nd_jax.converters.hexagon.section import change_manifest, put

folder, mine = Path(sys.argv[1]), sys.argv[2]
for k in range({EDITS}):
    name = f"{{mine}}-{{k}}.bin"
    (folder / f".{{name}}").write_bytes(b"x")
    put(folder, {{name: folder / f".{{name}}"}}, lambda content: None)
    change_manifest(folder, lambda content: content.__setitem__(name, k))
"""


def test_edits_of_several_commands_are_all_kept(tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps({"files": {}}))
    commands = [[sys.executable, "-c", EDITOR, str(tmp_path), f"p{k}"] for k in range(PROCESSES)]
    running = [subprocess.Popen(command) for command in commands]
    assert [each.wait(timeout=120) for each in running] == [0] * PROCESSES
    content = json.loads((tmp_path / "bundle.json").read_text())
    names = {f"p{p}-{k}.bin" for p in range(PROCESSES) for k in range(EDITS)}
    assert set(content.pop("files")) == names == set(content)
    assert {path.name for path in tmp_path.iterdir()} == names | {"bundle.json"}  # nothing of the lock is left


def test_a_failed_edit_changes_nothing_and_frees_the_bundle(tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps({"files": {}}))

    def fails(content):
        raise BundleError("no")

    with pytest.raises(BundleError):
        change_manifest(tmp_path, fails)
    assert json.loads((tmp_path / "bundle.json").read_text()) == {"files": {}}
    (tmp_path / ".a").write_bytes(b"x")
    put(tmp_path, {"a": tmp_path / ".a"}, lambda content: None)
    assert list(json.loads((tmp_path / "bundle.json").read_text())["files"]) == ["a"]


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(BundleError, match=r"cannot lock .*none \(No such file"):
        change_manifest(tmp_path / "none", dict)

    def no_locks(held, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    (tmp_path / "bundle.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(BundleError, match="No locks available"):
        change_manifest(tmp_path, dict)
