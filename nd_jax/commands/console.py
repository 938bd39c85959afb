"""What the verbs share: where they talk to people, and checks of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from nd_jax.errors import UserError

console = Console(stderr=True)
"""For people: standard error, so that standard output holds results only."""
SHOWN = 5
"""Skipped clips or lines that are told of; a dataset's folder lists them all."""


def warn(line: str) -> None:
    """A warning on standard error."""
    console.print(f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """A line of progress on standard error."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def tell_skipped(skipped: Sequence[Any], what: str, listed: Path) -> None:
    """How many ``Skipped`` there are, where all of them are listed, and the first few with reasons."""
    from nd_jax.data.captions_file import clean

    if skipped:
        warn(f"{len(skipped)} {what} were skipped; all are in {listed}")
    for each in skipped[:SHOWN]:
        say(f"  {clean(each.file)}: {clean(each.reason)}")


def check_at_least(least: int, **options: int) -> None:
    """Raises UserError naming the first option that is smaller."""
    for name, value in options.items():
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, nothing elsewhere. Yields what takes (done, total), and a new title if there is one."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, total, now=title: bar.update(task, completed=done, total=total, description=now)
