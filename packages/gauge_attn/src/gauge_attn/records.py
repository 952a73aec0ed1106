"""A grid's runs as they are committed: one line a run, few digits, what its seeds share said once.

    {"name", "cells": {"GRID/CELL": {settings, label, ...}}, "runs": [{"cell": "GRID/CELL", "seed", "heads": {column:
    [one value a head, or one for all]}, ...}]}

`unpack` gives back {"grid", "cell", "seed", "settings", "summary"}, which verdicts and reports are made from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]

SHARED = ("label", "generated", "yardsticks", "parameters")
"""Entries of a summary that are the same for all seeds of a cell."""
HEAD_COLUMNS = (
    "l", "kappa", "row_std", "entropy_ratio", "logit_std", "attended_kl", "uniform", "removed",
)  # fmt: skip
"""uniform, removed: what the loss rises by (nats per token) when the head is made uniform, or removed."""
INITIAL_COLUMNS = ("l", "row_std", "predicted")
_DIGITS, _HEAD_DIGITS = 5, 3


def summary_heads(heads: Sequence[dict[str, Any]], ablation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Diagnosed heads with their ablation costs beside their sharpness, only the columns that are kept."""
    costs = {(c["layer"], c["head"]): c for c in ablation}
    together = [h | costs.get((h["layer"], h["head"]), {}) for h in heads]
    return [{name: h[name] for name in HEAD_COLUMNS if name in h} for h in together]


def pack(name: str, runs: Sequence[Run]) -> str:
    """The text of results.json."""
    cells: dict[str, Any] = {}
    lines = []
    for run in runs:
        key, summary = f"{run['grid']}/{run['cell']}", run["summary"]
        if key not in cells:
            cells[key] = {"settings": run["settings"]} | {k: _rounded(summary[k]) for k in SHARED if k in summary}
        own = {k: v for k, v in summary.items() if k not in SHARED}
        own = _rounded(own) | {k: _rounded(_columns(own[k], names), _HEAD_DIGITS) for k, names in _TABLES if k in own}
        line = {"cell": key, "seed": run["seed"]} | own
        lines.append(json.dumps(line, ensure_ascii=False, separators=(",", ":")))
    rows = ",\n  ".join(lines)
    described = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in cells.items())
    return f'{{"name": {json.dumps(name)},\n "cells": {{\n  {described}}},\n "runs": [\n  {rows}]}}\n'


def unpack(packed: dict[str, Any]) -> list[Run]:
    runs = []
    for row in packed["runs"]:
        cell = packed["cells"][row["cell"]]
        grid, name = row["cell"].split("/", 1)
        summary = {k: v for k, v in row.items() if k not in ("cell", "seed")}
        summary |= {k: _rows(summary[k]) for k, _ in _TABLES if k in summary}
        summary |= {k: v for k, v in cell.items() if k != "settings"}
        settings = cell["settings"]
        runs.append({"grid": grid, "cell": name, "seed": row["seed"], "settings": settings, "summary": summary})
    return runs


_TABLES = (("heads", HEAD_COLUMNS), ("initial", INITIAL_COLUMNS))


def _columns(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    """Lists by name; but for the first, of one value where all are equal."""
    columns = {name: [row[name] for row in rows] for name in names if rows and name in rows[0]}
    return {k: v[:1] if k != names[0] and all(x == v[0] for x in v) else v for k, v in columns.items()}


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    n = max((len(v) for v in columns.values()), default=0)
    every = {k: v * n if len(v) == 1 else v for k, v in columns.items()}
    return [dict(zip(every, values, strict=True)) for values in zip(*every.values(), strict=True)]


def _rounded(value: Any, digits: int = _DIGITS) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: _rounded(v, digits) for k, v in value.items()}
    return [_rounded(v, digits) for v in value] if isinstance(value, list) else value
