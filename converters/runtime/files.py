"""Files of a bundle: plain names inside its folder, regular, of the size and the checksum that the manifest states."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from .errors import BundleError

MANIFEST = "bundle.json"
MANIFEST_LIMIT = 64 << 20
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}")


def shown(text: object, limit: int = 100) -> str:
    """Foreign text for a message: quoted, escaped, cut."""
    text = ascii(text)
    return text if len(text) <= limit else text[: limit - 4] + "...'"


def check_name(name: object, where: str) -> str:
    """A relative path of at most three plain parts. Raises BundleError for anything that could lead elsewhere."""
    parts = name.split("/") if isinstance(name, str) else []
    if not 1 <= len(parts) <= 3 or not all(NAME.fullmatch(part) for part in parts):
        raise BundleError(f"{where}: {shown(name)} is not a file inside the bundle; expected a plain relative name")
    return name


def regular_size(folder: Path, name: str) -> int:
    """Size in bytes of a file none of whose parts below ``folder`` is a link. Raises BundleError otherwise."""
    path = folder
    for part in name.split("/"):
        path = path / part
        try:
            status = path.lstat()
        except OSError as error:
            raise BundleError(f"{path} is missing ({error.strerror}); copy the whole bundle again") from None
        if stat.S_ISLNK(status.st_mode):
            raise BundleError(f"{path} is a link; expected a regular file: copy the bundle with cp -rL")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is not a regular file")
    return status.st_size


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def check_file(folder: Path, name: str, stated: dict[str, Any]) -> Path:
    """The path of a file whose size and checksum are as stated. Raises BundleError for a damaged one."""
    size, expected = regular_size(folder, name), stated["bytes"]
    if size != expected:
        raise BundleError(f"{folder / name} has {size} bytes, the manifest says {expected}; copy the bundle again")
    if sha256(folder / name) != stated["sha256"]:
        raise BundleError(f"{folder / name} is damaged: its checksum is not the manifest's; copy the bundle again")
    return folder / name


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of ``bundle.json``, a JSON object. Raises BundleError for anything else."""
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; expected a bundle made by `nd-jax npu build`")
    if not os.path.lexists(folder / MANIFEST):
        raise BundleError(f"{folder} has no {MANIFEST}; expected a bundle made by `nd-jax npu build`")
    size = regular_size(folder, MANIFEST)
    if size > MANIFEST_LIMIT:
        raise BundleError(f"{folder / MANIFEST} has {size} bytes; expected at most {MANIFEST_LIMIT}")
    try:
        content = json.loads(
            (folder / MANIFEST).read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError, OSError) as error:
        raise BundleError(f"{folder / MANIFEST} is not valid JSON ({error}); copy the bundle again") from None
    if not isinstance(content, dict):
        raise BundleError(f"{folder / MANIFEST} holds a {type(content).__name__}; expected an object")
    return content
