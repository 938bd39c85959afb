"""Run the handed-over binaries with onnxruntime on this machine's NPU and time them: a Snapdragon laptop, for example.

    py -m pip install numpy onnxruntime onnxruntime-qnn
    py windows_run.py --out pulled            # beside io.json, contexts/ and vectors/

Writes PULLED/GRAPH/Result_K/OUTPUT.raw and PULLED/latency.json, which `nd-jax npu compare` reads. Needs no nd-jax.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

PROVIDER = "QNNExecutionProvider"


def sessions(options: argparse.Namespace):
    """A function from a wrapper's path to its session, which runs on the NPU and nowhere else."""
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]

    def opened(path: Path):
        settings = onnxruntime.SessionOptions()
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        chosen = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "htp_performance_mode": "burst"}
        if options.soc_model:
            chosen["soc_model"] = str(options.soc_model)
        settings.add_provider_for_devices(devices[:1], chosen)
        session = onnxruntime.InferenceSession(str(path), settings, enable_fallback=0)
        if session.get_providers()[:1] != [PROVIDER]:
            raise SystemExit(f"{path} runs on {session.get_providers()}; expected {PROVIDER}")
        return session

    return opened


def run_graph(session, name: str, ends: dict, options: argparse.Namespace) -> list[float]:
    """Write a graph's outputs for every vector; milliseconds of the timed runs."""
    times = []
    for k in range(ends["vectors"]):
        folder = options.folder / "vectors" / name / str(k)
        feed = {
            value: np.fromfile(folder / entry["file"], "<f4").reshape(entry["shape"])
            for value, entry in ends["inputs"].items()
        }
        names = list(ends["outputs"])
        outputs = session.run(names, feed)
        for _ in range(options.repeat):
            began = time.perf_counter()
            session.run(names, feed)
            times.append(1e3 * (time.perf_counter() - began))
        place = options.out / name / f"Result_{k}"
        place.mkdir(parents=True, exist_ok=True)
        for value, x in zip(names, outputs, strict=True):
            np.asarray(x, "<f4").tofile(place / ends["outputs"][value]["file"])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the handed-over binaries on this machine's NPU.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where io.json is")
    parser.add_argument("--out", type=Path, default=Path("pulled"))
    parser.add_argument("--repeat", type=int, default=20, help="timed runs of every vector")
    parser.add_argument("--soc-model", type=int, default=0, help="only for an emulator; an NPU knows what it is")
    parser.add_argument("--graphs", nargs="*", default=[])
    options = parser.parse_args()
    graphs = json.loads((options.folder / "io.json").read_text(encoding="utf-8"))
    opened, times = sessions(options), {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.graphs or graphs:
        session = opened(options.folder / "contexts" / f"{name}.onnx")
        times[name] = {"ms": run_graph(session, name, graphs[name], options)}
        middle = f"{np.median(times[name]['ms']):.2f} ms" if times[name]["ms"] else "not timed"
        print(f"{name}: {middle}", flush=True)
        del session
    (options.out / "latency.json").write_text(json.dumps(times), encoding="utf-8")


if __name__ == "__main__":
    main()
