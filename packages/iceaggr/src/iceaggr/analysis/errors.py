"""How wrong the directions are, and to which side: percentiles of the opening angle, bias of the components."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from iceaggr import figures as report_figures
from iceaggr import summaries
from iceaggr.analysis import figures
from iceaggr.analysis.study import Study
from iceaggr.metrics import PERCENTILES, PULSE_EDGES, ZENITH_EDGES_DEG, opening_angle_deg, summary
from iceaggr.summaries import Array, Columns

ERRORS = ("errors", "Error distribution")
BIAS = ("z_bias", "Bias of the components")


class Predictions(NamedTuple):
    """Of held-out events, in one order."""

    v_E3: Array
    """To where the neutrino came from; of any length."""
    true_E3: Array
    """Unit vectors."""
    n_pulses_E: Array


def error_percentiles(predictions: Predictions, label: str) -> Study:
    """P10, P25, P50, P75, P90 and mean of the opening angle in degrees, with bootstrap intervals."""
    error_E = opening_angle_deg(predictions.v_E3, predictions.true_E3)
    found = summary(error_E)
    names = {"mean": "mean_deg", "P10": "p10", "P25": "p25", "median": "median_deg", "P75": "p75", "P90": "p90"}
    assert PERCENTILES == (10, 25, 75, 90)
    rows = [found[key] for key in names.values()]
    columns = {
        "statistic": np.array(list(names)),
        **{key: np.array([np.nan if r[key] is None else r[key] for r in rows]) for key in ("value", "low", "high")},
    }
    distribution = summaries.error_distribution({"model": error_E})
    return Study(
        *ERRORS,
        caption=f"Opening angle in degrees on {error_E.size:,} held-out events, {label}; 95% bootstrap intervals. "
        "Dotted: an isotropic guess.",
        tables={"in degrees": columns},
        figure=report_figures.cumulative(distribution),
        scalars={f"{name} (°)": float(found[key]["value"]) for name, key in names.items()},
        arrays={"error_deg": error_E, **{key.replace(" ", "_"): values for key, values in distribution.items()}},
    )


def bias(predictions: Predictions, label: str) -> Study:
    """Mean of predicted minus true component of the unit vectors with its standard error, overall and in bins."""
    v_E3, true_E3, n_pulses_E = predictions
    predicted_E3 = v_E3 / np.linalg.norm(v_E3, axis=1, keepdims=True)
    residual_E3 = predicted_E3 - true_E3
    overall: Columns = {
        "component": np.array(list("xyz")),
        "true mean": true_E3.mean(0),
        "predicted mean": predicted_E3.mean(0),
        "bias": residual_E3.mean(0),
        "se": residual_E3.std(0, ddof=1) / np.sqrt(len(v_E3)),
    }
    zenith_E = np.degrees(np.arccos(np.clip(true_E3[:, 2], -1, 1)))
    zenith = [f"{low}-{high}°" for low, high in pairwise(ZENITH_EDGES_DEG)]
    pulses = [f"{low}-{high - 1}" for low, high in pairwise(PULSE_EDGES)] + [f">={PULSE_EDGES[-1]}"]
    by_zenith = bias_in_bins(residual_E3[:, 2], np.digitize(zenith_E, ZENITH_EDGES_DEG[1:-1]), zenith)
    by_pulses = bias_in_bins(residual_E3[:, 2], np.digitize(n_pulses_E, PULSE_EDGES[1:]), pulses)
    bins = [*by_zenith["bin"].tolist(), *(f"{name} p." for name in by_pulses["bin"].tolist())]
    joined = {key: np.concatenate([by_zenith[key], by_pulses[key]]) for key in ("z bias", "se")}
    reach = 1.96 * joined["se"]
    return Study(
        *BIAS,
        caption="Mean of predicted minus true component of the unit vector to the source, with its standard error (se; "
        f"bars: 1.96 se), over {len(v_E3):,} held-out events, by true zenith and by pulses (p.), {label}. A predictor "
        "that is unsure shrinks towards the horizon, so its z bias has the opposite sign in the two hemispheres.",
        tables={"overall": overall, "z by true zenith": by_zenith, "z by pulses": by_pulses},
        figure=figures.bars(
            bins,
            joined["z bias"],
            "mean of predicted − true z",
            low=joined["z bias"] - reach,
            high=joined["z bias"] + reach,
        ),
        scalars={
            f"{axis} bias": f"{b:+.4f} ± {se:.4f}"
            for axis, b, se in zip("xyz", overall["bias"], overall["se"], strict=True)
        },
        arrays={"residual_E3": residual_E3.astype(np.float32)},
    )


def bias_in_bins(residual_E: Array, bin_E: Array, labels: list[str]) -> Columns:
    """Mean and standard error of the residual in each bin that has at least summaries.MIN_EVENTS events."""
    members = {label: residual_E[bin_E == i] for i, label in enumerate(labels)}
    members = {label: values for label, values in members.items() if len(values) >= summaries.MIN_EVENTS}
    return {
        "bin": np.array(list(members)),
        "events": np.array([len(values) for values in members.values()], dtype=np.int64),
        "z bias": np.array([values.mean() for values in members.values()]),
        "se": np.array([values.std(ddof=1) / np.sqrt(len(values)) for values in members.values()]),
    }
