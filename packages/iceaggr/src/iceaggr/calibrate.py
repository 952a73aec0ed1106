"""`iceaggr calibrate RUN`: calibrate kappa on one half of a run's held-out events, judge it on the other.

Leaves RUN/calibration.json, which `predict`, `display` and `skymap` apply.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lab_shared.errors import UserError
from lab_shared.files import atomic_write

from iceaggr.calibration import BINS, Levels, expected_error_deg, fit_temperature, judge, pull, sharpness
from iceaggr.directions import angles_to_vector
from iceaggr.metrics import opening_angle_deg
from iceaggr.run_files import read_run
from iceaggr.summaries import Columns
from iceaggr.uncertainty import Array, Mixture, containment, mean_direction

CALIBRATION = "calibration.json"
_FEWEST, _MOST = 200, 10_000  # events in each half; the most of a model with several components


def halves(n: int, seed: int = 0) -> tuple[Array, Array]:
    """Rows of two random halves: one to fit on, one to judge on."""
    order = np.random.default_rng(seed).permutation(n)
    return order[: n // 2], order[n // 2 :]


def predicted(arrays: dict[str, Array]) -> Mixture:
    """One component per event: pred_azimuth, pred_zenith and kappa of predictions.npz."""
    return Mixture.single(arrays["kappa"][:, None] * angles_to_vector(arrays["pred_azimuth"], arrays["pred_zenith"]))


def predicted_components(arrays: dict[str, Array]) -> Mixture | None:
    """All components of a model that has several, from out_0, out_1, ... (its raw output); None for other models."""
    columns = sum(name.startswith("out_") for name in arrays)
    return Mixture.of_output(np.stack([arrays[f"out_{i}"] for i in range(columns)], axis=1)) if columns else None


class Fitted(NamedTuple):
    """A calibration fitted on one half of the events, and the other half to judge it on."""

    temperature: float
    log_error: float
    """Standard error of log temperature."""
    levels: Levels
    n_fit: int
    mixture: Mixture
    """Of the other half, raw."""
    true_E3: Array


def fit_arrays(arrays: dict[str, Array], mixture: Mixture | None = None) -> Fitted:
    """Fit temperature and levels on half of the events of predictions.npz: of `predicted`, or of another `mixture`.

    Raises:
        UserError: no kappa, or too few events to split.
    """
    kappa = arrays.get("kappa")
    if kappa is None or np.ptp(kappa) == 0:
        raise UserError("these predictions have no kappa that differs between events: there is nothing to calibrate")
    if len(kappa) < 2 * _FEWEST:
        raise UserError(f"{len(kappa)} held-out events are too few to fit and judge; need {2 * _FEWEST}")
    mixture, true_E3 = mixture or predicted(arrays), angles_to_vector(arrays["azimuth"], arrays["zenith"])
    fit, rest = halves(len(mixture))
    if mixture.weight_EK.shape[1] > 1:  # their containment takes hundreds of points an event
        fit, rest = fit[:_MOST], rest[:_MOST]
    temperature, error = fit_temperature(mixture[fit], true_E3[fit])
    levels = Levels.fit(mixture[fit].tempered(temperature), true_E3[fit])
    return Fitted(temperature, error, levels, len(fit), mixture[rest], true_E3[rest])


def describe(fitted: Fitted, *, label: str) -> dict[str, Any]:
    """What goes into calibration.json."""
    mixture, true_E3, temperature = fitted.mixture, fitted.true_E3, fitted.temperature
    tempered = mixture.tempered(temperature)
    return {
        "note": "kappa is to be divided by the temperature, and in confidence bin b the region that holds p percent of "
        "the events is that of nominal probability nominal_levels[b][p]; both were fitted on one half of the run's "
        "held-out events and judged on the other",
        "label": label,
        "temperature": temperature,
        "low": temperature * float(np.exp(-1.96 * fitted.log_error)),
        "high": temperature * float(np.exp(1.96 * fitted.log_error)),
        "components": mixture.weight_EK.shape[1],
        "n_fit": fitted.n_fit,
        "level_edges": fitted.levels.edges.tolist(),
        "nominal_levels": fitted.levels.nominal.tolist(),
        "raw": judge(mixture, true_E3),
        "calibrated": judge(tempered, true_E3),
        "levels": judge(tempered, true_E3, fitted.levels, n_fit=fitted.n_fit),
    }


def curves(fitted: Fitted) -> dict[str, Columns]:
    """Columns of the report's figures, on the half that was not fitted: coverage, pit, pull, promised.

    Pulls beyond the last bin count in it, so that a model far too sure of itself shows.
    """
    tempered = fitted.mixture.tempered(fitted.temperature)
    u_raw, u_tempered = (containment(m, fitted.true_E3) for m in (fitted.mixture, tempered))
    u_of = {
        "raw": u_raw,
        "temperature": u_tempered,
        "temperature and levels": fitted.levels.actual(u_tempered, sharpness(tempered)),
    }
    level, edges, steps = np.linspace(0, 1, 101), np.linspace(0, 1, 21), np.linspace(0, 6, 31)
    middle = (steps[1:] + steps[:-1]) / 2
    n = len(u_raw)
    error = opening_angle_deg(mean_direction(fitted.mixture), fitted.true_E3)
    bins = np.array_split(np.argsort(sharpness(tempered), kind="stable"), BINS)

    def promise(mixture: Mixture) -> Array:
        expected = expected_error_deg(mixture)
        return np.array([expected[rows].mean() for rows in bins])

    return {
        "coverage": {"level": level, **{name: np.searchsorted(np.sort(u), level) / n for name, u in u_of.items()}},
        "pit": {"low": edges[:-1], "high": edges[1:]}
        | {name: np.histogram(u, edges)[0] / n / np.diff(edges) for name, u in u_of.items()},
        "pull": {"low": steps[:-1], "high": steps[1:]}
        | {name: np.histogram(pull(u).clip(max=steps[-1]), steps)[0] / n / np.diff(steps) for name, u in u_of.items()}
        | {"rayleigh": middle * np.exp(-(middle**2) / 2)},
        "promised": {
            "events": np.array([len(rows) for rows in bins]),
            "promised raw": promise(fitted.mixture),
            "promised calibrated": promise(tempered),
            "mean": np.array([error[rows].mean() for rows in bins]),
            "standard error": np.array([error[rows].std(ddof=1) / np.sqrt(len(rows)) for rows in bins]),
        },
    }


def calibrate_run(run_dir: Path) -> dict[str, Any]:
    """Calibrate a run on its saved held-out predictions, write RUN/calibration.json; the table is under "text".

    Raises:
        UserError: the run has no predictions, or nothing to calibrate.
    """
    run = read_run(Path(run_dir))
    if run.predictions is None:
        raise UserError(f"{run_dir} has no predictions.npz: score it with `iceaggr evaluate {run_dir}`")
    result = describe(fit_arrays(run.predictions), label=run.label)
    lines = [table(result)]
    if components := predicted_components(run.predictions):
        result["mixture"] = describe(fit_arrays(run.predictions, components), label=run.label)
        lines += [f"\nall {result['mixture']['components']} components, for `skymap`", table(result["mixture"])]
    atomic_write(Path(run_dir) / CALIBRATION, json.dumps(result, indent=1) + "\n")
    return result | {"text": "\n".join(lines)}


class Calibration(NamedTuple):
    """What a run's calibration.json says about its kappa."""

    temperature: float
    levels: Levels

    def said(self, run_dir: Path) -> str:
        """One line for the output of a command that applies it."""
        return f"kappa divided by the temperature {self.temperature:.3f} of {Path(run_dir) / CALIBRATION}"


def load_calibration(run_dir: Path, *, mixture: bool = False) -> Calibration | None:
    """What `iceaggr calibrate` left in a run folder, or None; mixture: that of all components of a model with several.

    Raises UserError for a file that holds something else.
    """
    path = Path(run_dir) / CALIBRATION
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
        value = value["mixture"] if mixture else value
        levels = Levels(np.asarray(value["level_edges"], float), np.asarray(value["nominal_levels"], float))
        found = Calibration(float(value["temperature"]), levels)
        sound = found.temperature > 0 and levels.nominal.shape == (len(levels.edges) + 1, 101)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no calibration; run `iceaggr calibrate {run_dir}` again") from error
    if not (sound and np.isfinite(found.temperature) and np.isfinite(levels.nominal).all()):
        raise UserError(f"{path} is no calibration; run `iceaggr calibrate {run_dir}` again")
    return found


def table(result: dict[str, Any]) -> str:
    """Raw and calibrated kappa side by side, with what a calibrated one would show."""
    judged = [result[name] for name in ("raw", "calibrated", "levels")]
    last = judged[-1]
    lines = [
        f"temperature {result['temperature']:.3f} [{result['low']:.3f}, {result['high']:.3f}] fitted on "
        f"{result['n_fit']:,} held-out events; judged on {last['n']:,} others ({result['label']})",
        f"{'':26}{'raw kappa':>24}{'kappa / temperature':>24}{'and nominal levels':>24}{'ideal':>10}",
    ]

    def line(name: str, cells: list[str], ideal: str) -> None:
        lines.append((f"{name:26}" + "".join(f"{cell:>24}" for cell in cells) + f"{ideal:>10}").rstrip())

    def figures(key: str) -> list[str]:
        return [f"{x[key]:.4f}" for x in judged]

    line("-log p per event (nats)", figures("nll"), "")
    line("calibration error (ECE)", figures("ece"), "")
    line("  if calibrated", figures("ece_if_calibrated"), "")
    line("largest distance (KS)", figures("ks"), "")
    line("  if calibrated, below", figures("ks_critical"), "")
    line("median pull", figures("pull_median"), f"{last['pull_median_rayleigh']:.4f}")
    line("share of pulls above 3", figures("pull_above_3"), f"{last['pull_above_3_rayleigh']:.4f}")
    for same in zip(*(x["coverage"] for x in judged), strict=True):
        level = same[0]["level"]
        if level in (0.5, 0.68, 0.9):
            cells = [f"{x['share']:.4f} [{x['low']:.4f}, {x['high']:.4f}]" for x in same]
            line(f"inside the {level:.0%} region", cells, f"{level:.4f}")
    return "\n".join(lines)
