"""The numbers behind each report figure: saved arrays in, columns out (one dict of equally long arrays per
figure).

A figure draws exactly these columns and the report writes them as CSV beside it. Angles are degrees unless
the name says otherwise; `errors` maps a predictor's name to its opening angle per event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Columns = dict[str, Array]

MIN_EVENTS = 20
"""Bins with fewer events are left out: their quantiles say more about chance than about the predictor."""


def error_distribution(errors: Mapping[str, Array], width_deg: float = 2.0) -> Columns:
    """Density per degree in bins of `width_deg`, and the fraction of events up to each bin's upper edge.

    "random" is the exact law for an isotropic guess: density sin(psi)/2 per radian, cumulative (1 - cos
    psi)/2.
    """
    edges = np.linspace(0.0, 180.0, round(180 / width_deg) + 1)
    columns = {"low_deg": edges[:-1], "high_deg": edges[1:]}
    for name, error in errors.items():
        share = np.histogram(error, edges)[0] / len(error)
        columns[f"{name} density"] = share / np.diff(edges)
        columns[f"{name} cumulative"] = share.cumsum()
    cumulative = (1 - np.cos(np.radians(edges))) / 2
    columns["random density"] = np.diff(cumulative) / np.diff(edges)
    columns["random cumulative"] = cumulative[1:]
    return columns


def quantile_edges(x: Array, levels: Sequence[float]) -> Array:
    """At least two bin edges, at these quantiles of x; equal ones are merged."""
    edges = np.unique(np.quantile(x, levels))
    return edges if len(edges) > 1 else np.array([edges[0], np.nextafter(edges[0], np.inf)])


def resolution(x: Array, errors: Mapping[str, Array], edges: Array) -> Columns:
    """Median and 16-84% band of each error in bins edges[i] <= x < edges[i + 1] (last one closed).

    Bins with fewer than MIN_EVENTS events are dropped. `x` is the median of x in the bin.
    """
    rows_of = _bin_rows(x, edges)
    columns: Columns = {
        "low": edges[:-1][list(rows_of)],
        "high": edges[1:][list(rows_of)],
        "x": np.array([np.median(x[rows]) for rows in rows_of.values()]),
        "events": np.array([len(rows) for rows in rows_of.values()], dtype=np.int64),
    }
    for name, error in errors.items():
        bands = np.array([np.quantile(error[rows], (0.16, 0.5, 0.84)) for rows in rows_of.values()]).reshape(-1, 3)
        columns |= {f"{name} p16": bands[:, 0], f"{name} median": bands[:, 1], f"{name} p84": bands[:, 2]}
    return columns


def sharpness(kappa: Array, errors: Mapping[str, Array], steps: int = 100) -> Columns:
    """Mean error of the events with the largest kappa, against the fraction of events kept (1/steps .. 1).

    Every predictor is averaged over the same kept events. "ideal" keeps the events on which the first
    predictor is in truth best: no confidence can do better.
    """
    fraction = np.arange(1, steps + 1) / steps
    kept = np.maximum(1, np.round(fraction * len(kappa)).astype(np.int64))
    order = np.argsort(-kappa, kind="stable")

    def mean_of_first(values: Array) -> Array:
        return values.cumsum(dtype=np.float64)[kept - 1] / kept

    columns: Columns = {"fraction": fraction, "events": kept, "kappa": kappa[order][kept - 1]}
    columns |= {name: mean_of_first(error[order]) for name, error in errors.items()}
    return columns | {"ideal": mean_of_first(np.sort(next(iter(errors.values()))))}


def sky(azimuth: Array, zenith: Array, error_deg: Array, pred_zenith: Array) -> Columns:
    """Error and zenith bias in cells of equal solid angle of the true direction (azimuth, zenith in rad).

    One row per cell, azimuth fastest; values of cells with fewer than MIN_EVENTS events are NaN. The bias is
    the mean of predicted minus true zenith: positive where events are reconstructed too much from below. The
    grid is the finest of 36 x 18, 24 x 12 and 12 x 6 with three times MIN_EVENTS events per cell on average.
    """
    n_azimuth, n_cos = next(((a, c) for a, c in ((36, 18), (24, 12)) if len(zenith) >= 3 * MIN_EVENTS * a * c), (12, 6))
    column = (np.mod(azimuth, 2 * np.pi) / (2 * np.pi) * n_azimuth).astype(np.int64) % n_azimuth
    row = np.clip(((1 + np.cos(zenith)) / 2 * n_cos).astype(np.int64), 0, n_cos - 1)
    cell, cells = row * n_azimuth + column, n_azimuth * n_cos
    events = np.bincount(cell, minlength=cells)

    def mean(values: Array) -> Array:
        total = np.bincount(cell, weights=values, minlength=cells)
        return np.where(events >= MIN_EVENTS, total / np.maximum(events, 1), np.nan)

    azimuth_edges, cos_edges = np.linspace(0, 360, n_azimuth + 1), np.linspace(-1, 1, n_cos + 1)
    return {
        "azimuth_low_deg": np.tile(azimuth_edges[:-1], n_cos),
        "azimuth_high_deg": np.tile(azimuth_edges[1:], n_cos),
        "cos_zenith_low": np.repeat(cos_edges[:-1], n_azimuth),
        "cos_zenith_high": np.repeat(cos_edges[1:], n_azimuth),
        "events": events,
        "mean error": mean(error_deg),
        "zenith bias": mean(np.degrees(pred_zenith - zenith)),
    }


def zenith_response(zenith: Array, pred_zenith: Array, bins: int = 30) -> Columns:
    """Where events of a given true cos zenith end up: one row per cell, predicted fastest (angles in rad).

    `density` is the probability per unit of predicted cos zenith given the bin of the true one (0.5
    everywhere for an isotropic guess, NaN in bins of the true one with fewer than MIN_EVENTS events).
    """
    edges = np.linspace(-1, 1, bins + 1)
    counts, _, _ = np.histogram2d(np.cos(zenith), np.cos(pred_zenith), bins=(edges, edges))
    per_true = counts.sum(axis=1, keepdims=True)
    density = np.where(per_true >= MIN_EVENTS, counts / np.maximum(per_true, 1) / (2 / bins), np.nan)
    return {
        "true_low": np.repeat(edges[:-1], bins),
        "true_high": np.repeat(edges[1:], bins),
        "predicted_low": np.tile(edges[:-1], bins),
        "predicted_high": np.tile(edges[1:], bins),
        "events": counts.ravel().astype(np.int64),
        "density": density.ravel(),
    }


def zenith_bias(zenith: Array, pred_zenith: Array, bins: int = 12) -> Columns:
    """Mean of predicted minus true z component of the unit vector by true cos zenith (angles in rad).

    Any predictor that is unsure shrinks towards the horizon, so the sign changes with the hemisphere; the
    standard error is that of the mean in the bin. Bins with fewer than MIN_EVENTS events are dropped.
    """
    z, residual = np.cos(zenith), np.cos(pred_zenith) - np.cos(zenith)
    edges = np.linspace(-1, 1, bins + 1)
    rows_of = _bin_rows(z, edges)
    return {
        "low": edges[:-1][list(rows_of)],
        "high": edges[1:][list(rows_of)],
        "x": np.array([z[rows].mean() for rows in rows_of.values()]),
        "events": np.array([len(rows) for rows in rows_of.values()], dtype=np.int64),
        "model bias": np.array([residual[rows].mean() for rows in rows_of.values()]),
        "model standard error": np.array(
            [residual[rows].std(ddof=1) / np.sqrt(len(rows)) for rows in rows_of.values()]
        ),
    }


def smooth(values: Array) -> Array:
    """Centred moving mean over about 1/25 of the points; near the ends over the points there are."""
    reach = max(1, len(values) // 50)
    total = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    i = np.arange(len(values))
    low, high = np.maximum(i - reach, 0), np.minimum(i + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _bin_rows(x: Array, edges: Array) -> dict[int, Array]:
    """Rows of x in each bin edges[i] <= x < edges[i + 1] (last one closed) that has MIN_EVENTS of them."""
    bin_of = np.searchsorted(edges, x, side="right") - 1
    bin_of[x == edges[-1]] = len(edges) - 2
    rows_of = {i: np.flatnonzero(bin_of == i) for i in range(len(edges) - 1)}
    return {i: rows for i, rows in rows_of.items() if len(rows) >= MIN_EVENTS}
