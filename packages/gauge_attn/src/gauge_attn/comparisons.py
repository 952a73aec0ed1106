"""What verdicts and tables compare runs by: cells, means over heads, differences over seeds and their signs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from lab_shared.stats import Summary, seeds_table

Run = dict[str, Any]
Verdict = dict[str, Any]
"""{"claim", "measured", "status"}, and "test" where that is not Student's t over seeds"""
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"


def summary(values: Sequence[float]) -> Summary:
    """Mean and Student interval over seeds."""
    return seeds_table([{"seed": i, "value": v} for i, v in enumerate(values)]).summary["value"]


def said(s: Summary, digits: int = 4) -> str:
    """`0.0352 [0.0341, 0.0363] (n=5)`"""
    interval = "" if s.low is None else f" [{s.low:.{digits}f}, {s.high:.{digits}f}]"
    return f"{s.mean:.{digits}f}{interval} (n={s.n})"


def by_cell(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """(grid, cell) -> its runs by seed."""
    cells: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda r: r["seed"]):
        cells.setdefault((run["grid"], run["cell"]), []).append(run)
    return cells


def different(runs: Iterable[Run]) -> list[Run]:
    """Each training once: cells of two grids with the same settings hold the same runs."""
    return list({json.dumps([r["settings"], r["seed"], r["summary"]], sort_keys=True): r for r in runs}.values())


def of_l(run: Run, l: int, name: str = "row_std") -> float | None:
    """Mean over the heads of one l, all layers."""
    values = [h[name] for h in run["summary"]["heads"] if h["l"] == l and name in h]
    return float(np.mean(values)) if values else None


def where(run: Run) -> str:
    """` on generated induction language, 16 keys`, for the line of every measurement."""
    return f" on {run['summary']['label']}"


def paired(runs: Sequence[Run], a: str, b: str, value: Callable[[Run], float | None]) -> Summary | None:
    """value(a) - value(b) over the seeds that both cells have."""
    of = {(r["cell"], r["seed"]): r for r in runs}
    differences = []
    for cell, seed in of:
        if cell == a and (b, seed) in of:
            x, y = value(of[a, seed]), value(of[b, seed])
            if x is not None and y is not None:
                differences.append(x - y)
    return summary(differences) if differences else None


def sign(change: Summary, claim: int = 1) -> str:
    """Whether a difference has the claimed sign; undecided where its interval contains 0."""
    if change.low is None or change.high is None or change.low <= 0 <= change.high:
        return UNDECIDED
    return HOLDS if (change.low > 0) == (claim > 0) else FAILS
