"""Everything that a sweep has measured: one parquet file, a row for each candidate, in the order of measurement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from nd_jax.errors import UserError
from nd_jax.outputs import new_file
from nd_jax.sweep.costs import CostModel
from nd_jax.sweep.scores import Score, bootstrap_weights, by_stage, score
from nd_jax.sweep.units import Drop

META = b"nd_jax_sweep"
LARGEST = 1 << 30
"""Bytes of the largest table that is read."""
MOST = 1 << 20
"""Of prompts, seeds and units in a file."""


class Row(NamedTuple):
    """A candidate; ``errors`` float32, what its score was computed from."""

    score: Score
    errors: Float[np.ndarray, "levels videos"]
    strategy: str


class SweepTable:
    """Candidates known so far.

    Args:
        settings: all that a score depends on, JSON-ready; a file with other settings is refused.
        levels: (stage, timestep) of every noise level.
        prompts, samples: how many, and videos of each.
        units: how many pieces a candidate chooses from.
        costs: what candidates cost, and with what; None: only their errors count.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        levels: Sequence[tuple[int, float]],
        prompts: int,
        *,
        units: int,
        samples: int = 1,
        costs: CostModel | None = None,
    ):
        self.settings, self.levels, self.prompts = settings, [tuple(level) for level in levels], prompts
        self.units, self.samples, self.costs = units, samples, costs
        self.rows: dict[Drop, Row] = {}
        self.errors: dict[Drop, float] = {}
        self.weights = bootstrap_weights(prompts, samples)

    def add(self, drop: Drop, errors: Float[np.ndarray, "levels videos"], strategy: str) -> None:
        """Enter a candidate with its score."""
        errors = np.asarray(errors, np.float32)
        self.rows[drop] = Row(score(errors, self.weights), errors, strategy)
        self.errors[drop] = self.rows[drop].score.error

    def best(self, count: int) -> Drop | None:
        """The best candidate that drops ``count`` units, if one is known."""
        known = [drop for drop in self.rows if len(drop) == count]
        return min(known, key=lambda drop: (self.errors[drop], drop), default=None)

    @property
    def _meta(self) -> dict[str, Any]:
        levels = [list(level) for level in self.levels]
        sizes = {"prompts": self.prompts, "samples": self.samples, "units": self.units}
        return {"settings": self.settings, "levels": levels, **sizes}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        stages = [by_stage(row.errors, self.levels, self.weights) for row in self.rows.values()]
        costs = [] if self.costs is None else [self.costs(drop) for drop in self.rows]
        columns = {
            "dropped": pa.array([list(drop) for drop in self.rows], pa.list_(pa.int32())),
            "left": pa.array([self.units - len(drop) for drop in self.rows], pa.int32()),
            **{
                name: pa.array([cost.figures()[name] for cost in costs], pa.float64())
                for name in (costs[0].figures() if costs else ())
            },
            **{
                name: pa.array([getattr(row.score, name) for row in self.rows.values()], pa.float64())
                for name in Score._fields
            },
            **{
                f"stage_{name}": pa.array([[getattr(s, name) for s in each] for each in stages], pa.list_(pa.float64()))
                for name in Score._fields
            },
            "strategy": pa.array([row.strategy for row in self.rows.values()], pa.string()),
            # levels x videos, flat
            "errors": pa.array([row.errors.ravel() for row in self.rows.values()], pa.list_(pa.float32())),
        }
        table = pa.table(columns).replace_schema_metadata({META: json.dumps(self._meta, sort_keys=True)})
        with new_file(path, overwrite=True) as part:
            pq.write_table(table, part)

    def load(self, path: Path) -> None:
        """Enter the candidates of a file. Raises UserError for one that is damaged or of another sweep."""
        meta, columns = _content(path)
        if meta != json.loads(json.dumps(self._meta)):
            raise UserError(
                f"sweep: {path} was measured with other settings or of another denoiser; name another --out"
            )
        self._enter(path, columns)

    def _enter(self, path: Path, columns: dict[str, list]) -> None:
        try:
            for drop, strategy, errors in zip(*columns.values(), strict=True):
                drop, errors = tuple(drop), np.array(errors, np.float32)
                if list(drop) != sorted(set(drop)) or any(not 0 <= k < self.units for k in drop):
                    raise ValueError(f"dropped {drop}")
                self.add(drop, errors.reshape(len(self.levels), self.prompts * self.samples), str(strategy))
        except (TypeError, ValueError) as error:
            raise _damaged(path, error) from None


def open_table(path: Path) -> SweepTable:
    """A sweep's table as its file describes it, without costs. Raises UserError for a file that is none."""
    meta, columns = _content(path)
    try:
        sizes = {name: int(meta[name]) for name in ("prompts", "samples", "units")}
        if not all(1 <= size <= MOST for size in sizes.values()):
            raise ValueError(f"sizes {sizes}")
        levels = [(int(stage), float(time)) for stage, time in meta["levels"]]
        prompts = sizes.pop("prompts")
        table = SweepTable(dict(meta["settings"]), levels, prompts, **sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None
    table._enter(path, columns)
    return table


def _content(path: Path) -> tuple[dict[str, Any], dict[str, list]]:
    """What a file says of itself, and the columns that count."""
    if not path.is_file():
        raise UserError(f"sweep: {path} does not exist; expected a file of nd-jax prune sweep")
    if path.stat().st_size > LARGEST:
        raise UserError(f"sweep: {path} is larger than {LARGEST} bytes; not a table of ours")
    try:
        file = pq.ParquetFile(path)
        meta = json.loads((file.schema_arrow.metadata or {})[META])
        return meta, file.read(columns=["dropped", "strategy", "errors"]).to_pydict()
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"sweep: {path} is not a table of ours ({error}); name another --out")
