"""Grain pipelines: from a random-access source of examples to an endless, resumable stream of numpy batches.

Every batch is a pure function of (source, seed, its number, process index and count, batch size). The iterator's state
is small JSON and names all of these and the worker count, so that resuming under other settings is refused instead of
silently giving another order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from nd_jax.data.tokenizers import TextTokenizer
from nd_jax.data.workers import stay_with_parent
from nd_jax.errors import UserError

Batch = dict[str, Any]


class BatchIterator(grain.DatasetIterator):
    """Endless iterator over batches. Save it with ``grain.checkpoint.CheckpointSave(iterator)``; close it when done."""

    def __init__(self, inner: grain.DatasetIterator, pins: Mapping[str, int]):
        super().__init__(inner)
        self._inner = inner
        self.pins = dict(pins)

    def __next__(self) -> Batch:
        """The next batch. Errors of the source come through as they are, from worker processes too."""
        try:
            return next(self._inner)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise UserError(
                f"data: a process that reads data has died ({error}); expected it to live as long as the training: it "
                "may have run out of memory, try fewer workers or none"
            ) from error

    def get_state(self) -> dict[str, Any]:
        """JSON-able: the position, and what it depends on."""
        return {"position": self._inner.get_state(), "pins": self.pins}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a saved position. Raises UserError when the state was saved under other settings."""
        saved = state.get("pins", {})
        for name, value in self.pins.items():
            if saved.get(name) != value:
                raise UserError(
                    f"data: the checkpoint was saved with {name} = {saved.get(name)}, now it is {value}: "
                    "the order of batches would change, use the saved value"
                )
        self._inner.set_state(state["position"])


def batches(
    source,
    batch_size: int,
    *,
    seed: int = 0,
    tokenizers: Mapping[str, TextTokenizer] | None = None,
    keys: Sequence[str] = ("video", "labels"),
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    shuffle: bool = True,
) -> BatchIterator:
    """Endless batches of this process's share of a source (`ShapesSource`, a TFDS data source, `ClipSource`, a list).

    Each batch is a dict: every name in ``keys`` that the examples have, stacked as a numpy array (``video`` uint8
    [B, T, H, W, 3], ``labels`` int32 [B, objects, 5]); ``caption``, a list of strings, if the examples have one; and
    for every tokenizer ``NAME_ids`` and ``NAME_mask``, int32 [B, length].
    ``batch_size`` counts this process's examples. Each epoch is shuffled anew and its remainder over the processes
    is left out, so all processes take the same number of steps; batches may span two epochs.
    ``workers`` > 0 draws or decodes in that many child processes (guard the main module; close the iterator).
    Raises UserError for sizes that leave a process without examples.
    """
    count = len(source)
    if batch_size < 1 or not 0 <= process_index < process_count or workers < 0:
        raise UserError(
            f"data: batch size {batch_size}, process {process_index} of {process_count}, {workers} workers, expected a "
            "batch size of at least 1, a process index below the count and no negative worker count"
        )
    if count < process_count:
        raise UserError(f"data: {count} examples for {process_count} processes, expected at least one for each")
    dataset = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset[process_index : count - count % process_count : process_count].repeat()
    collate = functools.partial(_collate, keys=tuple(keys), tokenizers=dict(tokenizers or {}))
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=collate)
    # elements are whole batches here: a deep buffer would hold gigabytes
    stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        _mark_flags_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        stream = stream.mp_prefetch(options, worker_init_fn=stay_with_parent)
    pins = {
        "examples": count,
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": int(shuffle),
        "process_index": process_index,
        "process_count": process_count,
        "workers": workers,
    }
    return BatchIterator(iter(stream), pins)


def _collate(
    examples: Sequence[Mapping[str, Any]], keys: tuple[str, ...], tokenizers: Mapping[str, TextTokenizer]
) -> Batch:
    batch: Batch = {key: np.stack([example[key] for example in examples]) for key in keys if key in examples[0]}
    if "caption" in examples[0]:
        captions = [example["caption"] for example in examples]
        captions = [text.decode() if isinstance(text, bytes) else str(text) for text in captions]
        batch["caption"] = captions
        for name, tokenizer in tokenizers.items():
            batch[f"{name}_ids"], batch[f"{name}_mask"], _ = tokenizer(captions)
    elif tokenizers:
        raise UserError("data: these examples have no captions, expected none to tokenize: leave the tokenizers out")
    return batch


def _mark_flags_parsed() -> None:
    """Grain's workers read absl flags, which only absl's own main function parses."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
