"""Text encoders: rows of the host's tables, and a CLIP tower for one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import BundleError
from .manifest import Bundle
from .sessions import Arrays, Sessions
from .tokens import Tokenizer


def rows(bundle: Bundle, table: str, ids: np.ndarray) -> np.ndarray:
    """Rows of a host table, float32. Raises BundleError for ids it does not have: tokenizer of another model."""
    found = bundle.table(table)
    if ids.max() >= len(found):
        raise BundleError(f"id {ids.max()} of a prompt, but table {table} has {len(found)} rows: wrong tokenizer")
    return found[ids].astype(np.float32)


def run_tower(sessions: Sessions, entry: Mapping[str, Any], tokenizer: Tokenizer, prompt: str) -> Arrays:
    """What a tower's graph says of a prompt.

    Its pooled token is the largest id's place, or the first of its own end mark.
    """
    bundle, (ids, _) = sessions.bundle, tokenizer(prompt)
    places = rows(bundle, entry["positions"], np.arange(len(ids)))
    inputs = {"embeddings": rows(bundle, entry["table"], ids) + places}
    if "selector" in bundle.graph(entry["graph"])["inputs"]:
        eos = entry["eos"]
        inputs["selector"] = np.zeros((1, len(ids)), np.float32)
        inputs["selector"][0, int(np.argmax(ids)) if eos is None else int(np.argmax(ids == eos))] = 1
    return sessions.run(entry["graph"], inputs)
