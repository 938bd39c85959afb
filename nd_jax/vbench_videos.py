"""The folder of videos that VBench's runner expects: five of every prompt, named after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nd_jax.checked_files import read_bytes, shown
from nd_jax.data.evaluation_prompts import prompt_hash
from nd_jax.data.video_out import file_name
from nd_jax.errors import UserError
from nd_jax.outputs import new_file

SAMPLES = 5
NAME_LIMIT = 200
"""Bytes of a file name."""
INFO_LIMIT = 64 << 20
INDEX = "videos.json"


@dataclass(frozen=True)
class Wanted:
    """A video to make. ``sample`` names its noise: prompt and number alone decide it, whoever makes it and when."""

    prompt: str
    number: int
    file: str

    @property
    def sample(self) -> str:
        return f"{prompt_hash(self.prompt)}-{self.number}"

    @property
    def official(self) -> bool:
        """Whether the runner finds it."""
        return self.file == f"{self.prompt}-{self.number}.mp4"


def video_name(prompt: str, number: int) -> str:
    """``PROMPT-NUMBER.mp4``, which the runner looks for, or something harmless where that is no safe file name."""
    name = f"{prompt}-{number}.mp4"
    safe = prompt and prompt == prompt.strip() and prompt.isprintable() and not set(prompt) & set('/\\:*?"<>|')
    if safe and not prompt.startswith((".", "-", "~")) and len(name.encode()) <= NAME_LIMIT:
        return name
    return f"{file_name(prompt, limit=100)}-{prompt_hash(prompt)}-{number}.mp4"


def read_prompts(info: Path) -> list[str]:
    """The prompts of VBench's VBench_full_info.json (a list of objects with ``prompt_en``), each once.

    Raises UserError for anything else.
    """
    try:
        content = json.loads(read_bytes(info, INFO_LIMIT, "VBench info"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{info} is not JSON ({error}); expected VBench_full_info.json") from None
    if not isinstance(content, list) or not content:
        raise UserError(f"{info} is not VBench's list of prompts; expected VBench_full_info.json")
    prompts: dict[str, None] = {}
    for entry in content:
        prompt = entry.get("prompt_en") if isinstance(entry, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f"{info}: {shown(entry)} has no prompt_en; expected VBench_full_info.json")
        prompts[prompt] = None
    return list(prompts)


def wanted_videos(prompts: Sequence[str], samples: int = SAMPLES) -> list[Wanted]:
    """Every video of the folder, a prompt's next to each other.

    Raises UserError for two videos of one name, also where case does not count.
    """
    found = [Wanted(prompt, n, video_name(prompt, n)) for prompt in prompts for n in range(samples)]
    names: dict[str, str] = {}
    for each in found:
        other = names.setdefault(each.file.casefold(), each.prompt)
        if other != each.prompt:
            raise UserError(f"prompts {shown(other)} and {shown(each.prompt)} would have one file, {shown(each.file)}")
    return found


def parse_share(text: str) -> tuple[int, int]:
    """``K/N``: the K-th of N shares, counted from 1. Raises UserError."""
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise UserError(f"share {text!r}: expected K/N with K from 1 to N, such as 1/4")


def missing_videos(folder: Path, wanted: Sequence[Wanted], share: tuple[int, int] = (1, 1)) -> list[Wanted]:
    """Those of one process's share that are not there yet. Files appear only when they are complete."""
    number, count = share
    return [each for each in wanted[number - 1 :: count] if not (folder / each.file).is_file()]


def write_index(folder: Path, wanted: Sequence[Wanted]) -> None:
    """``videos.json``: file name -> prompt, the same from every process."""
    with new_file(folder / INDEX, overwrite=True) as part:
        part.write_text(json.dumps({each.file: each.prompt for each in wanted}, indent=1, ensure_ascii=False) + "\n")
