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
from nd_jax.sweep.scores import Score, bootstrap_weights, score

Drop = tuple[int, ...]
META = b"nd_jax_sweep"
LARGEST = 1 << 30
"""Bytes of the largest table that is read."""


class Row(NamedTuple):
    """A candidate; ``errors`` float32, what its score was computed from."""

    score: Score
    errors: Float[np.ndarray, "levels prompts"]
    strategy: str


class SweepTable:
    """Candidates known so far.

    Args:
        settings: all that a score depends on, JSON-ready; a file with other settings is refused.
        levels: (stage, timestep) of every noise level.
        prompts: how many.
        block_parameters, other_parameters: of a stacked block, and of the rest of the denoiser.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        levels: Sequence[tuple[int, float]],
        prompts: int,
        *,
        blocks: int,
        block_parameters: int,
        other_parameters: int,
    ):
        self.settings, self.levels, self.prompts = settings, [tuple(level) for level in levels], prompts
        self.blocks, self.block_parameters, self.other_parameters = blocks, block_parameters, other_parameters
        self.rows: dict[Drop, Row] = {}
        self.errors: dict[Drop, float] = {}
        self._weights = bootstrap_weights(prompts)

    def add(self, drop: Drop, errors: Float[np.ndarray, "levels prompts"], strategy: str) -> None:
        """Enter a candidate with its score."""
        errors = np.asarray(errors, np.float32)
        self.rows[drop] = Row(score(errors, self._weights), errors, strategy)
        self.errors[drop] = self.rows[drop].score.error

    def parameters(self, drop: Drop) -> int:
        """Parameters of the denoiser that is left."""
        return self.other_parameters + (self.blocks - len(drop)) * self.block_parameters

    def best(self, count: int) -> Drop | None:
        """The best candidate that drops ``count`` blocks, if one is known."""
        known = [drop for drop in self.rows if len(drop) == count]
        return min(known, key=lambda drop: (self.errors[drop], drop), default=None)

    @property
    def _meta(self) -> dict[str, Any]:
        levels = [list(level) for level in self.levels]
        return {"settings": self.settings, "levels": levels, "prompts": self.prompts, "blocks": self.blocks}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        columns = {
            "dropped": pa.array([list(drop) for drop in self.rows], pa.list_(pa.int32())),
            "layers": pa.array([self.blocks + 1 - len(drop) for drop in self.rows], pa.int32()),
            "parameters": pa.array([self.parameters(drop) for drop in self.rows], pa.int64()),
            **{
                name: pa.array([getattr(row.score, name) for row in self.rows.values()], pa.float64())
                for name in Score._fields
            },
            "strategy": pa.array([row.strategy for row in self.rows.values()], pa.string()),
            # levels x prompts, flat
            "errors": pa.array([row.errors.ravel() for row in self.rows.values()], pa.list_(pa.float32())),
        }
        table = pa.table(columns).replace_schema_metadata({META: json.dumps(self._meta, sort_keys=True)})
        with new_file(path, overwrite=True) as part:
            pq.write_table(table, part)

    def load(self, path: Path) -> None:
        """Enter the candidates of a file. Raises UserError for one that is damaged or of another sweep."""
        if path.stat().st_size > LARGEST:
            raise UserError(f"sweep: {path} is larger than {LARGEST} bytes; not a table of ours")
        try:
            file = pq.ParquetFile(path)
            meta = json.loads((file.schema_arrow.metadata or {})[META])
            if meta != json.loads(json.dumps(self._meta)):
                raise UserError(
                    f"sweep: {path} was measured with other settings or of another denoiser; name another --out"
                )
            columns = file.read(columns=["dropped", "strategy", "errors"]).to_pydict()
            for drop, strategy, errors in zip(*columns.values(), strict=True):
                drop, errors = tuple(drop), np.array(errors, np.float32)
                if list(drop) != sorted(set(drop)) or any(not 0 <= k < self.blocks for k in drop):
                    raise ValueError(f"dropped blocks {drop}")
                self.add(drop, errors.reshape(len(self.levels), self.prompts), str(strategy))
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise UserError(f"sweep: {path} is not a table of ours ({error}); name another --out") from None
