"""Random access to folders of ``nd-jax data precompute``: latents for training, text features for distillation."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from nd_jax.checked_files import read_json, shown
from nd_jax.data.latent_shards import (
    CLIPS,
    DTYPES,
    EMPTY,
    HEAD_LIMIT,
    INFO,
    PLAN,
    PROMPTS,
    REMEDY,
    Example,
    Shard,
    read_plan,
    read_shard,
    shard_name,
    unpack,
)
from nd_jax.data.latents import LatentSource
from nd_jax.data.record_chunks import record_chunks
from nd_jax.data.text_features import FeatureSource
from nd_jax.errors import UserError


def is_shards(folder: str | Path) -> bool:
    """Whether a folder was made by ``nd-jax data precompute``."""
    return (Path(folder) / PLAN).is_file()


def open_latents(
    folder: str | Path, *, dropout: float = 0.0, units: int | None = None, text: int | None = None
) -> LatentSource | ShardedLatentSource:
    """Latents of ``nd-jax data latents`` or ``nd-jax data precompute``, both by index. Raises UserError for others, and
    for the former where stored ``text`` of so many tokens is wanted as well."""
    if is_shards(folder):
        return ShardedLatentSource(folder, dropout=dropout, units=units, text=text)
    if text is not None:
        raise UserError(
            f"{folder} holds no text features; --recipe.text stored expects shards of nd-jax data precompute --teacher"
        )
    return LatentSource(folder, dropout=dropout, units=units)


def open_features(folder: str | Path) -> FeatureSource | ShardedFeatureSource:
    """Text features of ``nd-jax data features`` or ``nd-jax data precompute``. Raises UserError for others."""
    return ShardedFeatureSource(folder) if is_shards(folder) else FeatureSource(folder)


class Records:
    """The records of some kinds of shards, by index. Raises UserError unless every shard is there, whole and alike."""

    def __init__(self, folder: str | Path, kinds: tuple[str, ...]):
        self.folder = folder = Path(folder)
        plan = read_plan(folder)
        if not (folder / INFO).is_file():
            raise UserError(
                f"latents: {folder} is not finished ({INFO} is missing); run the same nd-jax data precompute again, it "
                "keeps the shards that are there"
            )
        info = read_json(folder / INFO, what="latents: description")
        self.names, self.shards = [], []
        for kind in kinds:
            for index in range(plan["shards"][kind]):
                shard = read_shard(folder, kind, index)
                if shard.records:
                    self.names.append(shard_name(kind, index))
                    self.shards.append(shard)
        self.ends = np.cumsum([shard.records for shard in self.shards], dtype=np.int64).tolist()
        told = info.get("records")
        expected = sum(told.get(kind, 0) for kind in kinds) if isinstance(told, dict) else shown(told)
        if not self.shards or self.ends[-1] != expected:
            found = self.ends[-1] if self.shards else 0
            raise UserError(f"latents: {folder} holds {found} records, {INFO} says {expected}; {REMEDY}")
        for field in ("shape", "width", "text_length", "pooled", "text_dtype", "embedded"):
            self._alike(field, kinds)
        paths = [self._check(name, shard) for name, shard in zip(self.names, self.shards, strict=True)]
        self._source = grain.sources.ArrayRecordDataSource(paths)

    def _alike(self, field: str, kinds: tuple[str, ...]) -> None:
        found: dict[Any, str] = {}
        for name, shard in zip(self.names, self.shards, strict=True):
            if field != "shape" or name.startswith(CLIPS):
                found.setdefault(getattr(shard, field), name)
        if len(found) > 1:
            told = ", ".join(f"{_told(value)} in {name}" for value, name in list(found.items())[:3])
            what = {"shape": "latents", "width": "text channels", "text_length": "text lengths"}
            what = what.get(field, "text features")
            raise UserError(f"latents: {self.folder} mixes {what}: {told}; expected one, keep each in its own folder")

    def _check(self, name: str, shard: Shard) -> str:
        path = self.folder / f"{name}.array_record"
        tokens = 0 if shard.width is None else shard.captions * shard.text_length * shard.width
        tokens += shard.captions * (shard.pooled or 0)
        limit = HEAD_LIMIT + 4 + 2 * int(np.prod(shard.shape or (0,))) + DTYPES[shard.text_dtype].itemsize * tokens
        try:
            chunks = record_chunks(path)
        except ValueError as error:
            raise UserError(f"latents: {path} is damaged ({error}); {REMEDY}") from None
        count = sum(chunk.records for chunk in chunks)
        if count != shard.records:
            raise UserError(f"latents: {path} holds {count} records, expected {shard.records}; {REMEDY}")
        if any(chunk.size > limit * chunk.records for chunk in chunks):
            raise UserError(f"latents: {path}: a record unpacks to more than {limit} bytes; {REMEDY}")
        return str(path)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:
        number = bisect.bisect_right(self.ends, index)
        shard, name = self.shards[number], self.names[number]
        where = f"latents: {self.folder / name}.array_record: record {index - self.ends[number] + shard.records}"
        try:
            record = self._source[index]
        except Exception as error:  # what ArrayRecord raises for damage
            raise UserError(f"{where} is damaged ({shown(str(error), 200)}); {REMEDY}") from error
        return unpack(record, shard, where)

    @property
    def variants(self) -> int:
        """Most captions of one record; those that have fewer repeat theirs."""
        return max(shard.captions for shard in self.shards)


class LatentTable:
    """The latents of all clips like an array: ``shape``, ``len`` and slices of clips as float32."""

    def __init__(self, records: Records, units: int | None):
        self._records, self._units = records, units
        frames, *rest = records.shards[0].shape
        self.shape = (len(records), frames if units is None else min(units, frames), *rest)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, clips: slice) -> Float[np.ndarray, "n u h w c"]:
        rows = [self._records[index].latents[: self._units] for index in range(*clips.indices(len(self)))]
        return np.asarray(rows, np.float32).reshape(-1, *self.shape[1:])


class ShardedLatentSource:
    """``LatentSource`` of a folder of shards: the same examples, dropout and attributes, float32.

    With ``text`` tokens, examples also have what is stored of their captions: ``text`` float32 [S, D], zero at padding,
    ``t5_mask`` int32 [S] and ``pooled`` float32 [P]. Raises UserError for shards without that.
    """

    def __init__(self, folder: str | Path, *, dropout: float = 0.0, units: int | None = None, text: int | None = None):
        if not 0 <= dropout < 1:
            raise UserError(f"latents: caption dropout {dropout}, expected at least 0 and below 1")
        self.folder, self.dropout, self._records = Path(folder), dropout, Records(folder, (CLIPS,))
        self.latents = LatentTable(self._records, units)
        self.variants = self._records.variants
        self._tokens = text
        if text is not None:
            self._check_text(text)

    def _check_text(self, tokens: int) -> None:
        shard = self.text
        if shard.pooled is None or not read_plan(self.folder)["shards"][EMPTY]:
            raise UserError(
                f"{self.folder} holds no text features to train denoisers on; precompute it again with --teacher "
                "SYSTEM that has all three text encoders, or leave --recipe.text live"
            )
        if shard.text_length < tokens:
            raise UserError(
                f"{self.folder} holds text of {shard.text_length} tokens, this run reads {tokens}; precompute it again "
                "with a system that reads as many, or leave --recipe.text live"
            )

    @property
    def text(self) -> Shard:
        """What the shards say of their text features; all say the same."""
        return self._records.shards[0]

    @property
    def first(self) -> Example:
        """The first clip."""
        return self._records[0]

    @cached_property
    def empty(self) -> Example:
        """The empty prompt with its features."""
        return Records(self.folder, (EMPTY,))[0]

    def features(self, example: Example, variant: int) -> dict[str, np.ndarray]:
        """What is stored of one of an example's captions."""
        count = len(example.ids[variant])
        if count > self._tokens:
            raise UserError(
                f"{self.folder}: a caption of {example.name or 'the empty prompt'} has {count} tokens, this run reads "
                f"{self._tokens}; use a preset that reads more, or leave --recipe.text live"
            )
        text, mask = np.zeros((self._tokens, self.text.width), np.float32), np.zeros(self._tokens, np.int32)
        text[:count], mask[:count] = example.features[variant], 1
        return {"text": text, "t5_mask": mask, "pooled": np.array(example.pooled[variant], np.float32)}

    @property
    def captions(self) -> Iterator[list[str]]:
        """Those of every clip, read one by one."""
        return (list(self._records[index].captions) for index in range(len(self._records)))

    def __len__(self) -> int:
        return len(self.latents) * self.variants

    def __getitem__(self, index: int) -> dict[str, Any]:
        variant, clip = divmod(int(index), len(self.latents))
        # The golden ratio's multiples are spread evenly over [0, 1): any stretch of examples has its share.
        dropped = (index * 0.6180339887498949) % 1 < self.dropout
        example = self._records[clip]
        latents = np.array(example.latents[: self.latents.shape[1]], np.float32)
        variant %= len(example.captions)
        found = {"latents": latents, "caption": "" if dropped else example.captions[variant]}
        if self._tokens is not None:
            found |= self.features(self.empty, 0) if dropped else self.features(example, variant)
        return found


class ShardedFeatureSource:
    """``FeatureSource`` of a folder of shards: the features of every caption, then of the prompts without clips."""

    def __init__(self, folder: str | Path):
        self.folder, self._records = Path(folder), Records(folder, (CLIPS, PROMPTS))
        first = self._records.shards[0]
        if first.width is None:
            raise UserError(f"text features: {folder} holds latents alone; precompute it with --teacher SYSTEM")
        self.width, self.text_length, self.embedded = first.width, first.text_length, first.embedded

    @cached_property
    def variants(self) -> int:
        """Captions of a record."""
        return self._records.variants

    def __len__(self) -> int:
        return len(self._records) * self.variants

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"text features: prompt {index} of {len(self)}")
        variant, number = divmod(index, len(self._records))
        example = self._records[number]
        variant %= len(example.captions)
        count = len(example.ids[variant])
        ids, mask = np.zeros((2, self.text_length), np.int32)
        target = np.zeros((self.text_length, self.width), np.float32)
        ids[:count], mask[:count], target[:count] = example.ids[variant], 1, example.features[variant]
        return {"t5_ids": ids, "t5_mask": mask, "target": target}


def _told(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
