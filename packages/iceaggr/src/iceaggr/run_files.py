"""What a finished run left in its folder, read and checked for the report. An absent file is None, a bad one
an error.

predictions.npz has one row per held-out event: event_id, azimuth, zenith, pred_azimuth, pred_zenith (rad,
where the neutrino came from), error_deg, n_pulses; optional linefit_error_deg, kappa, n_doms, energy (GeV),
type (0 cascade, 1 track), vertex_x, vertex_y, vertex_z (m), and of a model with several components out_0, out_1, ...

display.npz has a handful of events with P pulses in all: event_id (E), offsets (E + 1), x, y, z (m), time
(ns), charge, auxiliary (P), true, predicted (E, 3) unit vectors; optional kappa (E), sensor (P), array_xyz
(5160, 3).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.arrays import load_arrays
from lab_shared.errors import UserError
from lab_shared.report_files import read_object

from iceaggr.display_data import Event
from iceaggr.summaries import Array, Columns

_PREDICTIONS = ("azimuth", "zenith", "pred_azimuth", "pred_zenith", "error_deg", "n_pulses")
_DISPLAY = ("event_id", "offsets", "x", "y", "z", "time", "charge", "auxiliary", "true", "predicted")


@dataclass(frozen=True)
class RunFiles:
    folder: Path
    config: dict[str, Any]
    manifest: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl; empty without the file."""
    bad_lines: int
    """Lines of metrics.jsonl that are no JSON object, as a kill while writing leaves."""
    predictions: dict[str, Array] | None
    display: dict[str, Array] | None

    @property
    def label(self) -> str:
        """What data the figures are about: "simulated data", "Kaggle data"."""
        return str(self.evaluation["label"]) if self.evaluation else "data of unknown origin"


def read_run(folder: Path) -> RunFiles:
    """Everything the report needs. Raises UserError without a config.json or for an unreadable file."""
    config = read_object(folder / "config.json")
    if config is None:
        raise UserError(f"{folder} has no config.json, so it is no run; give the folder that `iceaggr train` wrote")
    evaluation = read_object(folder / "evaluation.json", ("label", "n_events", "predictors"))
    if evaluation is not None and not (
        isinstance(evaluation["predictors"], dict) and isinstance(evaluation["n_events"], int)
    ):
        raise UserError(f"{folder / 'evaluation.json'} is no evaluation; run `iceaggr evaluate` again")
    metrics, bad_lines = _read_metrics(folder / "metrics.jsonl")
    return RunFiles(
        folder=folder,
        config=config,
        manifest=read_object(folder / "manifest.json"),
        evaluation=evaluation,
        metrics=metrics,
        bad_lines=bad_lines,
        predictions=_read_predictions(folder / "predictions.npz"),
        display=_read_arrays(folder / "display.npz", _DISPLAY),
    )


def series(metrics: list[dict[str, Any]], split: str, key: str) -> tuple[Array, Array]:
    """(steps, values) of `key` in the lines of `split` where it is a finite number, in order of step."""
    lines = [m for m in metrics if m.get("split") == split and m.get(key) is not None]
    pairs = {int(m["step"]): float(m[key]) for m in lines if math.isfinite(m[key])}
    steps = np.array(sorted(pairs), dtype=np.int64)
    return steps, np.array([pairs[step] for step in steps.tolist()], dtype=np.float64)


def series_columns(found: Mapping[str, tuple[Array, Array]], key: str) -> Columns:
    """The `series` of one key in several splits, {split: (steps, values)}, one below the other."""
    return {
        "step": np.concatenate([steps for steps, _ in found.values()]),
        "split": np.repeat(list(found), [len(steps) for steps, _ in found.values()]),
        key: np.concatenate([values for _, values in found.values()]),
    }


def display_events(arrays: dict[str, Array]) -> list[Event]:
    """The events of display.npz."""
    xyz = np.stack([arrays[axis] for axis in "xyz"], axis=1)
    events = []
    for i, (start, end) in enumerate(zip(arrays["offsets"][:-1], arrays["offsets"][1:], strict=True)):
        rows = slice(int(start), int(end))
        events.append(
            Event(
                xyz=xyz[rows],
                time=arrays["time"][rows],
                charge=arrays["charge"][rows],
                auxiliary=arrays["auxiliary"][rows],
                sensor=arrays["sensor"][rows] if "sensor" in arrays else None,
                true=arrays["true"][i],
                predicted=arrays["predicted"][i],
                event_id=int(arrays["event_id"][i]),
                kappa=float(arrays["kappa"][i]) if "kappa" in arrays else None,
            )
        )
    return events


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    if not path.is_file():
        return [], 0
    lines, bad = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if isinstance(value, dict) and "step" in value:
            lines.append(value)
        else:
            bad += 1
    return lines, bad


def _read_arrays(path: Path, needed: tuple[str, ...]) -> dict[str, Array] | None:
    if not path.is_file():
        return None
    arrays = load_arrays(path)
    if absent := [name for name in needed if name not in arrays]:
        raise UserError(f"{path} lacks {', '.join(absent)}; run `iceaggr evaluate` again")
    return arrays


def _read_predictions(path: Path) -> dict[str, Array] | None:
    arrays = _read_arrays(path, _PREDICTIONS)
    if arrays is None:
        return None
    n = len(arrays["error_deg"])
    if n == 0:
        raise UserError(f"{path} holds no event; run `iceaggr evaluate` on a folder with labelled events")
    for name, values in arrays.items():
        if values.shape != (n,):
            raise UserError(f"{path}: {name} has shape {values.shape} beside {n} events; run `iceaggr evaluate` again")
        if bad := int(n - np.isfinite(values).sum()):
            raise UserError(f"{path}: {name} is not a finite number for {bad} of {n} events; find out why first")
    return arrays
