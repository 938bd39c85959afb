"""Prompt corpora: prepare one from files and packages, then read its splits by index.

``dataset.json`` in its folder says what was prepared:

    kind: "prompts"; config: of the TFDS builder; counts: prompts in each split; held_out: their share;
    sources: names and digests; refused, duplicates, skipped: how many prompts were left out, and why.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from nd_jax.checked_files import read_json
from nd_jax.data.captions_file import Skipped
from nd_jax.data.checked_records import CheckedSource, checked_source, open_builder
from nd_jax.data.evaluation_prompts import HASHES, prompt_hash
from nd_jax.data.prompt_files import Problem
from nd_jax.data.prompts.prompts_dataset_builder import Builder, PromptsConfig
from nd_jax.errors import UserError
from nd_jax.outputs import new_file

__all__ = ["KIND", "SPLITS", "Builder", "Corpus", "PromptsConfig", "open_split", "prepare"]

KIND, RECORD, SPLITS = "prompts", "dataset.json", ("train", "held_out")
PARTS = 10_000
"""Of this many parts of the space of hashes, a share goes to the held-out split."""


class Corpus(Protocol):
    """Where prompts come from; ``PromptFile`` and ``PackagePrompts`` are such."""

    name: str

    def digest(self) -> str:
        """Changes whenever its prompts do."""
        ...

    def prompts(self, problem: Problem) -> Iterator[str]:
        """Every prompt, the same each time."""
        ...


def prepare(
    corpora: Sequence[Corpus], folder: str | Path, *, held_out: float = 0.01
) -> tuple[dict[str, Any], list[Skipped]]:
    """Write the corpora's prompts into ``folder``; returns what dataset.json says, and what could not be read.

    Prompts that evaluation uses are left out, and those whose words came before. The split follows from the words, so
    that one prompt never is in both, whichever corpora it is in. An interrupted run leaves nothing under the final
    name. Raises UserError when no prompts are left to train on.
    """
    if not 0 <= held_out < 1:
        raise UserError(f"prompts: a share of {held_out} held out, expected at least 0 and below 1")
    counts, skipped = dict.fromkeys((*SPLITS, "refused", "duplicates"), 0), []
    for kind, _ in _sorted(corpora, held_out, lambda where, reason: skipped.append(Skipped(where, reason))):
        counts[kind] += 1
    if not counts["train"]:
        told = f"{counts['refused']} are for evaluation only, {counts['held_out']} held out, {len(skipped)} unusable"
        raise UserError(f"prompts: none are left to train on ({told}); expected some in the files or packages")
    sources = [{"name": corpus.name, "digest": corpus.digest()} for corpus in corpora]
    name = hashlib.sha256(json.dumps([sources, held_out, sorted(HASHES)]).encode()).hexdigest()[:16]
    present = {split: partial(_examples, corpora, held_out, split) for split in SPLITS if counts[split]}
    Builder(config=PromptsConfig(name=name, splits=present), data_dir=str(folder)).download_and_prepare()
    record = {
        "kind": KIND,
        "config": name,
        "counts": {split: counts.pop(split) for split in SPLITS},
        "held_out": held_out,
        "sources": sources,
        **counts,
        "skipped": len(skipped),
    }
    with new_file(Path(folder) / RECORD, overwrite=True) as part:
        part.write_text(json.dumps(record, indent=2))
    return record, skipped


def _examples(corpora: Sequence[Corpus], held_out: float, split: str) -> Iterator[dict[str, str]]:
    return (example for kind, example in _sorted(corpora, held_out, lambda where, reason: None) if kind == split)


def _sorted(corpora: Sequence[Corpus], held_out: float, problem: Problem) -> Iterator[tuple[str, dict[str, str]]]:
    """Every prompt with its split, or with "refused" or "duplicates"."""
    seen: set[int] = set()
    for corpus in corpora:
        for prompt in corpus.prompts(problem):
            digest = prompt_hash(prompt)
            number = int(digest, 16)
            if digest in HASHES:
                kind = "refused"
            elif number in seen:
                kind = "duplicates"
            else:
                kind = "held_out" if number % PARTS < held_out * PARTS else "train"
            seen.add(number)
            yield kind, {"caption": prompt, "source": corpus.name}


def open_split(folder: str | Path, split: str = "train") -> CheckedSource:
    """A split of a prepared corpus, once it was found whole: ``source[i]`` has ``caption`` and ``source``, as bytes.

    Raises UserError for another kind of folder, a split without prompts, and naming what is missing or damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise UserError(f"{folder} holds no prompts ({RECORD} is missing); make them with nd-jax data prompts")
    record = read_json(path, what="dataset record")
    if record.get("kind") != KIND:
        raise UserError(f"{folder} holds another dataset than prompts; make one with nd-jax data prompts")
    name, counts = record.get("config"), record.get("counts")
    if not re.fullmatch(r"[0-9a-f]{16}", str(name)) or not isinstance(counts, dict):
        raise UserError(f"{path} is damaged; expected what nd-jax data prompts wrote; make the dataset again")
    if not counts.get(split):
        raise UserError(f"{folder}: no {split} prompts in this dataset; expected some, see its {RECORD}")
    source = checked_source(open_builder(Builder, folder, PromptsConfig(name=name)), split)
    if len(source) != counts[split]:
        told = f"{len(source)} {split} prompts, {RECORD} says {counts[split]}"
        raise UserError(f"data: {folder} holds {told}; make it again with nd-jax data prompts")
    return source
