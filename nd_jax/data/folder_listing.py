"""Which video files a folder holds, and a digest by which a change is noticed without opening them."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from nd_jax.data.captions_file import Skipped
from nd_jax.data.clips import FORMATS
from nd_jax.errors import UserError


def scan(folder: Path) -> tuple[list[str], list[Skipped]]:
    """Names of all video files, sorted, relative to the folder, with ``/``; and those that are passed over.

    Hidden files are no part of it. Links are never followed. Raises UserError for what is not a folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder, expected one with video files")
    names, skipped = [], []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        plain = "".join("?" if unicodedata.category(c) in ("Cc", "Cs") else c for c in name)
        if path.is_symlink():
            if path.suffix.lower() in FORMATS or path.is_dir():
                skipped.append(Skipped(plain, "is a link, expected a file: copy it into the folder"))
        elif path.suffix.lower() in FORMATS:
            if plain == name:
                names.append(name)
            else:
                skipped.append(Skipped(plain, "its name has control characters or is not UTF-8: rename it"))
    return sorted(names), skipped


def listing_of(folder: Path, captions: Path | None) -> str:
    """Digest of the names, sizes and times of last change of the videos, text files and captions file of a folder."""
    wanted = {*FORMATS, ".txt"}
    paths = sorted(path for path in _walk(folder) if path.suffix.lower() in wanted)
    rows = [[path.relative_to(folder).as_posix(), *stamp(path)] for path in paths]
    rows += [["captions", *stamp(captions)]] if captions is not None else []
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of last change in nanoseconds; zeros for a file that is not there."""
    try:
        about = path.stat()
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


def _walk(folder: Path) -> Iterator[Path]:
    """Files, and links to anything, that are not hidden."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        yield from (Path(place) / name for name in (*links, *files) if not name.startswith("."))
