"""VBench's official runner, in its own Python environment."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from nd_jax.errors import UserError
from nd_jax.vbench_scores import DIMENSIONS, RESULTS

SECONDS = 6 * 3600
"""Most that one dimension may take."""
TAIL = 400
"""Characters of what the runner said last that are told when it fails."""

# The package's own entrance asks for CUDA; this takes what there is. Arguments: info, output, videos, dimension.
BRIDGE = """
import sys
import torch
from vbench import VBench

info, output, videos, dimension = sys.argv[1:]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VBench(device, info, output).evaluate(videos_path=videos, name=dimension, dimension_list=[dimension])
"""


def result_file(out: Path, dimension: str) -> Path:
    """Where a dimension's score is."""
    return out / f"{dimension}{RESULTS}"


def run_dimensions(
    python: Path,
    videos: Path,
    info: Path,
    out: Path,
    dimensions: Sequence[str] = tuple(DIMENSIONS),
    *,
    seconds: float = SECONDS,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Score the videos in every dimension that has no result yet, one process each; returns the result files.

    A dimension runs in a folder of its own, from which its result moves to ``out`` when it is done. Raises UserError
    for an interpreter that is not there, an unknown dimension, and a runner that fails, takes too long or leaves no
    result.
    """
    for path, what in ((python, "a Python interpreter"), (info, "VBench_full_info.json")):
        if not path.is_file():
            raise UserError(f"{path} is not a file; expected {what}")
    if not os.access(python, os.X_OK):
        raise UserError(f"{python} cannot be executed; expected a Python interpreter")
    if unknown := [name for name in dimensions if name not in DIMENSIONS]:
        raise UserError(f"VBench has no dimension {unknown[0]!r}; expected some of {', '.join(DIMENSIONS)}")
    out.mkdir(parents=True, exist_ok=True)
    for dimension in dimensions:
        if result_file(out, dimension).is_file():
            tell(f"{dimension}: done before")
            continue
        with tempfile.TemporaryDirectory(prefix=f".{dimension}-", dir=out) as folder:
            _run(python, videos, info, Path(folder), dimension, seconds)
            made = result_file(Path(folder), dimension)
            if not made.is_file():
                raise UserError(f"VBench ended without {made.name}; expected its result for {dimension}")
            made.replace(result_file(out, dimension))
        tell(f"{dimension}: done")
    return [result_file(out, dimension) for dimension in dimensions]


def _run(python: Path, videos: Path, info: Path, folder: Path, dimension: str, seconds: float) -> None:
    """One process in a session of its own, which is ended as a whole."""
    inputs = [str(Path(path).absolute()) for path in (info, folder, videos)]
    command = [str(python.absolute()), "-c", BRIDGE, *inputs, dimension]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "JAX", "XLA"))}
    with (folder / "log.txt").open("w+b") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=kept, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise UserError(f"VBench: {dimension} took more than {seconds:g} s and was ended") from None
        finally:
            _end(process)
        if code:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - TAIL))
            said = " ".join(log.read().decode(errors="replace").split())
            raise UserError(f"VBench: {dimension} ended with code {code}; it said: {said or 'nothing'}")


def _end(process: subprocess.Popen) -> None:
    """Whatever is left of the process and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    finally:
        process.wait()
