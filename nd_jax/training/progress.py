"""What a person sees while training runs."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
"""Between two lines when the output is not a terminal."""


class TrainingProgress:
    """A rich progress bar on a terminal, an occasional line elsewhere, silence when not ``enabled``."""

    def __init__(self, title: str, step: int, steps: int, *, enabled: bool = True, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._title, self._steps, self._enabled = title, steps, enabled
        self._bar = None
        self._spoke = time.monotonic()
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(title, total=steps, completed=step, told="")
            self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the loss (or the first metric) and the speed."""
        if not self._enabled:
            return
        shown = [name for name in ("loss", "steps_per_second") if name in metrics] or list(metrics)[:1]
        told = "  ".join(f"{name.replace('_per_second', '/s')} {metrics[name]:.4g}" for name in shown)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, told=told)
        elif time.monotonic() - self._spoke > LINE_SECONDS:
            self._spoke = time.monotonic()
            self._console.print(f"{self._title}: step {step} of {self._steps}  {told}", highlight=False)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._enabled:
            self._console.print(f"{self._title}: {text}", highlight=False, markup=False)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
