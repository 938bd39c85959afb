"""The folders of a run's checkpoints: which there are, what is stored in one, and what to say when one is damaged."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from grain.python import DatasetIterator, PyGrainDatasetIterator

from nd_jax.errors import UserError
from nd_jax.training.paths import Tree, is_key, named_leaves
from nd_jax.training.seal import check_seal

FOLDER = "checkpoints"
"""Inside a run's folder."""


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder of checkpoints, oldest first."""
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def step_folder(run: Path, step: int | None) -> Path:
    """The folder of a run's newest (or named) checkpoint. Raises ``UserError`` when there is none."""
    folder = Path(run).absolute() / FOLDER
    steps = steps_in(folder)
    if not steps or (step is not None and step not in steps):
        wanted = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        raise UserError(f"{run} does not hold {wanted}; give the folder of a training run that has saved one")
    return folder / str(steps[-1] if step is None else step)


def state_metadata(folder: Path) -> Tree:
    """Shapes and dtypes of the state stored in a checkpoint's folder."""
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder / "state")).tree


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """For reading a checkpoint's folder: damage becomes a ``UserError`` naming it and what to go on from.

    Raises what the block raises otherwise: ``UserError`` and lack of memory.
    """
    try:
        with quiet_orbax():
            check_seal(folder)
            yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise UserError(f"checkpoint {folder} is damaged: {reason(error)}; {_instead(folder)}") from error


def _instead(damaged: Path) -> str:
    for step in reversed([step for step in steps_in(damaged.parent) if step < int(damaged.name)]):
        try:
            sealed = check_seal(damaged.parent / str(step))
        except (ValueError, OSError):
            continue
        return f"delete that folder to go on from step {step}" + (", which is intact" if sealed else "")
    return "no older one is intact: delete that folder to train from the beginning"


def reason(error: BaseException) -> str:
    """What the operating system said, if it did; otherwise the first line of what the library said."""
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, OSError) and each.strerror:
            return each.strerror
        told = re.search(r"\[os_error_code='(\d+)'", str(each))  # by TensorStore
        if told:
            return os.strerror(int(told[1]))
        each = each.__cause__ or each.__context__
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def check_shapes(folder: Path, abstract: Tree) -> None:
    """Raises ``UserError`` naming a leaf that the stored state has in another form than ``abstract``, or lacks."""
    stored = {name: _stored_form(leaf) for name, leaf in named_leaves(state_metadata(folder))}
    wanted = {name: _stored_form(leaf) for name, leaf in named_leaves(abstract)}
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise UserError(
                f"checkpoint {folder}: {name} is {_told(stored.get(name))}, this run expects "
                f"{_told(wanted.get(name))}; choose another output folder, or the settings it was written with"
            )


def check_identity(folder: Path, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raises ``UserError`` naming the first setting in which checkpoint and run differ, or the number of processes."""
    for name in sorted(stored.keys() | current.keys()):
        if stored.get(name) != current.get(name):
            raise UserError(
                f"checkpoint {folder} belongs to {name} {stored.get(name)!r}, this run has "
                f"{current.get(name)!r}; choose another output folder, or the {name} it was written with"
            )
    counts = {path.stem.rpartition("-of-")[2] for path in (folder / "data").glob("process_*-of-*.json")}
    if counts and str(jax.process_count()) not in counts:
        raise UserError(
            f"checkpoint {folder} was written by {max(counts)} processes, this run has {jax.process_count()}; "
            "the order of the data depends on that: use as many"
        )


def _stored_form(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype as a checkpoint holds them: random keys lie there as their integers."""
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return tuple(leaf.shape), str(np.dtype(leaf.dtype))


def _told(form: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if form is None else f"{form[1]} {list(form[0])}"


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps standard error for us: Orbax logs its errors with tracebacks, and raises them too.

    And where one array cannot be read or written, those still under way find their event loop closed and complain.
    """

    def foreign(record: logging.LogRecord) -> bool:
        return "/orbax/" not in record.pathname

    def hook(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            before(what)

    logger, before = logging.getLogger("absl"), sys.unraisablehook
    logger.addFilter(foreign)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        logger.removeFilter(foreign)


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


def portable(iterator: Any) -> Any:
    """An iterator that Grain's checkpoint handler takes."""
    if isinstance(iterator, DatasetIterator | PyGrainDatasetIterator):
        return iterator
    return _JsonIterator(iterator)
