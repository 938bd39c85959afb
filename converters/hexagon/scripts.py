"""Text of the hand-over: the script for Android and the page that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nd_jax.converters.bundle.targets import Target

SCRIPT = """\
#!/usr/bin/env bash
# Push the binaries for {title} ({name}), run every test vector on the phone's NPU, pull outputs and profiles.
# Needs adb with one phone, and your own QAIRT SDK: QNN_SDK_ROOT=/path/to/qairt/2.x ./push_and_run.sh [GRAPH ...]
# QAIRT has to be at least the version that compiled the binaries: {sdk}. Nothing of it is in this folder.
set -euo pipefail
cd "$(dirname "$0")"
: "${{QNN_SDK_ROOT:?set it to the folder of your QAIRT SDK (https://softwarecenter.qualcomm.com)}}"
device=${{DEVICE_FOLDER:-/data/local/tmp/nd_jax}}
graphs=("$@")
[ ${{#graphs[@]}} -gt 0 ] || graphs=({graphs})

adb shell "mkdir -p $device"
for file in bin/aarch64-android/qnn-net-run lib/aarch64-android/libQnnHtp.so lib/aarch64-android/libQnnSystem.so \\
    lib/aarch64-android/libQnnHtp{upper}Stub.so lib/hexagon-{arch}/unsigned/libQnnHtp{upper}Skel.so; do
  [ -f "$QNN_SDK_ROOT/$file" ] || {{ echo "missing: $QNN_SDK_ROOT/$file" >&2; exit 2; }}
  adb push "$QNN_SDK_ROOT/$file" "$device/"
done
adb shell "chmod +x $device/qnn-net-run"

# Outputs whose names have a '/' are written to a folder of that name, which has to be there.
folders() {{
  case "$1" in
{folders}
  esac
}}

viewer=$QNN_SDK_ROOT/bin/x86_64-linux-clang/qnn-profile-viewer
mkdir -p pulled
for graph in "${{graphs[@]}}"; do
  echo "== $graph"
  adb push "contexts/$graph.bin" "$device/"
  adb push "vectors/$graph" "$device/"
  adb shell "cd $device && rm -rf out && mkdir out"
  for place in $(folders "$graph"); do
    adb shell "mkdir -p $device/out/$place"
  done
  adb shell "cd $device && export LD_LIBRARY_PATH=$device ADSP_LIBRARY_PATH=$device && \\
    ./qnn-net-run --backend libQnnHtp.so --retrieve_context $graph.bin --input_list $graph/input_list.txt \\
      --output_dir out --perf_profile burst --profiling_level basic"
  rm -rf "pulled/$graph"
  adb pull "$device/out" "pulled/$graph"
  adb shell "rm -rf $device/out $device/$graph $device/$graph.bin"
  log=$(find "pulled/$graph" -name 'qnn-profiling-data*.log' | head -n 1)
  if [ -x "$viewer" ] && [ -n "$log" ]; then
    "$viewer" --input_log "$log" --output "pulled/$graph/profile.csv" > "pulled/$graph/profile.txt"
  fi
done
echo "now: nd-jax npu compare $(pwd)/pulled --bundle BUNDLE --target {name}"
"""


def push_and_run(target: Target, outputs: Mapping[str, Mapping[str, Any]], vectors: Mapping[str, int], sdk: str) -> str:
    """``push_and_run.sh``: graphs by name with their outputs and numbers of vectors."""
    cases = []
    for graph, names in outputs.items():
        inner = sorted({name.rpartition("/")[0] for name in names if "/" in name})
        places = [f"Result_{k}/{folder}" for k in range(vectors[graph]) for folder in inner]
        cases.append(f"    {graph}) echo {' '.join(places)} ;;")
    return SCRIPT.format(
        title=target.title,
        name=target.name,
        arch=target.arch,
        upper=target.arch.upper(),
        sdk=sdk,
        graphs=" ".join(outputs),
        folders="\n".join(cases),
    )


PHONE = "| `push_and_run.sh` | Android: adb and qnn-net-run |"
LAPTOP = "| `windows_run.py` | Windows on Snapdragon, or any machine whose onnxruntime has the provider |"
PAGE = """\
# Hexagon binaries for {title} ({name}, soc_model {number}, {arch})

Compiled on an x86-64 machine with onnxruntime-qnn {package} (QAIRT {sdk}). **Checked in Qualcomm's emulator only; this
folder has never been on a device.** The emulator computes what the NPU computes and knows nothing of its speed.

| file | what |
|---|---|
| `contexts/GRAPH.bin` | context binary, for qnn-net-run or the QNN API |
| `contexts/GRAPH.onnx` | EPContext wrapper of it, for onnxruntime with its QNN provider |
| `shared/` | {shared} |
| `io.json` | inputs and outputs: names, shapes, dtypes, and scale and offset inside the graph |
| `metadata.yaml` | the same in the form of Qualcomm AI Hub's exports |
| `vectors/GRAPH/K/*.raw` | a recorded run's inputs, little-endian float32 |
| `vectors/GRAPH/K/expected/*.raw` | what the float32 graph gives for them |
{scripts}
| `handover.json` | sizes and checksums |

Inputs and outputs are float32 and the binaries quantise for themselves: no scale is needed outside. A decoder's states
(`state/K`) are its own outputs (`next/K`) of the call before, zeros at first.

{table}

{devices}"""

ANDROID = """\
## Android

    QNN_SDK_ROOT=/path/to/qairt ./push_and_run.sh
    nd-jax npu compare pulled --bundle BUNDLE --target {name}

Qualcomm's libraries come from your own QAIRT SDK, under its licence; none are in this folder.
"""

WINDOWS = """\
## Windows on Snapdragon

Python for Arm64 (3.11 or later), in this folder:

    py -m pip install numpy onnxruntime onnxruntime-qnn
    py windows_run.py --out pulled

then copy `pulled` to where the bundle is and run `nd-jax npu compare` there. Whole videos on the laptop: the package
`nd-jax-runtime` needs no jax; its `Pipeline(bundle, opener=...)` takes a function from a graph's name to a session, as
in `windows_run.py`.
"""


def readme(target: Target, compiler: Mapping[str, str], graphs: Mapping[str, Mapping[str, Any]], shared: bool) -> str:
    """The page of a hand-over. ``compiler``: versions; ``graphs``: as in ``io.json``."""
    rows = ["| graph | precision | MB | emulator to float32, dB | vectors |", "|---|---|---|---|---|"]
    for name, ends in graphs.items():
        size = ends["bytes"] / 1e6
        told = ends["snr"].get("emulator_to_fp32", "not run")
        rows.append(f"| {name} | {ends['precision']} | {size:.2f} | {told} | {ends['vectors']} |")
    one = "the denoiser's stages in one binary, equal weights once, with a wrapper per stage; compiled, not run: the "
    return PAGE.format(
        title=target.title,
        name=target.name,
        number=target.number,
        arch=target.arch,
        package=compiler["onnxruntime-qnn"],
        sdk=compiler["sdk"],
        shared=one + "emulator cannot load it" if shared else "not compiled for this target",
        table="\n".join(rows),
        scripts=LAPTOP if target.windows else f"{PHONE}\n{LAPTOP}",
        devices=WINDOWS if target.windows else ANDROID.format(name=target.name),
    )
