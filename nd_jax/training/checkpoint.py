"""Checkpoints of everything: state, data iterator and the settings they belong to, in one atomic folder per step.

Written with Orbax in the background; a step's folder appears under its final name only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from nd_jax.errors import UserError
from nd_jax.training.checkpoint_files import (
    FOLDER,
    check_identity,
    check_shapes,
    portable,
    quiet_orbax,
    reading,
    reason,
    state_metadata,
    step_folder,
    steps_in,
)
from nd_jax.training.paths import Tree
from nd_jax.training.seal import write_seal

UNFINISHED = "{}.orbax-checkpoint-tmp*"
"""What Orbax calls a step's folder until it is complete."""


class CheckpointStore:
    """The checkpoints of one run; a context, which waits for what is being written. Hold the ``run_lock`` meanwhile.

    ``identity`` (the preset's name and whatever else must not change between parts of a run) is stored with every
    checkpoint, and ``restore`` refuses one whose identity differs. ``settings`` is stored for people and tools.

    A write that fails leaves nothing behind but the older checkpoints, and raises ``UserError``, one line, from the
    next ``check``, ``save``, ``wait`` or the end of the context.
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
        self._writing: int | None = None
        self._quiet = ExitStack()
        self._quiet.enter_context(quiet_orbax())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    keep_period=keep_every,
                    cleanup_tmp_directories=True,  # a killed process leaves its unfinished folder behind
                    enable_async_checkpointing=True,
                    async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
                ),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "data": grain.checkpoint.CheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            self._quiet.close()
            raise UserError(
                f"cannot keep checkpoints in {self._folder} ({reason(error)}); choose a writable folder"
            ) from error

    def latest(self) -> int | None:
        """The step of the newest checkpoint, the one under way included."""
        return self._manager.latest_step()

    def kept(self) -> int | None:
        """The step of the newest complete checkpoint, when all writing is over."""
        with suppress(UserError):
            self.wait()
        return max(steps_in(self._folder), default=None)

    def save(self, step: int, state: Tree, iterator: Any, seconds: float = 0.0, productive: float = 0.0) -> None:
        """Starts writing; returns once the arrays are copied off the device, so the state may be donated after.

        Does nothing if this step is saved already. ``seconds`` is the wall-clock time the run has taken so far, of
        which ``productive`` went into steps.
        """
        self.wait()
        if step == self.latest():
            return
        self._writing = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(portable(iterator)),
                    config=ocp.args.JsonSave(
                        {**self._record, "step": step, "seconds": seconds, "productive": productive}
                    ),
                ),
                force=True,
            )
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def restore(self, abstract: Tree, iterator: Any, step: int | None = None) -> tuple[Tree, dict[str, Any]]:
        """The newest (or named) checkpoint: the state, laid out as ``abstract`` says, and the stored record.

        ``abstract`` holds ``jax.ShapeDtypeStruct`` leaves with shardings, of any mesh. ``iterator`` is set to the
        stored position. Raises ``UserError`` for a damaged checkpoint, one of another preset or with other shapes.
        """
        step = self.latest() if step is None else step
        folder = self._folder / str(step)
        with reading(folder):
            record = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
            check_identity(folder, record["identity"], self._record["identity"])
            check_shapes(folder, abstract)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    data=grain.checkpoint.CheckpointRestore(portable(iterator)),
                ),
            )
        return restored.state, record

    def check(self) -> None:
        """Whether the write under way has failed meanwhile, without waiting for it.

        Of several processes none asks: they would not raise at the same step, and so wait for each other.
        """
        if self._writing is not None and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._writing = None

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Waits for writes, then releases the manager's threads."""
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            with self._quiet:
                self._manager.close()

    def _seal(self) -> None:
        """Called by Orbax on process 0 when all files are written, before the folder takes its final name."""
        (folder,) = self._folder.glob(UNFINISHED.format(self._writing))
        write_seal(folder)

    def _failed(self, error: BaseException) -> UserError:
        step, self._writing = self._writing, None
        if jax.process_index() == 0:
            for folder in self._folder.glob(UNFINISHED.format(step)):
                shutil.rmtree(folder, ignore_errors=True)
        last = max(steps_in(self._folder), default=None)
        go_on = "begins anew: no checkpoint was written yet" if last is None else f"goes on from step {last}, kept"
        return UserError(
            f"the checkpoint of step {step} could not be written to {self._folder} ({reason(error)}); make it writable "
            f"or free some space, then run the same command again: it {go_on}"
        )


def read_record(run: Path, step: int | None = None) -> dict[str, Any]:
    """Identity, settings, step and seconds stored with a run's newest (or named) checkpoint."""
    folder = step_folder(run, step)
    with reading(folder):
        return ocp.JsonCheckpointHandler().restore(epath.Path(folder / "config"), args=ocp.args.JsonRestore())


def load_tree(
    run: Path, part: str = "ema", *, step: int | None = None, sharding: jax.sharding.Sharding | Tree | None = None
) -> Tree:
    """One part of a run's newest (or named) state, e.g. ``ema`` or ``params/student``, without the rest.

    Arrays are numpy on the host, or ``jax.Array`` under ``sharding`` (one for all, or a tree of them).
    Safe while the run goes on: when it replaces its newest checkpoint meanwhile, the newer one is read.
    Raises ``UserError`` when there is no checkpoint or no such part, and for a damaged one.
    """
    while True:
        folder = step_folder(run, step)
        try:
            with reading(folder):
                return _load(folder, part, sharding)
        except UserError:
            if step_folder(run, step) == folder:
                raise


def _load(folder: Path, part: str, sharding: jax.sharding.Sharding | Tree | None) -> Tree:
    node, keys = state_metadata(folder), part.split("/")
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
