"""``python -m nd_jax.converters.hexagon.worker JOB``: one task for Qualcomm's libraries, in a process made for it.

The job names a task and files; what was found goes to ``result.json`` in the working folder, an error too.
"""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.converters.hexagon.jobs import RESULT

CONTEXT, TRACE = "context.onnx", "trace"


def compile_one(job: Mapping[str, Any]) -> dict[str, Any]:
    """``context.onnx`` and its binary from the graph ``model``, with what the compiler says of it in ``trace``."""
    from nd_jax.converters.hexagon.session import open_qnn

    open_qnn(job["model"], job["number"], entries=building(CONTEXT), options=building_options(TRACE))
    return {}


def share(job: Mapping[str, Any]) -> dict[str, Any]:
    """One binary for several graphs (``models``: pairs of name and file), equal weights in it once."""
    from nd_jax.converters.hexagon.session import open_qnn

    kept = []
    for index, (name, model) in enumerate(job["models"]):
        entries = building(f"{name}.onnx") | {"ep.share_ep_contexts": "1", "ep.context_node_name_prefix": f"{name}_"}
        if index == len(job["models"]) - 1:
            entries["ep.stop_share_ep_contexts"] = "1"
        options = building_options(f"{TRACE}.{name}") | {"enable_htp_weight_sharing": "1"}
        kept.append(open_qnn(model, job["number"], entries=entries, options=options))
    return {"graphs": len(kept)}


def building(name: str) -> dict[str, str]:
    """Session entries that write a wrapper of this name, and its binary beside it."""
    path = str(Path(name).absolute())
    return {"ep.context_enable": "1", "ep.context_embed_mode": "0", "ep.context_file_path": path}


def building_options(trace: str) -> dict[str, str]:
    """Provider options of a compilation that is not run."""
    Path(trace).mkdir()
    return {
        "enable_htp_prepare_only": "1",
        "enable_framework_op_trace": "1",
        "framework_op_trace_dir": trace,
        "dump_json_qnn_graph": "1",
        "json_qnn_graph_dir": trace,
    }


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """A compiled graph in the emulator: ``outputs.K.npz`` for every ``inputs.K.npz``."""
    from nd_jax.converters.hexagon.session import open_qnn

    session = open_qnn(job["model"], job["number"])
    names = [each.name for each in session.get_outputs()]
    for k in range(job["count"]):
        with np.load(f"inputs.{k}.npz", allow_pickle=False) as stored:
            outputs = session.run(names, dict(stored))
        with open(f"outputs.{k}.npz", "wb") as file:
            np.savez(file, **{str(index): value for index, value in enumerate(outputs)})
    return {"outputs": names}


def videos(job: Mapping[str, Any]) -> dict[str, Any]:
    """Whole videos with every graph in the emulator: ``video.K.npy`` for every prompt."""
    from nd_jax.converters.hexagon.session import open_qnn
    from nd_jax.converters.runtime.pipeline import Pipeline

    pipeline = Pipeline(job["bundle"], opener=lambda name: open_qnn(job["models"][name], job["number"]))
    for k, prompt in enumerate(job["prompts"]):
        np.save(f"video.{k}.npy", pipeline.video(prompt, seed=job["seed"], sample_name=k), allow_pickle=False)
    return {}


TASKS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "compile": compile_one,
    "share": share,
    "run": run,
    "videos": videos,
}


def main(path: str) -> int:
    """Exit code 0, or 1 with the reason in ``result.json``."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive whoever waits for this
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    code, found = 0, {}
    try:
        found = TASKS[job["task"]](job)
    except Exception as error:  # whatever the native library reports: one line for whoever asked
        code, found = 1, {"error": " ".join(str(error).split())[:1000] or type(error).__name__}
    found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(RESULT).write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
