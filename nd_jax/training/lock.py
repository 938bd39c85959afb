"""One run, one process: a lock on the run's folder that the operating system drops with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from nd_jax.errors import UserError
from nd_jax.training.cluster import raise_together

NAME = "run.lock"
"""Inside a run's folder. It stays there; only the lock on it counts, so no crash leaves a folder locked."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps other runs out of ``folder``, which is made if missing. Of several processes the first locks for all.

    Raises ``UserError`` on every process: naming folder and holder when another run has it, and for a folder that
    cannot be written.
    """
    file, refusal = None, None
    if jax.process_index() == 0:
        try:
            file = _locked(folder / NAME)
        except UserError as error:
            refusal = error
    raise_together(refusal, f"run folder {folder} was refused to process 0, whose message says why")
    try:
        yield
    finally:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would leave it to children that inherited the file
            os.close(file)


def _locked(path: Path) -> int:
    """Descriptor of the lock's file, open and locked; other processes read in it who holds the lock."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"cannot write to run folder {path.parent} ({error.strerror}); choose another") from error
    told = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.write(file, told.encode())
    except (BlockingIOError, PermissionError):
        holder = os.pread(file, 300, 0).decode(errors="replace").strip() or "another process"
        os.close(file)
        raise UserError(
            f"run folder {path.parent} is in use by {holder}; wait for that run to end, or choose another folder"
        ) from None
    except OSError as error:
        os.close(file)
        raise UserError(f"cannot lock run folder {path.parent} ({error.strerror}); choose another") from error
    return file
