"""Output folders appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nd_jax.errors import UserError

# What a folder has to contain, somewhere in its first two levels, before --overwrite may delete it.
_OURS = ("config.json", "nd_jax.json", "report.html", "metrics.jsonl")


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


@contextmanager
def new_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; rename it to ``path`` on success, delete it on any failure.

    Raises:
        UserError: if ``path`` exists without ``overwrite``, or exists and does not look like a folder of ours.
    """
    target = Path(os.path.abspath(path))
    check_new(target, overwrite=overwrite)
    mark = uuid.uuid4().hex[:8]
    temporary = target.parent / f".{target.name}.partial-{mark}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {target.parent} ({error.strerror}); name another output folder") from None
    try:
        yield temporary
        old = target.parent / f".{target.name}.old-{mark}"
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
