"""Captions of a folder's clips: captions.jsonl, captions.csv, or a text file beside each clip.

Nothing in such a file is trusted: it names clips that were found in the folder before, and nothing is opened by a path
that it holds.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from nd_jax.errors import UserError
from nd_jax.outputs import new_file

NAMES = ("captions.jsonl", "captions.csv")
SKIPPED = "skipped.jsonl"
"""In a dataset's folder: what was left out of it, and why."""
MAX_BYTES = 256 << 20  # of a captions file
MAX_LINE = 1 << 16  # bytes; also of a text file beside a clip
MAX_CAPTION = 2000  # characters
MAX_PER_CLIP = 64
MAX_PROBLEMS = 10_000
_KEPT = "\u200c\u200d"  # joiners: they have no glyph, but Persian and emoji need them


@dataclass(frozen=True)
class Skipped:
    """What was left out: a clip by name, or a line of a captions file as ``NAME:LINE``; and why."""

    file: str
    reason: str


def write_skipped(folder: Path, skipped: Iterable[Skipped]) -> None:
    """``folder/SKIPPED``, one JSON object a line; an empty file where nothing was left out."""
    lines = [json.dumps(dataclasses.asdict(each)) + "\n" for each in skipped]
    with new_file(folder / SKIPPED, overwrite=True) as part:
        part.write_text("".join(lines), encoding="utf-8")


def clean(text: str) -> str:
    """The text on one line, composed (NFC), without control characters, lone surrogates and other non-characters."""
    plain = unicodedata.normalize("NFC", text)
    return " ".join("".join(c if c in _KEPT or unicodedata.category(c)[0] != "C" else " " for c in plain).split())


def check_caption(text: Any) -> str:
    """The cleaned caption. Raises UserError for what is not text, for an empty caption and for a long one."""
    if not isinstance(text, str):
        raise UserError(f"the caption is {json.dumps(text)[:40]}, expected text")
    text = clean(text)
    if not text:
        raise UserError("the caption is empty")
    if len(text) > MAX_CAPTION:
        raise UserError(f"the caption has {len(text)} characters, expected at most {MAX_CAPTION}")
    return text


def captions_path(folder: Path) -> Path | None:
    """The captions file of a folder, if it has one. Raises UserError when it has both kinds."""
    found = [folder / name for name in NAMES if (folder / name).exists()]
    if len(found) > 1:
        raise UserError(f"{folder} holds {' and '.join(NAMES)}; expected one of them, or name a file with --captions")
    return found[0] if found else None


def read_sidecar(path: Path) -> str:
    """The caption in a text file. Raises UserError naming the file."""
    if path.is_symlink():
        raise UserError(f"{path.name} is a link, expected a file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_LINE + 1)
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror}") from None
    if len(content) > MAX_LINE:
        raise UserError(f"{path.name} has more than {MAX_LINE} bytes")
    try:
        return check_caption(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path.name} is not UTF-8") from None
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None


def read_captions(path: Path, clips: Iterable[str]) -> tuple[dict[str, list[str]], list[Skipped]]:
    """Captions by clip, and the lines that cannot be used.

    jsonl: ``{"file": NAME, "caption": TEXT or [TEXT, ...]}`` a line; csv: a header with the columns file and caption.
    A clip may have several lines. ``clips`` are the names that exist, relative to the folder, with ``/``.
    Raises UserError for a file that cannot be read at all.
    """
    if path.suffix.lower() not in (".jsonl", ".csv"):
        raise UserError(f"captions: {path} ends in {path.suffix!r}, expected .jsonl or .csv")
    if path.is_symlink() or not path.is_file():
        raise UserError(f"captions: {path} does not exist or is not a plain file")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"captions: {path} has more than {MAX_BYTES >> 20} MiB: split the folder")
    known = {unicodedata.normalize("NFC", name): name for name in clips}
    found: dict[str, list[str]] = {}
    problems: list[Skipped] = []

    def problem(line: int, reason: str) -> None:
        problems.append(Skipped(f"{path.name}:{line}", reason))
        if len(problems) > MAX_PROBLEMS:
            raise UserError(f"captions: {path} has over {MAX_PROBLEMS} unusable lines; the first: {problems[0].reason}")

    with path.open("rb") as file:
        lines = numbered_lines(file, problem)
        rows = _csv_rows(path, lines, problem) if path.suffix.lower() == ".csv" else _json_rows(lines, problem)
        for line, named, texts in rows:
            try:
                name = _known(named, known)
                for text in texts if isinstance(texts, list) else [texts]:
                    text = check_caption(text)
                    if text in found.get(name, ()):
                        raise UserError(f"{clean(name)} has this caption already")
                    if len(found.get(name, ())) == MAX_PER_CLIP:
                        raise UserError(f"{clean(name)} has {MAX_PER_CLIP} captions already")
                    found.setdefault(name, []).append(text)
            except UserError as error:
                problem(line, str(error))
    return found, problems


def _known(named: Any, known: dict[str, str]) -> str:
    """The clip that a row names."""
    if not isinstance(named, str) or not named.strip():
        raise UserError("names no file")
    name = unicodedata.normalize("NFC", named.strip())
    path = PurePosixPath(name)
    told = clean(name)[:200]
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{told} leaves the folder, expected a name relative to it")
    if str(path) not in known:
        raise UserError(f"{told} is not a video file of this folder")
    return known[str(path)]


def numbered_lines(file: BinaryIO, problem: Any) -> Iterator[tuple[int, str]]:
    """Numbered lines that are UTF-8 and not too long; ``problem(line, reason)`` is told of the others."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE)
            problem(number, f"the line has more than {MAX_LINE} bytes")
            continue
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            problem(number, "the line is not UTF-8")


def _json_rows(lines: Iterable[tuple[int, str]], problem: Any) -> Iterator[tuple[int, Any, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem(number, f"not JSON: {getattr(error, 'msg', 'cannot be read')}")
            continue
        if not isinstance(row, dict) or not {"file", "caption"} <= row.keys():
            problem(number, 'expected {"file": ..., "caption": ...}')
            continue
        yield number, row["file"], row["caption"]


def _csv_rows(path: Path, lines: Iterable[tuple[int, str]], problem: Any) -> Iterator[tuple[int, Any, Any]]:
    at = 0

    def texts() -> Iterator[str]:
        nonlocal at
        for number, line in lines:
            at = number
            yield line

    reader, header = csv.reader(texts(), strict=True), None
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            if header is None:
                row = []
            else:
                problem(at, f"not CSV: {error}")
                continue
        if row is None and header is not None:
            return
        if header is None:
            header = [name.strip().lower() for name in row or ()]
            if not {"file", "caption"} <= set(header):
                raise UserError(f"captions: {path} has no header with the columns file and caption; expected UTF-8 CSV")
        elif len(row) != len(header) and row:
            problem(at, f"the row has {len(row)} columns, expected {len(header)}")
        elif row:
            cells = dict(zip(header, row, strict=True))
            yield at, cells["file"], cells["caption"]
