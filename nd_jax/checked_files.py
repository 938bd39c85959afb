"""Files that somebody else wrote: opened only if regular, sized and spelled as expected, never followed elsewhere."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from nd_jax.errors import UserError

CONFIG_LIMIT = 1 << 20


def shown(text: object, limit: int = 120) -> str:
    """Foreign text for a message: quoted, control characters escaped, cut to ``limit`` characters."""
    text = ascii(text)
    return text if len(text) <= limit else text[: limit - 4] + "...'"


def regular_file(path: Path, what: str = "file", *, follow: bool = False) -> int:
    """Size in bytes of a regular file.

    Args:
        path: the file.
        what: how messages call it.
        follow: allow a symbolic link; for paths that the user named, never for names read from a file.

    Raises:
        UserError: if it is missing, a link, or anything but a regular file.
    """
    try:
        status = path.stat() if follow else path.lstat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {path} cannot be opened ({reason}); check the path, or download it again") from None
    if stat.S_ISLNK(status.st_mode):
        raise UserError(
            f"{what} {path} is a symbolic link; expected a regular file inside the folder: "
            "copy the folder with `cp -rL`, or download it with `hf download --local-dir`"
        )
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{what} {path} is not a regular file")
    return status.st_size


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(key)} appears twice")
            seen.add(key)
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """One JSON object in UTF-8 without repeated keys, NaN or infinities.

    Raises:
        UserError: for anything else; ``where`` names the file.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{where} is not valid JSON ({reason}); the file is damaged or not what its name says"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a JSON {type(value).__name__}; expected an object")
    return value


def read_bytes(path: Path, limit: int, what: str = "file") -> bytes:
    """Content of a small regular file, never through a link.

    Raises:
        UserError: if it is not a regular file or larger than ``limit`` bytes.
    """
    size = regular_file(path, what)
    if size > limit:
        raise UserError(f"{what} {path} has {size} bytes; expected at most {limit}")
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{what} {path} grew past {limit} bytes while it was read")
    return data


def read_json(path: Path, limit: int = CONFIG_LIMIT, what: str = "file") -> dict[str, Any]:
    """A JSON object from a small regular file; see ``read_bytes`` and ``parse_json``."""
    return parse_json(read_bytes(path, limit, what), str(path))
