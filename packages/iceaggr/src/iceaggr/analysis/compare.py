"""`iceaggr compare RUN_A RUN_B ...`: runs side by side, and their errors paired on the events they share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.errors import UserError
from lab_shared.files import atomic_write
from lab_shared.page import Page
from lab_shared.report_files import read_object
from lab_shared.stats import bca_interval, paired_sign_flip

from iceaggr.analysis import analyze, figures
from iceaggr.analysis.direction_head import HEAD
from iceaggr.analysis.errors import BIAS, ERRORS
from iceaggr.analysis.output import aligned, value
from iceaggr.metrics import FEWEST_FOR_INTERVAL, summary
from iceaggr.predict import load_run
from iceaggr.report_text import cell
from iceaggr.run_files import read_run
from iceaggr.summaries import Array

_SAME_DIRECTION = 1e-9  # rad; stored angles are float64
_TITLES = dict((BIAS, HEAD, *analyze.INSIDE))
_MOST_SIGNS = 200_000_000  # drawn in a sign-flip test: a few seconds
_PERCENTILES = {"mean": "mean_deg", "P10": "p10", "P25": "p25", "median": "median_deg", "P75": "p75", "P90": "p90"}


@dataclass(frozen=True)
class _Run:
    name: str
    path: Path
    facts: dict[str, Any]
    label: str
    predictions: dict[str, Array]
    analysis: dict[str, Any] | None


def compare_runs(run_dirs: list[Path], out: Path | None = None) -> dict[str, Any]:
    """Compare finished runs; writes `out` (default RUN_A/compare.html) and a .json beside it, and returns that.

    Each run brings its own evaluation (predictions.npz); differences are to the first run, on events with the same id
    and the same true direction. Numbers of `iceaggr analyze` stand beside each other where a run has them. "text"
    of the result holds all tables.

    Raises:
        UserError: fewer than two runs, a run that is not finished, or another ending of `out` than .html.
    """
    if len(run_dirs) < 2:
        raise UserError(f"{len(run_dirs)} run to compare: give at least two run folders")
    page_path = Path(run_dirs[0]) / "compare.html" if out is None else out
    if page_path.suffix != ".html":
        raise UserError(f"{page_path}: a comparison is written as .html, with its numbers as .json beside it")
    runs = [_read(Path(path), name) for path, name in zip(run_dirs, _names(run_dirs), strict=True)]
    if any(run.label != runs[0].label for run in runs):
        labels = ", ".join(f"{run.name}: {run.label}" for run in runs)
        note = f"The runs were evaluated on different data ({labels})."
    else:
        note = f"Each run on its own held-out events, {runs[0].label}."
    names, without = [run.name for run in runs], [run.name for run in runs if run.analysis is None]
    result: dict[str, Any] = {
        "runs": names,
        "facts": _side_by_side({run.name: run.facts for run in runs}),
        "errors_deg": {run.name: _errors(run) for run in runs},
        "paired": [_paired(run, runs[0]) for run in runs[1:]],
        "analysis": _analysis(runs),
        "not_analysed": without,
        "note": note,
    }
    tables = _tables(result)
    page = Page("iceaggr · " + " against ".join(names), note)
    for title, (header, rows, caption) in tables.items():
        page.section(title)
        page.table(header, rows, caption)
        if title == "Errors":
            _add_figures(page, runs)
    if without:
        page.text(f"Without an analysis: {', '.join(without)} (`iceaggr analyze RUN` makes it).")
    page.write(page_path)
    atomic_write(page_path.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    parts = [f"{title}\n{aligned([header, *rows])}" for title, (header, rows, _) in tables.items()]
    return result | {"page": str(page_path), "text": "\n\n".join([note, *parts, f"page: {page_path}"])}


def _names(paths: list[Path]) -> list[str]:
    """Folder names, with a number where two are equal."""
    names = [Path(path).resolve().name for path in paths]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _read(path: Path, name: str) -> _Run:
    files = read_run(path)
    if files.predictions is None or "event_id" not in files.predictions:
        raise UserError(f"{path} has no predictions.npz with event ids: score it with `iceaggr evaluate {path}`")
    config, model = load_run(path, torch.device("cpu"))
    shown = ("arch", "features", "slots", "input", "d_model", "d_hidden", "layers", "heads", "head_hidden", "dom_cap",
             "fourier", "aggregates", "ice", "interval", "head_mixture")  # fmt: skip
    facts: dict[str, Any] = {"parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
    facts |= {key: getattr(config.model, key) for key in shown} | {"epochs": config.epochs, "seed": config.seed}
    facts["held-out events"] = f"{files.predictions['error_deg'].size:,}"
    found = read_object(path / analyze.FILE, ("absent", "scalars"))
    return _Run(name, path, facts, files.label, files.predictions, found)


def _errors(run: _Run) -> dict[str, Any]:
    found = summary(run.predictions["error_deg"])
    return {name: found[key] for name, key in _PERCENTILES.items()}


def _paired(run: _Run, first: _Run) -> dict[str, Any]:
    """Error of a run minus that of the first, event by event; the reason where their events cannot be paired."""
    a, b = run.predictions, first.predictions
    ids, at_a, at_b = np.intersect1d(a["event_id"], b["event_id"], return_indices=True)
    row: dict[str, Any] = {"run": run.name, "against": first.name, "n": int(ids.size)}
    apart = np.maximum(*(np.abs(a[angle][at_a] - b[angle][at_b]) for angle in ("azimuth", "zenith")))
    if (apart > _SAME_DIRECTION).any():
        event_id = int(ids[apart.argmax()])
        return row | {"why_not": f"different data: event {event_id} has two true directions"}
    if ids.size < FEWEST_FOR_INTERVAL:
        return row | {"why_not": "too few events in common"}
    error_a, error_b = a["error_deg"][at_a], b["error_deg"][at_b]
    low, high = bca_interval(error_a - error_b)
    resamples = int(np.clip(_MOST_SIGNS // ids.size, 1000, 10_000))
    test = paired_sign_flip(error_a, error_b, resamples=resamples)
    return row | {"difference_deg": test.difference, "low": low, "high": high, "p": test.p}


def _side_by_side(values: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{run: {key: value}} turned to {key: {run: value}}, every key of any run, None where a run has none."""
    keys = dict.fromkeys(key for of_run in values.values() for key in of_run)
    return {key: {run: of_run.get(key) for run, of_run in values.items()} for key in keys}


def _analysis(runs: list[_Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per study the single numbers of every analysed run; the reason where a study does not apply."""
    studies: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if run.analysis is not None:
            reasons = {study: {"does not apply": why} for study, why in run.analysis["absent"].items()}
            for study, scalars in (run.analysis["scalars"] | reasons).items():
                if study == ERRORS[0]:  # the evaluations' errors, with intervals, stand above
                    continue
                studies.setdefault(study, {})[run.name] = scalars
    return {study: _side_by_side(of_runs) for study, of_runs in studies.items()}


_Table = tuple[list[str], list[list[str]], str]


def _tables(result: dict[str, Any]) -> dict[str, _Table]:
    """Title -> (header, rows, caption) of every table."""
    names: list[str] = result["runs"]
    tables: dict[str, _Table] = {"Models": (["", *names], _rows(result["facts"], names), "")}
    errors = _side_by_side(result["errors_deg"])
    rows = [[key, *(cell(of_run[name]) for name in names)] for key, of_run in errors.items()]
    tables["Errors"] = (["opening angle", *names], rows, "Opening angle, in brackets the 95% bootstrap interval.")
    rows = [
        [
            f"{row['run']} − {row['against']}",
            f"{row['n']:,}",
            f"{row['difference_deg']:+.2f}° [{row['low']:+.2f}, {row['high']:+.2f}]" if "p" in row else row["why_not"],
            f"{row['p']:.2g}" if "p" in row else "–",
        ]
        for row in result["paired"]
    ]
    caption = (
        "Mean difference of the opening angle on the events both runs hold out, with its 95% bootstrap interval, and p "
        "of the sign-flip test, not corrected for the number of runs; negative: the first of the two is better. The "
        "interval is over events; another training seed may differ by more than that."
    )
    tables["Paired difference"] = (["runs", "events", "difference", "p"], rows, caption)
    for study, values in result["analysis"].items():
        rows = _rows(values, names)
        caption = "±: standard error over events." if any(" ± " in cell for row in rows for cell in row) else ""
        tables[_TITLES.get(study, study)] = (["", *names], rows, caption)
    return tables


def _rows(values: dict[str, dict[str, Any]], names: list[str]) -> list[list[str]]:
    return [[key, *(value(of_run.get(name)) for name in names)] for key, of_run in values.items()]


def _add_figures(page: Page, runs: list[_Run]) -> None:
    """Cumulative errors, and residual scales of the runs that have them."""
    edges = np.linspace(0, 180, 91)
    error_of = {run.name: np.sort(run.predictions["error_deg"]) for run in runs}
    shares = {name: np.searchsorted(error, edges) / error.size for name, error in error_of.items()}
    figure = figures.cumulatives(edges, shares)
    page.figure(figure, "Fraction of events below an opening angle.", alt="Rising curves.", width="half")
    scales: dict[str, Array] = {}
    for run in runs:
        file = run.path / analyze.FOLDER / "residual_scales.npz"
        if file.is_file():
            with np.load(file, allow_pickle=False) as arrays:
                scales |= {f"{run.name} {name}": arrays[f"by_layer/{name}"] for name in ("scale_x", "scale_x0")}
    if scales:
        layers = [str(i) for i in range(max(map(len, scales.values())))]
        figure = figures.lines(layers, scales, "learned factor", xlabel="layer", reference=0)
        page.figure(figure, "Residual scales by layer.", alt="Curves over layers.", width="half")
