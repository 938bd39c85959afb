"""What the real pipeline feeds every graph: recorded, kept as raw vectors with a manifest, read back with checks.

Two splits over disjoint prompts: "calibration" gives the ranges, "test" the figures; the test split keeps the float32
outputs too, as expected results for a device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.checked_files import read_json, shown
from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.files import check_file, check_name, sha256
from nd_jax.converters.runtime.pipeline import Pipeline
from nd_jax.converters.runtime.video import fit
from nd_jax.errors import UserError

NAME, LIMIT, FORMAT = "calibration.json", 64 << 20, 1
SPLITS = ("calibration", "test")
LEAST = 4
"""Samples of a graph below which its ranges mean nothing."""
FRAMES = 4
"""Frames of every video that the encoder is shown."""
Arrays = dict[str, np.ndarray]


class Recorder:
    """Keeps ``most`` runs of every graph, each run with the same chance (reservoir sampling)."""

    def __init__(self, most: int, seed: int = 0):
        self.most, self.seen, self.kept = most, {}, {}
        self._rng = np.random.Generator(np.random.Philox(seed))

    def __call__(self, graph: str, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """One run; arrays that are kept are copied."""
        count = self.seen[graph] = self.seen.get(graph, 0) + 1
        kept = self.kept.setdefault(graph, [])
        place = len(kept) if len(kept) < self.most else int(self._rng.integers(count))
        if place < self.most:
            run = tuple({name: np.array(x, np.float32) for name, x in each.items()} for each in (inputs, outputs))
            kept[place : place + 1] = [run]


def record(
    pipeline: Pipeline,
    prompts: Sequence[str],
    most: int,
    *,
    seed: int,
    negative_prompt: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Recorder:
    """Make a video of every prompt, and encode some of its frames, with every graph watched."""
    recorder, about = Recorder(most, seed), pipeline.bundle["video"]
    pipeline.sessions.watch = recorder
    try:
        for index, prompt in enumerate(prompts):
            video = pipeline.video(prompt, negative_prompt=negative_prompt, seed=seed, sample_name=index)
            for place in np.linspace(0, len(video) - 1, FRAMES).round().astype(int):
                frame = fit(video[place], about["height"], about["width"])  # frames may have been enlarged
                pipeline.encode_first_frame(frame, pipeline.noise(seed, index).first)
            progress(index + 1, len(prompts))
    finally:
        pipeline.sessions.watch = None
    return recorder


def write_calibration(
    folder: Path, recorders: Mapping[str, Recorder], prompts: Mapping[str, Sequence[str]], about: Mapping[str, Any]
) -> None:
    """Write both splits into an existing folder. An array that is the same in all runs is stored once."""
    content = {"format": FORMAT, "prompts": {k: list(v) for k, v in prompts.items()}, "about": dict(about)}
    content |= {"graphs": {}, "files": {}}
    for split, recorder in recorders.items():
        (folder / split).mkdir()
        for graph, runs in recorder.kept.items():
            entry = content["graphs"].setdefault(graph, {})[split] = {"count": len(runs), "seen": recorder.seen[graph]}
            sides = {"inputs": [run[0] for run in runs]}
            if split == "test":
                sides["outputs"] = [run[1] for run in runs]
            for side, rows in sides.items():
                entry[side] = {}
                for number, name in enumerate(rows[0]):
                    stacked = np.stack([row[name] for row in rows])
                    stacked = stacked[:1] if (stacked == stacked[:1]).all() else stacked
                    file = f"{split}/{graph}.{side}.{number}.bin"
                    stacked.astype("<f4").tofile(folder / file)
                    content["files"][file] = {"bytes": stacked.nbytes, "sha256": sha256(folder / file)}
                    entry[side][name] = {"file": file, "rows": len(stacked), "shape": list(stacked.shape[1:])}
    (folder / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Calibration:
    """A recorded set on disk. Made by ``open_calibration``."""

    folder: Path
    content: Mapping[str, Any]

    @property
    def graphs(self) -> list[str]:
        return list(self.content["graphs"])

    def runs(self, graph: str, split: str, side: str = "inputs") -> Iterator[Arrays]:
        """Every recorded run's arrays by name; files are checked before they are mapped."""
        entry = self.content["graphs"][graph][split]
        arrays = {}
        for name, stored in entry[side].items():
            path = check_file(self.folder, stored["file"], self.content["files"][stored["file"]])
            arrays[name] = np.memmap(path, "<f4", "r", shape=(stored["rows"], *stored["shape"]))
        for k in range(entry["count"]):
            yield {name: array[min(k, len(array) - 1)] for name, array in arrays.items()}


def open_calibration(folder: Path, graphs: Mapping[str, Any]) -> Calibration:
    """Open a recorded set for ``graphs``, a bundle's entries by name.

    Raises UserError for a damaged set, one of other graphs or shapes, one that is too small, and splits that share a
    prompt.
    """
    try:
        return _open(Path(folder), graphs)
    except BundleError as error:
        raise UserError(str(error)) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / NAME} is not a calibration manifest ({error!r}); record it again") from None


def _open(folder: Path, graphs: Mapping[str, Any]) -> Calibration:
    content = read_json(folder / NAME, LIMIT, "calibration manifest")
    if content.get("format") != FORMAT:
        raise UserError(f"{folder}: calibration format {shown(content.get('format'))}; expected {FORMAT}")
    common = set(content["prompts"]["calibration"]) & set(content["prompts"]["test"])
    if common:
        raise UserError(f"{folder}: prompt {shown(min(common))} is in both splits; record them from disjoint prompts")
    for name, graph in graphs.items():
        if name not in content["graphs"]:
            raise UserError(f"{folder} has no recordings of graph {name}; record it with this bundle")
        for split in SPLITS:
            entry = content["graphs"][name].get(split, {"count": 0})
            if entry["count"] < (LEAST if split == "calibration" else 1):
                raise UserError(
                    f"{folder}: {entry['count']} samples of graph {name} in the {split} split; expected at least "
                    f"{LEAST if split == 'calibration' else 1}: record more prompts"
                )
            sides = {"inputs": "inputs"} if split == "calibration" else {"inputs": "inputs", "outputs": "outputs"}
            for side in sides:
                check_arrays(folder, content, entry, side, name, graph[side])
    return Calibration(folder, content)


def check_arrays(
    folder: Path, content: Mapping[str, Any], entry: Mapping[str, Any], side: str, graph: str, expected: Mapping
) -> None:
    """Raises UserError unless a split's arrays have the ``expected`` shapes, by name, and their files these sizes."""
    shapes = {name: stored["shape"] for name, stored in entry[side].items()}
    if shapes != {name: list(shape) for name, shape in expected.items()}:
        wrong = [name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)]
        raise UserError(
            f"{folder}: {side} of graph {graph} do not have the bundle's shapes (first: {shown(min(wrong))}); "
            "it was recorded with another bundle"
        )
    for stored in entry[side].values():
        check_name(stored["file"], f"{folder / NAME}")
        size = content["files"][stored["file"]]["bytes"]
        if stored["rows"] not in (1, entry["count"]) or size != 4 * stored["rows"] * math.prod(stored["shape"]):
            raise UserError(f"{folder}: {stored['file']} has {size} bytes, which is not what its shape takes")
