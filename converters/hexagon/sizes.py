"""What a target's binaries take: on disk, and by the schedule in memory."""

from __future__ import annotations

from collections.abc import Iterator

from nd_jax.converters.hexagon.section import KEY, compiled
from nd_jax.converters.hexagon.shared import SHARED, stage_graphs
from nd_jax.converters.runtime.manifest import Bundle

FULL_SIZE = {"height": 320, "width": 512, "frames": 49}
PORT_GIGABYTES, PORT_STAGE, PAPER_GIGABYTES = 8.5, 1.53, 3.5
"""Downloads of the third-party port, each of its three stage binaries, and the paper's peak memory."""


def binary_sizes(bundle: Bundle, target: str) -> dict[str, int]:
    """Bytes by graph; the stages count once, as ``denoiser_shared``, where they were compiled into one binary."""
    found = {name: bundle.files[entry["binary"]]["bytes"] for name, entry in compiled(bundle, target).items()}
    shared = bundle.content[KEY][target].get("shared")
    if isinstance(shared, dict) and shared.get("binary") in bundle.files:
        found = {name: size for name, size in found.items() if name not in stage_graphs(bundle)}
        found[SHARED] = bundle.files[shared["binary"]]["bytes"]
    return found


def resident(bundle: Bundle, target: str) -> dict[str, int]:
    """Bytes of binaries that every step of the schedule holds; steps with a graph that is not compiled are left out."""
    sizes, found = binary_sizes(bundle, target), {}
    for step in bundle["schedule"]:
        names = {SHARED if SHARED in sizes and name in stage_graphs(bundle) else name for name in step["load"]}
        if names and names <= set(sizes):
            found[step["step"]] = sum(sizes[name] for name in names)
    return found


def size_lines(bundle: Bundle, target: str) -> Iterator[str]:
    """For people."""
    sizes, steps = binary_sizes(bundle, target), resident(bundle, target)
    once = ", the stages in one" if SHARED in sizes else ""
    yield f"{target}: {sum(sizes.values()) / 1e6:.2f} MB of binaries{once}"
    if steps:
        step = max(steps, key=steps.__getitem__)
        yield f"{target}: most at once {steps[step] / 1e6:.2f} MB, in step {step}"
    if all(bundle["video"].get(key) == value for key, value in FULL_SIZE.items()):
        yield (
            f"the third-party port: {PORT_GIGABYTES} GB of downloads, three stages of {PORT_STAGE} GB; the paper: "
            f"{PAPER_GIGABYTES} GB of memory at most, all in"
        )
