"""What a person sees while a run trains, on stderr: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

_SECONDS_BETWEEN_LINES = 2.0


def say(text: str) -> None:
    """Print a line on stderr. That nobody can read it (its pipe closed, its disk full) stops no work."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # or every later line would fail, and the exit


class Progress:
    """The console of one process. With `enabled=False` (ranks above 0) it prints nothing."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._bar: Any = None
        self._steps = 0
        self._first_step = 0
        self._started = 0.0
        self._last_line = -float("inf")

    def start(self, step: int, steps: int) -> None:
        """Begin counting at `step` of `steps`; a live bar on a terminal."""
        self._steps, self._first_step, self._started = steps, step, time.monotonic()
        if not (self._enabled and sys.stderr.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            refresh_per_second=4,
        )
        self._bar.add_task("", total=steps, completed=step)
        self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar; costs microseconds, reads nothing from a device."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the newest metrics: beside the bar, or as a line at most every 2 s and at the last step."""
        text = f"{format_metrics(metrics)}  ETA {self._eta(step)}"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._steps:
            self._last_line = time.monotonic()
            self.line(f"step {step}/{self._steps}  {text}")

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            say(text)

    def stop(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _eta(self, step: int) -> str:
        done = step - self._first_step
        if done <= 0:
            return "?"
        seconds = round((time.monotonic() - self._started) / done * (self._steps - step))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def format_metrics(metrics: Mapping[str, float]) -> str:
    """`loss 0.812  angle 45.2  31.2 it/s  2,050 events/s`: names before values, rates as rates."""
    words = []
    for name, value in metrics.items():
        if name.endswith("_per_s"):
            words.append(f"{value:,.{0 if value >= 100 else 1}f} {name.removesuffix('_per_s')}/s")
        else:
            words.append(f"{name} {value:.4g}")
    return "  ".join(words)


class Counter:
    """Progress of work that is counted but not trained: a live bar on a terminal, a line every few seconds elsewhere.

    with Counter("caching", total, "events") as counter:
        counter.show(done)
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._started = self._last_line = time.monotonic()
        self._done = 0
        self._bar: Any = None

    def __enter__(self) -> Counter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(console=Console(stderr=True), transient=True)
            self._bar.add_task(self._title, total=self._total)
            self._bar.start()
        return self

    def show(self, done: int) -> None:
        """`done` of the total, so far."""
        self._done = done
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(f"{self._title}: {done:,} of {self._total:,} {self._unit}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        seconds = time.monotonic() - self._started
        if kind is None and self._done:
            say(f"{self._title}: {self._done:,} {self._unit} in {seconds:.1f} s")
