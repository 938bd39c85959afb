"""From data pipelines to the batches that recipes ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
