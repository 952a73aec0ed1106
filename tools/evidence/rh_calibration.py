"""Zeta zeros: how well the predicted densities of a window's last spacing are calibrated, by experiment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence.record import bare, markdown, read
from evidence.rh_runs import folders

LEFT_OUT = ("frequencies=", "frequency_", "height=", "dropout=", "zeros=200000", "mirror=True")
"""Fields of experiments whose question is another one."""
LEVELS = (0.5, 0.9)


def calibration() -> str:
    """The mean CRPS over seeds, and the range of the mean PIT and of the coverage of central intervals."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for (name, _), folder in sorted(folders().items()):
        if not any(field in name for field in LEFT_OUT):
            found.setdefault(name, []).append(read(f"{folder}/evaluation.json"))
    body = []
    for name, runs in found.items():
        crps = sum(run["crps_last"]["value"] for run in runs) / len(runs)
        pit = [bare(run["pit_last"]["mean"]["value"], 3) for run in runs]
        held = [[f"{100 * _observed(run, level):.1f}" for run in runs] for level in LEVELS]
        body.append([name, str(len(runs)), bare(crps, 4), _range(pit), *map(_range, held)])
    intervals = [f"{100 * level:.0f} % intervals hold, %" for level in LEVELS]
    return markdown(["experiment", "seeds", "CRPS", "mean PIT", *intervals], body, "lrrrrr")


def _observed(run: Mapping[str, Any], level: float) -> float:
    (found,) = (c["observed"]["value"] for c in run["coverage_last"] if c["nominal"] == level)
    return float(found)


def _range(shown: list[str]) -> str:
    low, high = min(shown, key=float), max(shown, key=float)
    return low if low == high else f"{low} to {high}"


TABLES = {"rh_memory.calibration": calibration}
