"""Native tools in a process of their own: argument list, private folder, time limit, and one line if they fail."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nd_jax.checked_files import read_json
from nd_jax.errors import UserError

JOB, RESULT, LOG = "job.json", "result.json", "log.txt"
RESULT_LIMIT, TAIL = 16 << 20, 4096


def run_process(command: Sequence[str], folder: Path, *, timeout: float, what: str) -> float:
    """Run ``command`` in ``folder`` with its output in ``log.txt``; seconds it took.

    Its process group is ended in any case. Raises UserError, one line, if it takes longer than ``timeout`` seconds, is
    ended by a signal, or fails.
    """
    began = time.monotonic()
    with open(folder / LOG, "wb") as log:
        process = subprocess.Popen(
            list(command), cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise UserError(f"{what}: not done after {timeout:.0f} s; allow it more with --timeout") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        raise UserError(f"{what}: ended by {signal_name(-code)}; {last_line(folder / LOG)}")
    if code:
        raise UserError(f"{what}: failed with exit code {code}; {last_line(folder / LOG)}")
    return time.monotonic() - began


def signal_name(number: int) -> str:
    """A signal for a message, with what it mostly means."""
    meaning = {signal.SIGSEGV: "a crash of the native library", signal.SIGKILL: "perhaps out of memory"}
    try:
        found = signal.Signals(number)
    except ValueError:
        return f"signal {number}"
    return f"{found.name} ({meaning[found]})" if found in meaning else found.name


def last_line(log: Path) -> str:
    """The last line that a process has written, printable, cut."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    told = "".join(c if c.isprintable() else " " for c in lines[-1]).strip() if lines else ""
    return f"last words: {told[:300]}" if told else "it wrote nothing"


def run_worker(task: str, job: Mapping[str, Any], folder: Path, *, timeout: float, what: str) -> dict[str, Any]:
    """Run a task of ``worker`` in ``folder``; what it found, with ``seconds``.

    Raises UserError as ``run_process`` does, with the worker's own reason where it gave one.
    """
    (folder / JOB).write_text(json.dumps({"task": task, **job}), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "nd_jax.converters.hexagon.worker", JOB]
    try:
        seconds = run_process(command, folder, timeout=timeout, what=what)
    except UserError:
        if (folder / RESULT).exists():
            reason = read_json(folder / RESULT, RESULT_LIMIT).get("error")
            if reason:
                raise UserError(f"{what}: {reason}") from None
        raise
    found = read_json(folder / RESULT, RESULT_LIMIT, "result of a worker")
    return found | {"seconds": round(seconds, 2)}
