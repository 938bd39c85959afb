"""A bundle's test vectors: a few recorded runs of every graph, inputs and float32 outputs, from prompts of their own.

They lie in ``vectors/`` as raw numbers, listed in the manifest in the form that recordings have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.converters.bundle.calibration import Calibration, check_arrays
from nd_jax.converters.runtime.errors import BundleError
from nd_jax.converters.runtime.files import shown
from nd_jax.converters.runtime.manifest import Bundle

KEY, FOLDER, SPLIT, MOST = "vectors", "vectors", "test", 2
Arrays = Mapping[str, np.ndarray]
Run = tuple[Arrays, Arrays]


def write_vectors(folder: Path, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Write ``vectors/*.bin`` below ``folder``; the manifest's entry. Arrays equal in all runs are stored once."""
    (folder / FOLDER).mkdir(exist_ok=True)
    found: dict[str, Any] = {}
    for graph, rows in runs.items():
        entry = found[graph] = {"count": len(rows)}
        for side, index in (("inputs", 0), ("outputs", 1)):
            entry[side] = {}
            for number, name in enumerate(rows[0][index]):
                stacked = np.stack([np.asarray(row[index][name], "<f4") for row in rows])
                stacked = stacked[:1] if (stacked == stacked[:1]).all() else stacked
                file = f"{FOLDER}/{graph}.{side}.{number}.bin"
                stacked.tofile(folder / file)
                entry[side][name] = {"file": file, "rows": len(stacked), "shape": list(stacked.shape[1:])}
    return found


def chosen_runs(runs: Iterable[Run], most: int = MOST) -> list[Run]:
    """``most`` of the runs, evenly over them, so that they are not all of one step of a video."""
    every = list(runs)
    places = np.linspace(0, len(every) - 1, min(most, len(every))).round().astype(int)
    return [every[k] for k in places]


def from_calibration(calibration: Calibration, most: int = MOST) -> dict[str, list[Run]]:
    """Runs of the recordings' test split, whose prompts gave no ranges."""
    return {
        graph: chosen_runs(
            zip(*(calibration.runs(graph, SPLIT, side) for side in ("inputs", "outputs")), strict=True), most
        )
        for graph in calibration.graphs
    }


def open_vectors(bundle: Bundle, graphs: Iterable[str]) -> Calibration:
    """The vectors of ``graphs``, of which there have to be some. Raises BundleError for missing and damaged ones."""
    section = bundle.content.get(KEY)
    if not isinstance(section, dict):
        raise BundleError(f"{bundle.folder} has no test vectors; record them with `nd-jax npu emulate --prompts FILE`")
    content = {"graphs": {name: {SPLIT: entry} for name, entry in section.items()}, "files": bundle.files}
    try:
        for name in graphs:
            entry, count = section[name], section[name]["count"]
            if type(count) is not int or count < 1:
                raise BundleError(f"{bundle.folder}: {shown(count)} test vectors of graph {name}; record them again")
            for side in ("inputs", "outputs"):
                check_arrays(bundle.folder, content, entry, side, name, bundle.graph(name)[side])
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{bundle.folder}: no proper test vectors of a graph ({error!r}); record them again"
        ) from None
    return Calibration(bundle.folder, content)


def vectors_of(vectors: Calibration, graph: str) -> Iterator[Run]:
    """Inputs and float32 outputs of every vector of a graph; files are checked before they are mapped."""
    yield from zip(*(vectors.runs(graph, SPLIT, side) for side in ("inputs", "outputs")), strict=True)
