"""Shards of precomputed examples: latents in bfloat16 and text features, many ArrayRecord files in one folder.

``shards.json`` says what the folder was begun for: a digest of all settings and how many shards of each kind there are
to be. A shard is ``KIND-NNNNN.array_record`` and, written after it, ``KIND-NNNNN.json`` with counts, shapes and skipped
clips; what has both is finished. ``info.json`` closes the folder. Kinds: ``clips`` (latents with their captions and the
captions' features), ``prompts`` (features alone) and ``empty`` (those of the empty prompt, for guidance).

A record: the length of its head (4 bytes, little endian), the head (JSON: ``name``, ``start`` in seconds, ``captions``
and ``ids``, every caption's valid tokens), the latents [U, h, w, C] and, caption after caption, features [tokens, D],
then pooled vectors [P].
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from nd_jax.checked_files import parse_json, read_json, regular_file, shown
from nd_jax.data.captions_file import Skipped
from nd_jax.errors import UserError
from nd_jax.outputs import new_file

PLAN, INFO = "shards.json", "info.json"
CLIPS, PROMPTS, EMPTY = "clips", "prompts", "empty"
KINDS = (CLIPS, PROMPTS, EMPTY)
HEAD_LIMIT = 1 << 22
"""Bytes of a record's head."""
SIDECAR_LIMIT = 1 << 26
"""Bytes of a shard's description."""
REMEDY = "run nd-jax data precompute again, or copy the folder again"
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bfloat16": BF16, "float32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Example:
    """One record. ``latents`` is None for prompts alone; ``ids`` and ``features`` are empty without text."""

    name: str
    captions: tuple[str, ...]
    latents: Float[np.ndarray, "u h w c"] | None = None
    start: float = 0.0
    ids: tuple[tuple[int, ...], ...] = ()
    features: tuple[Float[np.ndarray, "tokens d"], ...] = ()
    pooled: tuple[Float[np.ndarray, " p"], ...] = ()


@dataclass(frozen=True)
class Shard:
    """What a finished shard holds."""

    records: int
    bytes: int
    """Of its ArrayRecord file."""
    captions: int = 1
    """Most captions of one record."""
    shape: tuple[int, ...] | None = None
    """Of latents."""
    width: int | None = None
    """Channels of the features."""
    text_length: int | None = None
    """Tokens that prompts are cut or padded to."""
    pooled: int | None = None
    """Channels of the pooled vectors."""
    text_dtype: str = "bfloat16"
    embedded: bool = False
    """Features are behind a context embedder of the denoiser."""
    clips: int = 0
    held_out: int = 0
    skipped: tuple[Skipped, ...] = field(default=())


def pack(example: Example, text_dtype: str = "bfloat16") -> bytes:
    """The record. Raises UserError for numbers that are not finite in bfloat16."""
    arrays = [] if example.latents is None else [(example.latents, BF16)]
    arrays += [(array, DTYPES[text_dtype]) for array in (*example.features, *example.pooled)]
    with np.errstate(over="ignore"):
        low = [np.ascontiguousarray(array, dtype) for array, dtype in arrays]
    if not all(np.isfinite(array.astype(np.float32)).all() for array in low):
        raise UserError("its latents or text features are not finite in bfloat16: look at the codec")
    head = {"name": example.name, "start": example.start, "captions": example.captions, "ids": example.ids}
    text = json.dumps(head).encode()
    return len(text).to_bytes(4, "little") + text + b"".join(array.tobytes() for array in low)


def unpack(record: bytes, shard: Shard, where: str) -> Example:
    """The example in a record of ``shard``. Raises UserError, beginning with ``where``, for anything but that."""
    size = int.from_bytes(record[:4], "little")
    if not 2 <= size <= min(HEAD_LIMIT, len(record) - 4):
        raise UserError(f"{where} is damaged (a head of {size} bytes); {REMEDY}")
    head = parse_json(record[4 : 4 + size], where)
    captions, ids = head.get("captions"), head.get("ids")
    sound = isinstance(captions, list) and captions and all(isinstance(text, str) for text in captions)
    sound = sound and isinstance(ids, list) and len(ids) in ((0,) if shard.width is None else (len(captions),))
    sound = sound and all(isinstance(row, list) and len(row) <= (shard.text_length or 0) for row in ids)
    sound = sound and all(type(n) is int and 0 <= n < 1 << 31 for row in ids for n in row)
    if not sound or not isinstance(head.get("name"), str) or not isinstance(head.get("start"), int | float):
        raise UserError(f"{where} is damaged (its head lacks a name, captions or ids); {REMEDY}")
    dtype = DTYPES[shard.text_dtype]
    shapes = [] if shard.shape is None else [(shard.shape, BF16)]
    shapes += [((len(row), shard.width), dtype) for row in ids]
    shapes += [] if shard.pooled is None else [((shard.pooled,), dtype)] * len(ids)
    expected = 4 + size + sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
    if len(record) != expected:
        raise UserError(f"{where} has {len(record)} bytes, expected {expected}: latents of another shape; {REMEDY}")
    arrays, at = [], 4 + size
    for shape, dtype in shapes:
        arrays.append(np.frombuffer(record, dtype, math.prod(shape), at).reshape(shape))
        at += arrays[-1].nbytes
    latents = None if shard.shape is None else arrays.pop(0)
    rows, features, pooled = tuple(map(tuple, ids)), tuple(arrays[: len(ids)]), tuple(arrays[len(ids) :])
    return Example(head["name"], tuple(captions), latents, float(head["start"]), rows, features, pooled)


def shard_name(kind: str, index: int) -> str:
    """A shard's file names without their suffix."""
    return f"{kind}-{index:05d}"


def write_shard(
    folder: Path,
    kind: str,
    index: int,
    examples: Iterable[Example],
    *,
    text_length: int | None = None,
    text_dtype: str = "bfloat16",
    embedded: bool = False,
    clips: int = 0,
    held_out: int = 0,
    skipped: Sequence[Skipped] = (),
) -> Shard:
    """Write a shard whole: its records, then what says that it is finished. A second worker may do the same.

    ``skipped`` is read after ``examples`` have been drawn to their end and may grow until then.
    """
    from array_record.python import array_record_module

    name, count, most, shape, width, pooled = shard_name(kind, index), 0, 1, None, None, None
    with new_file(folder / f"{name}.array_record", overwrite=True) as part:
        writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
        for example in examples:
            writer.write(pack(example, text_dtype))
            count, most = count + 1, max(most, len(example.captions))
            shape = shape if example.latents is None else tuple(example.latents.shape)
            width = example.features[0].shape[1] if example.features else width
            pooled = len(example.pooled[0]) if example.pooled else pooled
        writer.close()
        size = os.path.getsize(part)
    length = None if width is None else text_length
    text = (width, length, pooled, text_dtype, embedded)
    shard = Shard(count, size, most, shape, *text, clips, held_out, tuple(skipped))
    with new_file(folder / f"{name}.json", overwrite=True) as part:
        part.write_text(json.dumps(dataclasses.asdict(shard)), encoding="utf-8")
    return shard


def read_shard(folder: Path, kind: str, index: int) -> Shard:
    """The description of a finished shard. Raises UserError for one that is missing, or whose file has another size."""
    path = folder / f"{shard_name(kind, index)}.json"
    content = read_json(path, SIDECAR_LIMIT, "latents: shard's description")
    try:
        counts = [content[name] for name in ("records", "bytes", "captions", "clips", "held_out")]
        # Shards of older versions have no pooled vectors and say nothing of them.
        content = {"pooled": None, "text_dtype": "bfloat16", "embedded": False} | content
        sides = [1 if content[name] is None else content[name] for name in ("width", "text_length", "pooled")]
        shape = content["shape"]
        sound = all(type(n) is int and 0 <= n < 1 << 48 for n in counts)
        sound &= all(type(n) is int and 0 < n < 1 << 24 for n in (*sides, *(shape or [])))
        sound &= (shape is None or len(shape) == 4) and (content["width"] is None) == (content["text_length"] is None)
        sound &= content["text_dtype"] in DTYPES and type(content["embedded"]) is bool
        skipped = tuple(Skipped(str(each["file"]), str(each["reason"])) for each in content["skipped"])
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"latents: {path} is damaged, expected what nd-jax data precompute wrote; {REMEDY}")
    given = {**content, "shape": None if shape is None else tuple(shape), "skipped": skipped}
    shard = Shard(**{each.name: given[each.name] for each in dataclasses.fields(Shard)})
    records = path.with_suffix(".array_record")
    size = regular_file(records, "latents: shard")
    if size != shard.bytes:
        raise UserError(f"latents: {records} has {size} bytes, expected {shard.bytes}; {REMEDY}")
    return shard


def is_finished(folder: Path, kind: str, index: int) -> bool:
    """Whether a shard is there whole and need not be made again."""
    try:
        read_shard(folder, kind, index)
    except UserError:
        return False
    return True


def read_plan(folder: Path) -> dict[str, Any]:
    """``shards.json``: ``digest`` of the settings and ``shards``, how many of each kind."""
    path = folder / PLAN
    plan = read_json(path, what="latents: description of shards")
    counts = plan.get("shards")
    if isinstance(counts, dict):  # those of older versions know no empty prompt
        plan = {**plan, "shards": (counts := {EMPTY: 0} | counts)}
    sound = isinstance(counts, dict) and counts.keys() == set(KINDS) and re.fullmatch(r"\w+", str(plan.get("digest")))
    if not sound or not all(type(n) is int and 0 <= n < 100_000 for n in counts.values()):
        raise UserError(f"latents: {path} says {shown(plan)}, expected what nd-jax data precompute wrote; {REMEDY}")
    return plan
