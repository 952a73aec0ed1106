"""How a report writes numbers, names, tables and the command that made the run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any


def command_line(argv: list[str], processes: int) -> str:
    """The command line that started the run, to be typed at the root of the repository."""
    if processes == 1:
        return shlex.join(["uv", "run", *argv])
    arguments = argv[3:] if argv[:2] == ["python", "-m"] else argv[1:]
    train = ["train"] if argv[0] == "iceaggr-train" else []
    return shlex.join(["uv", "run", "torchrun", f"--nproc-per-node={processes}", "-m", "iceaggr", *train, *arguments])


def cell(value: Any, *, degrees: bool = True, brackets: bool = True) -> str:
    """One table cell: a number, or a value with its interval; "–" for nothing."""
    if isinstance(value, Mapping):
        text = cell(value.get("value"), degrees=degrees)
        low, high = value.get("low"), value.get("high")
        known = brackets and low is not None and high is not None
        return f"{text} [{low:.1f}, {high:.1f}]" if known else text
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1f}°" if degrees else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def words(name: str) -> str:
    return name.replace("_", " ")


def heading(key: str) -> str:
    return words(key.removesuffix("_deg"))


def all_keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of all rows, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))
