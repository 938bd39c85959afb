"""What a prepared TFDS dataset says of itself, checked before TFDS or anything else believes it.

``dataset_info.json`` says which files there are and how many records each has; ``features.json`` says what is in a
record. TFDS would follow any path in the first and import any class named in the second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nd_jax.checked_files import read_json, shown
from nd_jax.errors import UserError

INFO, FEATURES = "dataset_info.json", "features.json"
LIMIT = 1 << 24
"""Bytes of either file."""
FORMAT = "array_record"
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
"""How TFDS names its files; none other is followed, so that they stay in the folder."""
REMEDY = "copy the dataset again, or prepare it again"


def check_info(folder: Path, *, name: str, config: str | None, version: str) -> None:
    """Raises UserError unless dataset_info.json describes array_record files of this dataset, in this folder."""
    path = folder / INFO
    info = read_json(path, LIMIT, what="data: dataset description")
    wanted = {"name": name, "configName": config or None, "version": version, "fileFormat": FORMAT}
    for key, value in wanted.items():
        if info.get(key) != value:
            raise UserError(f"data: {path}: {key} is {shown(info.get(key))}, expected {value!r}; {REMEDY}")
    splits = info.get("splits")
    if not isinstance(splits, list) or not splits:
        raise UserError(f"data: {path}: splits is {shown(splits)}, expected a list of splits; {REMEDY}")
    for split in splits:
        wrong = _wrong_in_split(split)
        if wrong is not None:
            raise UserError(f"data: {path}: a split has {wrong}; {REMEDY}")
    names = [split["name"] for split in splits]
    if len(set(names)) < len(names):
        raise UserError(f"data: {path}: splits {', '.join(names)}, expected each of them once; {REMEDY}")


def _wrong_in_split(split: Any) -> str | None:
    if not isinstance(split, dict):
        return f"{shown(split)}, expected an object"
    if not re.fullmatch(r"\w+", str(split.get("name", ""))):
        return f"the name {shown(split.get('name'))}, expected letters and digits"
    if split.get("filepathTemplate", TEMPLATE) != TEMPLATE:
        return f"files named {shown(split['filepathTemplate'])}, expected {TEMPLATE}"
    lengths = split.get("shardLengths")
    if not isinstance(lengths, list) or not lengths:
        return f"shardLengths {shown(lengths)}, expected a number for each of its files"
    for number in (*lengths, split.get("numBytes", 0)):
        if not re.fullmatch(r"[0-9]{1,15}", str(number)) or isinstance(number, bool):
            return f"the number {shown(number)}, expected digits"
    return None


def check_features(folder: Path, expected: Mapping[str, Any]) -> None:
    """Raises UserError naming the first feature whose kind, type, shape or encoding is not the expected one.

    ``expected`` are the features that the code reads, as TFDS puts them into JSON. No class is imported.
    """
    path = folder / FEATURES
    content = read_json(path, LIMIT, what="data: feature description")
    content = content.get("featuresDict")
    members = content.get("features") if isinstance(content, dict) else None
    if not isinstance(members, dict):
        raise UserError(f"data: {path} holds no features, expected {', '.join(expected)}; {REMEDY}")
    try:
        found, wanted = ({name: _told(each) for name, each in part.items()} for part in (members, expected))
    except RecursionError:
        raise UserError(f"data: {path} is nested too deeply, expected a list of features; {REMEDY}") from None
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"data: {path}: feature {shown(name)} is {found.get(name, 'missing')}, "
                f"expected {wanted.get(name, 'no such feature')}; {REMEDY}"
            )


def _told(feature: Any) -> str:
    """A feature in words: ``Tensor dtype=uint8 encoding=zlib dimensions=33x64x64x3``."""
    if not isinstance(feature, dict):
        return shown(feature)
    kind = str(feature.get("pythonClassName", "unknown")).rsplit(".", 1)[-1]
    words = " ".join([kind, *_leaves(feature)])
    return words if re.fullmatch(r"[\w=. -]{1,200}", words) else shown(words, 200)


def _leaves(value: dict[str, Any]) -> list[str]:
    found = []
    for name in sorted(value.keys() - {"pythonClassName", "description"}):
        if isinstance(value[name], dict):
            inner = value[name]
            found += [_told(inner)] if "pythonClassName" in inner else _leaves(inner)
        else:
            items = value[name] if isinstance(value[name], list) else [value[name]]
            found.append(f"{name}={'x'.join(map(str, items))}")
    return found
