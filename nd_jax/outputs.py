"""Files and folders that appear under their final name only when they are complete."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nd_jax.errors import UserError

# What a folder has to contain, somewhere in its first two levels, before --overwrite may delete it.
_OURS = (
    "config.json",
    "nd_jax.json",
    "report.html",
    "metrics.jsonl",
    "dataset.json",
    "latents.npy",
    "shards.json",
    "targets.bin",
    "bundle.json",
    "calibration.json",
    "handover.json",
)


def _replaceable(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    return any((folder / name).is_file() or any(folder.glob(f"*/{name}")) for name in _OURS)


def check_new(path: Path, *, overwrite: bool) -> None:
    """Early form of the checks in ``new_folder``, before any expensive work.

    Raises:
        UserError: as ``new_folder``.
    """
    if os.path.lexists(path):
        if not overwrite:
            raise UserError(f"output {path} exists; pass --overwrite to replace it, or name another folder")
        if not _replaceable(path):
            raise UserError(
                f"output {path} exists and is not a folder written by nd-jax, so --overwrite does not delete it; "
                "name another folder"
            )


def _beside(target: Path) -> Path:
    """A temporary name in the target's folder, which is made if it is missing."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {target.parent} ({error.strerror}); name another output") from None
    return target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"


@contextmanager
def new_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it to ``path`` on success, delete it on any failure.

    Raises:
        UserError: if ``path`` exists without ``overwrite``, or exists and does not look like a folder of ours.
    """
    target = Path(os.path.abspath(path))
    check_new(target, overwrite=overwrite)
    temporary = _beside(target)
    try:
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot write to {target.parent} ({error.strerror}); name another output folder") from None
    try:
        yield temporary
        old = temporary.with_name(temporary.name.replace(".partial-", ".old-"))
        if os.path.lexists(target):
            check_new(target, overwrite=overwrite)
            target.rename(old)
        temporary.rename(target)
        if old.exists():
            shutil.rmtree(old)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"writing {target} failed ({error}); nothing was left behind") from error
        raise


def check_new_file(path: Path, *, overwrite: bool) -> None:
    """Early form of the checks in ``new_file``.

    Raises:
        UserError: as ``new_file``.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected the name of a file")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path} exists: use --overwrite to replace it")


@contextmanager
def new_file(path: str | os.PathLike, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, same suffix; it takes its name on success and vanishes on any failure.

    Raises:
        UserError: if ``path`` is a folder, or exists without ``overwrite``.
    """
    target = Path(os.path.abspath(path))
    check_new_file(Path(path), overwrite=overwrite)
    temporary = _beside(target)
    temporary = temporary.with_name(temporary.name + target.suffix)
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"writing {path} failed ({error}); nothing was left behind") from error
    finally:
        temporary.unlink(missing_ok=True)
