"""What the verbs share: where they talk to people, and checks of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from nd_jax.errors import UserError

console = Console(stderr=True)
"""For people: standard error, so that standard output holds results only."""


def warn(line: str) -> None:
    """A warning on standard error."""
    console.print(f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def say(line: str) -> None:
    """A line of progress on standard error."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


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
