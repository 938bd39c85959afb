"""From data pipelines to the batches that recipes ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nd_jax.data.pipeline import BatchIterator


class Feed:
    """A batch iterator whose batches have exactly the leaves of a recipe's ``batch_spec``; position saved alike."""

    def __init__(self, inner: BatchIterator, leaves: Mapping[str, Any]):
        self._inner, self._leaves = inner, tuple(leaves)

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._inner)
        return {name: batch[name] for name in self._leaves}

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, JSON-able."""
        return self._inner.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved position; refused when it was saved under other settings."""
        self._inner.set_state(state)


class MixedFeed:
    """Several iterators whose examples are trained in one step: their batches side by side, column by column.

    Iterator k gives ``rows * columns[k]`` examples. Its ``latents`` become ``latents_k``; every other leaf is dealt so
    that row r of the joint batch holds first the columns of iterator 0, then those of iterator 1, and so on.
    """

    def __init__(self, inner: Sequence[BatchIterator], columns: Sequence[int], leaves: Mapping[str, Any]):
        self._inner, self._columns, self._leaves = tuple(inner), tuple(columns), tuple(leaves)

    def __iter__(self) -> MixedFeed:
        return self

    def __next__(self) -> dict[str, Any]:
        parts = [next(iterator) for iterator in self._inner]
        batch = {f"latents_{index}": part["latents"] for index, part in enumerate(parts)}
        for name in self._leaves:
            if name not in batch:
                dealt = [
                    part[name].reshape(-1, count, *part[name].shape[1:])
                    for part, count in zip(parts, self._columns, strict=True)
                ]
                joint = np.concatenate(dealt, axis=1)
                batch[name] = joint.reshape(-1, *joint.shape[2:])
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where every stream stands, JSON-able."""
        return {"parts": [iterator.get_state() for iterator in self._inner]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved position; refused when it was saved under other settings."""
        for iterator, part in zip(self._inner, state["parts"], strict=True):
            iterator.set_state(part)
