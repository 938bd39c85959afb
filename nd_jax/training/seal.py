"""A checkpoint's seal: size and checksum of each of its files, so that damage is found and named before it is read."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import jax

NAME = "seal.json"
CHUNK = 1 << 22
"""Bytes read at a time."""


def write_seal(folder: Path) -> None:
    """Seals a complete folder. One process does it for all; it reads back only what it wrote itself.

    So with several processes the seal holds sizes alone: reading everybody's files would take longer than the write.
    """
    own = jax.process_count() == 1
    files = {name: [path.stat().st_size, _checksum(path) if own else None] for name, path in _files(folder).items()}
    part = folder / f"{NAME}.part"
    part.write_text(json.dumps(files))
    os.replace(part, folder / NAME)


def check_seal(folder: Path) -> bool:
    """Whether the folder is sealed (those of older versions are not). Raises ``ValueError`` naming a damaged file."""
    if not (folder / NAME).is_file():
        return False
    try:
        listed = json.loads((folder / NAME).read_text(errors="replace"))
        sealed = {name: (int(size), checksum) for name, (size, checksum) in listed.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{NAME} is not readable") from None
    found = _files(folder)
    for name, (size, checksum) in sorted(sealed.items()):
        if name not in found:
            raise ValueError(f"{name} is missing")
        length = found[name].stat().st_size
        if length != size:
            raise ValueError(f"{name} has {length} bytes, {size} were written")
        if checksum is not None and _checksum(found[name]) != checksum:
            raise ValueError(f"{name} has other contents than were written")
    return True


def _files(folder: Path) -> dict[str, Path]:
    """The files of the folder's items by their relative names; Orbax still changes those beside the items."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob("*/**/*")) if path.is_file()}
    return {name: path for name, path in paths.items() if path.name != "commit_success.txt"}


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value
