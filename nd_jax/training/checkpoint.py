"""Checkpoints of everything: state, data iterator and the settings they belong to, in one atomic folder per step.

Written with Orbax in the background; a step's folder appears under its final name only when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from grain.python import DatasetIterator, PyGrainDatasetIterator

from nd_jax.errors import UserError
from nd_jax.training.paths import Tree, is_key, named_leaves

FOLDER = "checkpoints"
"""Inside a run's folder."""


class CheckpointStore:
    """The checkpoints of one run.

    ``identity`` (the preset's name and whatever else must not change between parts of a run) is stored with every
    checkpoint, and ``restore`` refuses one whose identity differs. ``settings`` is stored for people and tools.
    """

    def __init__(
        self,
        run: Path,
        identity: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        *,
        keep: int = 2,
        keep_every: int | None = None,
    ):
        self._folder = Path(run).absolute() / FOLDER
        self._record = json.loads(json.dumps({"identity": dict(identity), "settings": dict(settings or {})}))
        try:
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    keep_period=keep_every,
                    cleanup_tmp_directories=True,  # a killed process leaves its unfinished folder behind
                    enable_async_checkpointing=True,
                ),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "data": grain.checkpoint.CheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {self._folder}: {error}; choose a writable folder") from error

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, iterator: Any, seconds: float = 0.0) -> None:
        """Starts writing; returns once the arrays are copied off the device, so the state may be donated after.

        Does nothing if this step is saved already. ``seconds`` is the wall-clock time the run has taken so far.
        """
        if step == self.latest():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=grain.checkpoint.CheckpointSave(_portable(iterator)),
                config=ocp.args.JsonSave({**self._record, "step": step, "seconds": seconds}),
            ),
        )

    def restore(self, abstract: Tree, iterator: Any, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """The newest (or named) checkpoint: the state, laid out as ``abstract`` says, and the stored record.

        ``abstract`` holds ``jax.ShapeDtypeStruct`` leaves with shardings, of any mesh. ``iterator`` is set to the
        stored position. Raises ``UserError`` for a checkpoint of another preset or with other shapes.
        """
        step = self.latest() if step is None else step
        record = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
        self._check_identity(step, record)
        self._check_shapes(step, abstract)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                data=grain.checkpoint.CheckpointRestore(_portable(iterator)),
            ),
        )
        return restored.state, record

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        self._manager.wait_until_finished()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, *_: Any) -> None:
        """Waits for writes, then releases the manager's threads."""
        self._manager.close()

    def _check_identity(self, step: int, record: Mapping[str, Any]) -> None:
        stored, current = record["identity"], self._record["identity"]
        for name in sorted(stored.keys() | current.keys()):
            if stored.get(name) != current.get(name):
                raise UserError(
                    f"checkpoint {self._folder / str(step)} belongs to {name} {stored.get(name)!r}, this run has "
                    f"{current.get(name)!r}; choose another output folder, or the {name} it was written with"
                )

    def _check_shapes(self, step: int, abstract: Tree) -> None:
        stored = {name: _stored_form(leaf) for name, leaf in named_leaves(_state_metadata(self._folder / str(step)))}
        wanted = {name: _stored_form(leaf) for name, leaf in named_leaves(abstract)}
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {self._folder / str(step)}: {name} is {_told(stored.get(name))}, this run expects "
                    f"{_told(wanted.get(name))}; choose another output folder, or the settings it was written with"
                )


def read_record(run: Path, step: int | None = None) -> dict[str, Any]:
    """Identity, settings, step and seconds stored with a run's newest (or named) checkpoint."""
    folder = _step_folder(run, step)
    return ocp.JsonCheckpointHandler().restore(epath.Path(folder / "config"), args=ocp.args.JsonRestore())


def load_tree(
    run: Path, part: str = "ema", *, step: int | None = None, sharding: jax.sharding.Sharding | Tree | None = None
) -> Tree:
    """One part of a run's newest (or named) state, e.g. ``ema`` or ``params/student``, without the rest.

    Arrays are numpy on the host, or ``jax.Array`` under ``sharding`` (one for all, or a tree of them).
    Raises ``UserError`` when there is no checkpoint or no such part.
    """
    folder = _step_folder(run, step)
    node, keys = _state_metadata(folder), part.split("/")
    for key in keys:
        if not isinstance(node, Mapping) or node.get(key) is None:
            known = ", ".join(sorted(node)) if isinstance(node, Mapping) else "nothing below it"
            raise UserError(f"checkpoint {folder} has no part {part!r}: expected one of {known}")
        node = node[key]
    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), node)
    if sharding is None:
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    elif isinstance(sharding, jax.sharding.Sharding):
        how = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=sharding), item)
    else:
        how = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf), sharding)
    for key in reversed(keys):
        item, how = {key: item}, {key: how}
    args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
    tree = ocp.PyTreeCheckpointHandler().restore(epath.Path(folder / "state"), args=args)
    for key in keys:
        tree = tree[key]
    return tree


class _JsonIterator:
    """Gives any iterator with ``get_state`` and ``set_state`` (JSON values) the face Grain's handler expects."""

    def __init__(self, iterator: Any):
        self._iterator = iterator

    def get_state(self) -> bytes:
        return json.dumps(self._iterator.get_state()).encode()

    def set_state(self, state: bytes) -> None:
        self._iterator.set_state(json.loads(state))

    def start_prefetch(self) -> None:
        pass


def _portable(iterator: Any) -> Any:
    if isinstance(iterator, DatasetIterator | PyGrainDatasetIterator):
        return iterator
    return _JsonIterator(iterator)


def _step_folder(run: Path, step: int | None) -> Path:
    folder = Path(run).absolute() / FOLDER
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        raise UserError(f"{run} does not hold {wanted}; give the folder of a training run that has saved one")
    return folder / str(max(steps) if step is None else step)


def _state_metadata(folder: Path) -> Tree:
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder / "state")).tree


def _stored_form(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype as a checkpoint holds them: random keys lie there as their integers."""
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return tuple(leaf.shape), str(np.dtype(leaf.dtype))


def _told(form: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if form is None else f"{form[1]} {list(form[0])}"
