"""How a training shows itself: a bar on a terminal, plain lines elsewhere, or nothing.

On stderr; stdout is for results.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from runtimes.train.metrics import Row


class Progress(Protocol):
    """Something that shows a training."""

    def begin(self, steps: int, done: int) -> None:
        """It starts, or goes on behind ``done`` steps."""
        ...

    def step(self, row: Row) -> None:
        """A step was taken."""
        ...

    def note(self, text: str) -> None:
        """Something worth knowing."""
        ...

    def end(self) -> None:
        """It is over, well or not."""
        ...


class Silent:
    """Shows nothing."""

    def begin(self, steps: int, done: int) -> None:
        """Nothing."""

    def step(self, row: Row) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class Lines:
    """A line every few seconds, and at every evaluation."""

    def __init__(self, every: float = 10.0):
        self.every, self.steps, self.last = every, 0, 0.0

    def begin(self, steps: int, done: int) -> None:
        """Say where it starts."""
        self.steps, self.last = steps, time.monotonic()
        _say(f"training, step {done} of {steps}")

    def step(self, row: Row) -> None:
        """Say it if it is time, or if something was evaluated."""
        due = time.monotonic() - self.last >= self.every
        if due or "eval_loss" in row or row["step"] == self.steps:
            self.last = time.monotonic()
            _say(f"step {row['step']}/{self.steps}  {summary(row)}")

    def note(self, text: str) -> None:
        """Say it."""
        _say(text)

    def end(self) -> None:
        """Nothing."""


class Bar:
    """A bar with the loss, the speed and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
        self.task: Any = None

    def begin(self, steps: int, done: int) -> None:
        """Show the bar."""
        self.task = self.bar.add_task("", total=steps, completed=done, said="")
        self.bar.start()

    def step(self, row: Row) -> None:
        """Move it."""
        self.bar.update(self.task, completed=row["step"], said=summary(row))

    def note(self, text: str) -> None:
        """Print a line above it."""
        self.bar.console.print(text, highlight=False)

    def end(self) -> None:
        """Leave it as it stands."""
        self.bar.stop()


def terminal() -> Progress:
    """A bar where somebody watches, lines where a log is written."""
    return Bar() if sys.stderr.isatty() else Lines()


def summary(row: Row) -> str:
    """The row in a few words."""
    said = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
    text = f" (perplexity {row['eval_perplexity']:.2f})" if "eval_perplexity" in row else ""
    return said + (f"  held-out {row['eval_loss']:.4f}{text}" if "eval_loss" in row else "")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
