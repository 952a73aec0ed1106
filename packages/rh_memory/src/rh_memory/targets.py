"""What scores and times of training have to reach, by experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rh_memory.config import PRESETS
from rh_memory.records import Record

SEEDS = 3
"""Fewer decide nothing, and have no interval."""


@dataclass(frozen=True)
class Target:
    """The mean over seeds of a score has to lie between the bounds, and every run to train within `seconds`, if given.

    machine: whose seconds they are.
    """

    metric: str
    high: float
    low: float = -float("inf")
    seconds: float | None = None
    machine: str = ""

    @property
    def text(self) -> str:
        bounds = f"<= {self.high:g}" if self.low == -float("inf") else f"{self.low:.3f} to {self.high:.3f}"
        return f"{self.metric} {bounds}"

    @property
    def time(self) -> str | None:
        return None if self.seconds is None else f"{self.seconds:g} s of {self.machine}"

    def met_by(self, mean: float) -> bool:
        return self.low <= mean <= self.high

    def in_time(self, seconds: Mapping[str, float | None]) -> bool | None:
        """Whether every run took no longer; None where nothing is asked or a run does not say."""
        known = [x for x in seconds.values() if x is not None]
        if self.seconds is None or len(known) < len(seconds):
            return None
        return max(known) <= self.seconds


_SCORES = {
    "e0": Target("nll_all", -0.55),
    "e0-rope": Target("nll_last", -1.10, seconds=100, machine="one H200"),
    "e3": Target("nll_last", -0.5),
    "e4": Target("nll_last", -0.5),
    "e5": Target("nll_last", -0.5),
    "e3-explicit": Target("nll_last", -1.0),
    "explicit": Target("nll_last", -2.35, seconds=150, machine="one H200"),
    "explicit-small": Target("nll_last", -1.1, seconds=180, machine="two cores"),
}
_ANY_LENGTH = ("e3", "e4", "e5", "e3-explicit")
"""Postfix memories, of which no number of steps is asked."""
_TEN_MINUTES = Target("nll_last", -2.8, seconds=600, machine="one H200")
_WITHOUT_PRIMES = {"shuffled": Target("nll_last", 0.504, 0.500), "gue": Target("nll_last", 0.44, 0.42)}


def target(record: Record) -> Target | None:
    """What an experiment has to reach, if anything.

    Presets on the tail, postfix memories after any number of steps, longer flagships, and data without primes.
    """
    if record.config.data.source != "zeta":
        return _WITHOUT_PRIMES[record.config.data.source]
    steps = record.config.steps
    if record.experiment == f"{record.preset}, steps={steps}":
        if record.preset == "explicit" and steps > PRESETS["explicit"][1].steps:
            return _TEN_MINUTES
        return _SCORES[record.preset] if record.preset in _ANY_LENGTH else None
    return _SCORES.get(record.experiment)


def met(row: Mapping[str, Any]) -> str:
    """What an experiment of `verdicts` does of what its scores are to reach; with the seeds where they are few."""
    if row["met"] is None:
        return ""
    few = "" if len(row["seeds"]) >= SEEDS else f" ({len(row['seeds'])} of {SEEDS} seeds)"
    return ("met" if row["met"] else "NOT met") + few


def time_met(row: Mapping[str, Any]) -> str:
    """The same of the time its training may take."""
    return {None: "", True: "met", False: "NOT met"}[row["in_time"]]


def time_taken(row: Mapping[str, Any]) -> str:
    """Shortest and longest training of an experiment: "109 to 111 s"."""
    known = sorted(x for x in row["seconds"].values() if x is not None)
    ends = list(dict.fromkeys(f"{x:.0f}" for x in (*known[:1], *known[-1:])))
    return f"{' to '.join(ends)} s" if ends else ""
