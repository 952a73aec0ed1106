"""The reported numbers: opening angles in float64, and their summary with bootstrap intervals.

Nothing here is differentiated or runs in the training step; the loss has its own formula (`iceaggr.losses`).
Functions that take arrays accept numpy arrays or torch tensors and answer in kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from lab_shared.stats import Quantile, bca_interval

from iceaggr.directions import Array, as_float64, like

PERCENTILES = (10, 25, 75, 90)
ZENITH_EDGES_DEG = (0, 30, 60, 90, 120, 150, 180)
PULSE_EDGES = (0, 50, 100, 200, 500, 1000, 10_000)  # the last bin is open
FEWEST_FOR_INTERVAL = 20  # events; the bootstrap promises too much below


def opening_angle_deg(a_E3: Array, b_E3: Array) -> Array:
    """Angle between vectors of any length, (..., 3) -> (...) float64 in [0, 180], exact near both ends.

    Raises:
        ValueError: a vector has no direction (length 0 or not finite).
    """
    a, b = as_float64(a_E3), as_float64(b_E3)
    for vectors in (a, b):
        length = vectors.norm(dim=-1)
        bad = ~(torch.isfinite(length) & (length > 0))
        if bad.any():
            row = int(bad.flatten().nonzero()[0])
            raise ValueError(
                f"vector {row} is {vectors.reshape(-1, 3)[row].tolist()} and has no direction: "
                f"drop the event or give it a fallback direction before taking angles"
            )
    a, b = torch.broadcast_tensors(a, b)
    sine = torch.linalg.cross(a, b).norm(dim=-1)
    return like(torch.rad2deg(torch.atan2(sine, (a * b).sum(-1))), a_E3)


def summary(
    errors_deg: Sequence[float] | np.ndarray,
    *,
    zenith: np.ndarray | None = None,
    n_pulses: np.ndarray | None = None,
    event_type: Sequence[str] | np.ndarray | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean, median and percentiles of opening angles with BCa bootstrap intervals, ready for JSON.

    Returns {"n", "level", "mean_deg", "median_deg", "p10", "p25", "p75", "p90", "by"}; each figure is
    {"value", "low", "high"} in degrees. "by" holds, for every grouping given (true zenith in radians, pulses
    per event, a name per event), a list of rows {"bin", "n", "mean_deg", "median_deg"}. Groups without events
    are left out; fewer than 20 events have no interval (low and high are None).

    Raises:
        ValueError: no events, an error that is no angle in [0, 180], or a grouping of another length.
    """
    errors = np.asarray(errors_deg, dtype=np.float64)
    if errors.ndim != 1 or errors.size == 0:
        raise ValueError(f"errors have shape {errors.shape}; need one opening angle per event, at least one event")
    bad = np.flatnonzero(~((errors >= 0) & (errors <= 180)))
    if bad.size:
        raise ValueError(f"error {bad[0]} is {errors[bad[0]]}; an opening angle lies in [0, 180] degrees")

    def figure(values: np.ndarray, stat: Any) -> dict[str, float | None]:
        value = float(stat(values))
        if values.size < FEWEST_FOR_INTERVAL:
            return {"value": value, "low": None, "high": None}
        low, high = bca_interval(values, stat, level=level, resamples=resamples, seed=seed)
        return {"value": value, "low": low, "high": high}

    def rows(name: str, labels: Sequence[str], group_E: np.ndarray) -> list[dict[str, Any]]:
        if group_E.shape != errors.shape:
            raise ValueError(f"{name} has shape {group_E.shape}, the errors {errors.shape}; they must agree")
        groups = [(label, errors[group_E == i]) for i, label in enumerate(labels)]
        return [
            {"bin": label, "n": e.size, "mean_deg": figure(e, np.mean), "median_deg": figure(e, np.median)}
            for label, e in groups
            if e.size
        ]

    by: dict[str, list[dict[str, Any]]] = {}
    if zenith is not None:
        labels = [f"{low}-{high} deg" for low, high in pairwise(ZENITH_EDGES_DEG)]
        by["zenith"] = rows("zenith", labels, np.digitize(np.rad2deg(zenith), ZENITH_EDGES_DEG[1:-1]))
    if n_pulses is not None:
        labels = [f"{low}-{high - 1}" for low, high in pairwise(PULSE_EDGES)] + [f">={PULSE_EDGES[-1]}"]
        by["n_pulses"] = rows("n_pulses", labels, np.digitize(n_pulses, PULSE_EDGES[1:]))
    if event_type is not None:
        names, group_E = np.unique(np.asarray(event_type), return_inverse=True)
        by["type"] = rows("event_type", [str(name) for name in names], group_E)

    return {
        "n": errors.size,
        "level": level,
        "mean_deg": figure(errors, np.mean),
        "median_deg": figure(errors, np.median),
        **{f"p{p}": figure(errors, Quantile(p / 100)) for p in PERCENTILES},
        "by": by,
    }
