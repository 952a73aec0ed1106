"""How a report writes numbers, names, tables and the command that made the run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from iceaggr.summaries import Columns

PREDICTORS = {
    "random": "random direction",
    "linefit_all": "line fit, all pulses",
    "linefit_hlc": "line fit, HLC",
    "linefit": "line fit, HLC within 1.5 us",
    "oracle": "oracle",
    "model": "model",
}
"""What the predictors of evaluation.json are called, in the order of a table."""


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


def predictor_means(predictors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name and mean angle, in words, of every predictor of evaluation.json that has one."""
    means = {name: row["mean_deg"] for name, row in _in_order(predictors).items() if "mean_deg" in row}
    return [f"{name} {cell(mean, brackets=False)}" for name, mean in means.items()]


def predictor_table(predictors: Mapping[str, Mapping[str, Any]], label: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the predictors of evaluation.json, the model last; the last column says which data they
    saw. Percentiles stand without their intervals, or the table is too wide; the intervals' level is for the caption.
    """
    keys = [key for key in all_keys(predictors.values()) if key != "level"]
    if "median_deg" in keys and "p50" in keys:
        keys.remove("p50")
    narrow = ("p10", "p25", "p75", "p90")
    rows = [
        [name, *(cell(row.get(key), brackets=key not in narrow) for key in keys), label]
        for name, row in _in_order(predictors).items()
    ]
    return ["predictor", *map(heading, keys), "on"], rows


def _in_order(predictors: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By what they are called, in the order of `PREDICTORS`, those it does not know first."""
    names = [name for name in predictors if name not in PREDICTORS] + [n for n in PREDICTORS if n in predictors]
    return {PREDICTORS.get(name, words(name)): predictors[name] for name in names}


def group_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of one group of bins of evaluation.json."""
    keys = all_keys(rows)
    cells = [[cell(row.get(key), degrees=key.endswith("_deg")) for key in keys] for row in rows]
    return [*map(heading, keys)], cells


def containment_table(columns: Columns) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of `iceaggr.resolution.select(table, "contained")`: median and mean with their intervals."""
    names = ("group", "low", "events", "median", "median_low", "median_high", "mean", "mean_low", "mean_high")
    cells = [
        [group, "inside" if low else "outside", n, f"{m:.1f} [{a:.1f}, {b:.1f}]", f"{e:.1f} [{c:.1f}, {d:.1f}]"]
        for group, low, n, m, a, b, e, c, d in zip(*(columns[name] for name in names), strict=True)
    ]
    return ["type", "interaction", "events", "median", "mean"], cells
