"""What a sweep may drop: numbered pieces of the denoiser of one kind, and candidates as data.

Blocks that a candidate drops are not computed: it is a list of those that stay. Pieces of blocks (a stream's update, a
head, a slice of an MLP) are gated off, which gives the same velocities as taking their weights away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nd_jax.models.gates import IMAGE, TEXT, Gates, open_gates
from nd_jax.models.mmdit_config import MMDiTConfig
from nd_jax.recipes.pruning import ragged_population

Drop = tuple[int, ...]
"""A candidate: the numbers of the units that go, in ascending order."""
Kind = Literal["blocks", "streams", "heads", "mlp"]
STREAMS = ("image", "text")


class Candidates(NamedTuple):
    """P candidates as the denoiser takes them: kept blocks, filled up with -1, and gates, or None where all are
    open."""

    kept: Int[np.ndarray, "p k"]
    gates: Gates | None


@dataclasses.dataclass(frozen=True)
class Units:
    """All pieces of one kind. The last block always stays; its heads and slices may go.

    ``slices``: pieces that every MLP is cut into.
    """

    config: MMDiTConfig
    kind: Kind = "blocks"
    slices: int = 8

    @property
    def blocks(self) -> int:
        """Stacked blocks."""
        return self.config.num_layers - 1

    @cached_property
    def places(self) -> list[tuple[int, ...]]:
        """Of every unit: block; block, stream; block, head; or block, stream, slice."""
        blocks, depth, slices = range(self.blocks), range(self.config.num_layers), range(self.slices)
        if self.kind == "blocks":
            return [(k,) for k in blocks]
        if self.kind == "streams":
            return [(k, s) for k in blocks for s in (IMAGE, TEXT)]
        if self.kind == "heads":
            return [(k, h) for k in depth for h in range(self.config.heads)]
        return [(k, s, n) for k in depth for s in ((IMAGE, TEXT) if k < self.blocks else (IMAGE,)) for n in slices]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, unit: int) -> str:
        """Short, for reports."""
        block, *rest = self.places[unit]
        if self.kind in ("streams", "mlp"):
            rest = [STREAMS[rest[0]], *map(str, rest[1:])]
        return " ".join([str(block), *map(str, rest)])

    @property
    def rows(self) -> list[str]:
        """Names of the rows of ``grid``."""
        return [*map(str, range(self.blocks)), *([] if self.kind in ("blocks", "streams") else ["last"])]

    @property
    def columns(self) -> list[str]:
        """Names of the columns of ``grid``."""
        if self.kind == "mlp":
            return [f"{stream} {n}" for stream in STREAMS for n in range(self.slices)]
        return {"blocks": [""], "streams": list(STREAMS)}.get(self.kind) or [str(h) for h in range(self.config.heads)]

    def grid(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, "rows columns"]:
        """A number for each unit, block by block; NaN where there is none."""
        found = np.full((len(self.rows), len(self.columns)), np.nan)
        for (block, *rest), value in zip(self.places, values, strict=True):
            column = rest[0] * self.slices + rest[1] if len(rest) == 2 else (rest or [0])[0]
            found[block, column] = value
        return found

    def encode(self, drops: Sequence[Drop]) -> Candidates:
        """Candidates as data. Raises UserError for a number that is no unit's, or comes twice."""
        if self.kind == "blocks":
            return Candidates(ragged_population(self.blocks, drops), None)
        kept = np.tile(np.arange(self.blocks, dtype=np.int32), (len(drops), 1))
        gates = [self.gates(drop) for drop in drops]
        return Candidates(kept, Gates(*(np.stack(each) for each in zip(*gates, strict=True))))

    def gates(self, drop: Drop) -> Gates:
        """Open but for these units, in NumPy."""
        gates = open_gates(self.config, self.mlp_slices)
        if drop:
            index = (each[list(drop)] if isinstance(each, np.ndarray) else each for each in self._index)
            getattr(gates, self._field)[tuple(index)] = 0.0
        return gates

    @property
    def mlp_slices(self) -> int:
        """Gates that an MLP has here: 1 where its slices are no units."""
        return self.slices if self.kind == "mlp" else 1

    @property
    def _field(self) -> str:
        return "stream" if self.kind in ("blocks", "streams") else self.kind

    @cached_property
    def _index(self) -> tuple:
        """Of all units in the array of their gates; a block's gates are those of its streams."""
        block, *rest = (np.array(each) for each in zip(*self.places, strict=True))
        return (block, slice(None), *rest)

    def to_gates(self, values: Float[Array, " n"]) -> Gates:
        """Gates with these values at the units, all others open."""
        gates = open_gates(self.config, self.mlp_slices)
        array = jnp.asarray(getattr(gates, self._field))
        values = values[:, None, None] if self.kind == "blocks" else values[:, None]
        return gates._replace(**{self._field: array.at[self._index].set(values)})

    def of_gates(self, gates: Gates) -> Float[Array, "r n"]:
        """Every unit's entry of something shaped like gates, e.g. of a gradient; a block's is the sum over its streams,
        which scale all that it adds."""
        found = getattr(gates, self._field)[self._index]
        return (found.sum(axis=-1) if self.kind == "blocks" else found).T


def sort_keys(candidates: Candidates) -> np.ndarray:
    """A row for each candidate, block after block: rows that begin alike run alike so far."""
    kept, gates = candidates
    if gates is None:
        return kept
    count, blocks = kept.shape
    flat = [np.asarray(g).reshape(count, g.shape[1], -1) for g in gates]
    by_block = np.concatenate([kept[..., None], *(g[:, :blocks] for g in flat)], axis=-1).reshape(count, -1)
    return np.concatenate([by_block, *(g[:, blocks:].reshape(count, -1) for g in flat)], axis=-1)
