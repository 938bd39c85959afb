"""Prompts in text files: one a line, or JSON lines with a key ``prompt`` or ``caption``. Nothing in them is trusted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nd_jax.checked_files import regular_file
from nd_jax.data.captions_file import MAX_PROBLEMS, check_caption, numbered_lines
from nd_jax.errors import UserError

MAX_BYTES = 4 << 30  # of one file
KEYS = ("prompt", "caption")

Problem = Callable[[str, str], None]
"""Told of a line that cannot be used: ``NAME:LINE`` and the reason."""


@dataclass(frozen=True)
class PromptFile:
    """A .txt file (one prompt a line; empty lines count for nothing) or a .jsonl file, read line by line.

    Raises UserError for another kind of file, one that is not regular, and one of more than 4 GiB.
    """

    path: Path

    def __post_init__(self):
        if self.path.suffix.lower() not in (".txt", ".jsonl"):
            raise UserError(f"prompts: {self.path} ends in {self.path.suffix!r}, expected .txt or .jsonl")
        size = regular_file(self.path, "prompts: file", follow=True)
        if size > MAX_BYTES:
            raise UserError(f"prompts: {self.path} has {size} bytes, expected at most {MAX_BYTES}: split it")

    @property
    def name(self) -> str:
        """What its prompts are said to come from."""
        return self.path.name

    def digest(self) -> str:
        """SHA-256 of its content."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def prompts(self, problem: Problem) -> Iterator[str]:
        """Every usable prompt, cleaned. Raises UserError when over 10 000 lines are not usable."""
        count = 0

        def tell(line: int, reason: str) -> None:
            nonlocal count
            count += 1
            problem(f"{self.path.name}:{line}", reason)
            if count > MAX_PROBLEMS:
                raise UserError(f"prompts: {self.path} has over {MAX_PROBLEMS} unusable lines; the last: {reason}")

        is_json = self.path.suffix.lower() == ".jsonl"
        with self.path.open("rb") as file:
            for number, line in numbered_lines(file, tell):
                if not line.strip():
                    continue
                try:
                    yield check_caption(_prompt_of(line) if is_json else line)
                except UserError as error:
                    tell(number, str(error))


def _prompt_of(line: str) -> object:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {getattr(error, 'msg', 'cannot be read')}") from None
    found = [row[key] for key in KEYS if key in row] if isinstance(row, dict) else []
    if len(found) != 1:
        raise UserError('expected {"prompt": ...} or {"caption": ...}')
    return found[0]
