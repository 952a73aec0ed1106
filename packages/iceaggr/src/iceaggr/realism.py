"""Is a folder of events like the real data? Its figures beside the published ones of the Kaggle files.

The published figures are those of batch 1 (200,000 real events); the tolerances are this project's own
requirements. The same statistics run on real and simulated, labelled and unlabelled events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lab_shared.errors import UserError
from numpy.typing import NDArray

from iceaggr.data.pulses import Pulses
from iceaggr.geometry import N_SENSORS
from iceaggr.published import (
    AUXILIARY_CHARGE,
    AZIMUTH,
    CHARGE,
    CHARGE_GRID,
    CLASSES,
    DOMS,
    HLC_CHARGE,
    N_PULSES,
    PULSES_PER_DOM,
    SPAN,
    TAIL_FROM,
    TARGETS,
    TIME,
    ZENITH,
    quantile_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LATEST, _MOST_STEPS = 1 << 22, 1 << 22
"""Ends of the time (ns) and charge histograms: what a strange file has beyond counts as this much."""
Statistics = dict[str, float]
"""Name of a figure -> value; names are those of `TARGETS`, plus counts."""


class Collector:
    """Running statistics over batches of events; memory grows by a few bytes per event, not per pulse."""

    def __init__(self) -> None:
        self._events: list[NDArray[np.float64]] = []
        self._zenith: list[NDArray[np.float64]] = []
        self._azimuth: list[NDArray[np.float64]] = []
        self._charges = np.zeros(1, dtype=np.int64)
        self._auxiliary_charges = np.zeros(1, dtype=np.int64)
        self._times = np.zeros(1, dtype=np.int64)
        self._per_dom = np.zeros(1, dtype=np.int64)

    def add(self, pulses: Pulses) -> None:
        if not pulses.n_events:
            return
        offsets = pulses.offsets_E1.cpu().numpy()
        time = pulses.time_P.cpu().numpy().astype(np.int64)
        counts = np.diff(offsets)
        event = np.repeat(np.arange(len(counts)), counts)
        hit = np.sort(event * N_SENSORS + pulses.sensor_P.cpu().numpy())
        first = np.flatnonzero(np.diff(hit, prepend=-1))
        doms = np.bincount(hit[first] // N_SENSORS, minlength=len(counts))
        auxiliary = np.bincount(event, weights=pulses.auxiliary_P.cpu().numpy(), minlength=len(counts))
        start, end = time[offsets[:-1]], time[offsets[1:] - 1]
        self._events.append(np.stack((counts, end - start, doms, auxiliary, start)).astype(np.float64))
        steps = np.rint(pulses.charge_P.cpu().numpy() / CHARGE_GRID).astype(np.int64)
        self._charges = _add(self._charges, np.bincount(steps.clip(max=_MOST_STEPS)))
        isolated = steps[pulses.auxiliary_P.cpu().numpy()]
        self._auxiliary_charges = _add(self._auxiliary_charges, np.bincount(isolated.clip(max=_MOST_STEPS)))
        self._times = _add(self._times, np.bincount(time.clip(0, _LATEST)))
        self._per_dom = _add(self._per_dom, np.bincount(np.diff(first, append=len(hit))))
        if pulses.zenith_E is not None:
            self._zenith.append(pulses.zenith_E.cpu().numpy())
        if pulses.azimuth_E is not None:
            self._azimuth.append(pulses.azimuth_E.cpu().numpy())

    def result(self) -> Statistics:
        """Raises UserError when no event was added."""
        if not self._events:
            raise UserError("no events: the folder's files are empty")
        counts, span, doms, auxiliary, start = np.concatenate(self._events, axis=1)
        out: Statistics = {"events": float(len(counts)), "pulses": float(counts.sum())}
        for name, values, table in (
            ("n_pulses", counts, N_PULSES),
            ("span", span, SPAN),
            ("doms", doms, DOMS),
        ):
            out |= {quantile_name(name, q): float(np.quantile(values, q)) for q in table}
            out[f"{name} mean"] = float(values.mean())
        if counts.std() > 0 and span.std() > 0:
            out["span correlation with n_pulses"] = float(np.corrcoef(counts, span)[0, 1])
        out |= {"n_pulses max": float(counts.max()), "n_pulses std": float(counts.std())}
        for name, (low, high, _) in CLASSES.items():
            out[f"events {name} pulses"] = float(((counts >= low) & (counts < high)).mean())
        out["events above 1,000 pulses"] = float((counts > 1000).mean())
        if (tail := counts[counts > TAIL_FROM]).size:
            # maximum likelihood for a density ~ n^-alpha above the threshold (Hill's estimator)
            out["n_pulses tail exponent"] = float(1 + 1 / np.log(tail / TAIL_FROM).mean())
        out["doms with one pulse"] = float(self._per_dom[1] / self._per_dom.sum())
        out["doms with at most 16 pulses"] = float(self._per_dom[:17].sum() / self._per_dom.sum())
        coincident = _add(self._charges, -self._auxiliary_charges)
        for name, histogram, table in (
            ("auxiliary charge", self._auxiliary_charges, AUXILIARY_CHARGE),
            ("coincident charge", coincident, HLC_CHARGE),
        ):
            if histogram.any():
                out |= {quantile_name(name, q): _quantile(histogram, q) * CHARGE_GRID for q in table}
        for name, histogram, unit, table in (
            ("charge", self._charges, CHARGE_GRID, CHARGE),
            ("time", self._times, 1.0, TIME),
            ("pulses per dom", self._per_dom, 1.0, PULSES_PER_DOM),
        ):
            out |= {quantile_name(name, q): _quantile(histogram, q) * unit for q in table}
            out[f"{name} mean"] = float(histogram @ np.arange(len(histogram)) / histogram.sum() * unit)
        values = np.arange(len(self._charges)) * CHARGE_GRID
        spread = self._charges @ (values - out["charge mean"]) ** 2 / self._charges.sum()
        out |= {"charge std": float(np.sqrt(spread)), "charge max": float(values[-1])}
        out |= {"charge min": float(values[self._charges > 0][0]), "time max": float(len(self._times) - 1)}
        out["auxiliary per event"] = float((auxiliary / counts).mean())
        out["auxiliary per pulse"] = float(auxiliary.sum() / counts.sum())
        out["events without coincidence"] = float((auxiliary == counts).sum())
        out |= {"first pulse median": float(np.median(start)), "first pulse min": float(start.min())}
        if self._zenith:
            zenith = np.concatenate(self._zenith)
            out |= {quantile_name("zenith", q): float(np.quantile(zenith, q)) for q in ZENITH}
            out |= {"zenith mean": float(zenith.mean()), "zenith std": float(zenith.std())}
        if self._azimuth:
            azimuth = np.concatenate(self._azimuth)
            out |= {quantile_name("azimuth", q): float(np.quantile(azimuth, q)) for q in AZIMUTH}
        return out


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    quantity: str
    real: float
    here: float
    tolerance: float | None
    ok: bool | None
    """None: no requirement."""

    @property
    def ratio(self) -> float | None:
        """None where the published figure is 0."""
        return self.here / self.real if self.real else None


def statistics(batches: Iterable[Pulses]) -> Statistics:
    """The figures of `TARGETS` (zenith only for labelled events) and some counts, over any number of batches.

    Times in ns, charges in p.e., angles in rad. "doms with one pulse" and "pulses per dom" are over hit DOMs.
    Raises UserError when there is no event.
    """
    collector = Collector()
    for pulses in batches:
        collector.add(pulses)
    return collector.result()


def compare(found: Statistics) -> list[Row]:
    """Every published figure beside the one found; figures that could not be found (zenith) are left out."""
    rows = []
    for name, target in TARGETS.items():
        if name not in found:
            continue
        scale = target.real if target.kind == "relative" else 1.0
        ok = None if target.tolerance is None else abs(found[name] - target.real) <= target.tolerance * scale
        rows.append(Row(name, target.real, found[name], target.tolerance, ok))
    return rows


def table(rows: list[Row]) -> str:
    """The comparison as aligned text."""
    lines = [f"{'quantity':<32}{'real':>10}{'here':>12}{'ratio':>8}  required"]
    for row in rows:
        verdict, ratio = "", "" if row.ratio is None else f"{row.ratio:.3f}"
        if row.tolerance is not None:
            kind = TARGETS[row.quantity].kind
            allowed = f"{row.tolerance:.0%}" if kind == "relative" else f"{row.tolerance:g}"
            verdict = f"within {allowed}: {'ok' if row.ok else 'NO'}"
        lines.append(f"{row.quantity:<32}{row.real:>10.5g}{row.here:>12.5g}{ratio:>8}  {verdict}".rstrip())
    return "\n".join(lines)


def qq_figure(found: Statistics, title: str) -> Figure:
    """Quantiles found against published ones, log-log, for pulses, DOMs, time span and charge. Needs
    matplotlib."""
    from lab_shared.plotting import BLUE, GREY, INK, style
    from matplotlib.figure import Figure

    from iceaggr.figures import log_axis

    panels = (
        ("n_pulses", N_PULSES, "pulses per event"),
        ("span", SPAN, "time span (ns)"),
        ("charge", CHARGE, "charge (p.e.)"),
        ("doms", DOMS, "hit DOMs per event"),
    )
    with style():
        figure = Figure(figsize=(9, 8), layout="constrained")
        figure.suptitle(title, color=INK)
        for axes, (name, published, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            quantiles = dict(sorted(published.items()))  # the extremes stand last in the tables
            real = np.array(list(quantiles.values()))
            here = np.array([found[quantile_name(name, q)] for q in quantiles])
            line = np.array([min(real.min(), here.min()), max(real.max(), here.max())])
            axes.fill_between(line, line * 0.9, line * 1.1, color=GREY, alpha=0.25, linewidth=0, label="within 10%")
            axes.plot(line, line, color=GREY, linewidth=1)
            axes.plot(real, here, "o-", markersize=4, color=BLUE)
            for q, x, y in _apart(quantiles, real, here):
                axes.annotate(f"{100 * q:g}%", (x, y), xytext=(5, -9), textcoords="offset points", fontsize=7.5)
            axes.set(xscale="log", yscale="log", xlabel=f"{label}, real", ylabel=f"{label}, here")
            for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                log_axis(axis, *limits)
            axes.legend()
    return figure


def _apart(levels: Iterable[float], x: NDArray[np.float64], y: NDArray[np.float64]) -> list[tuple[float, float, float]]:
    """The levels with their places, without those too close to the one before for a label of their own."""
    reach, kept = 0.06 * np.log(x.max() / x.min()), []
    last = -np.inf
    for level, here, there in zip(levels, x.tolist(), y.tolist(), strict=True):
        if np.log(here) - last >= reach:
            kept.append((level, here, there))
            last = np.log(here)
    return kept


def save_qq_figure(found: Statistics, path: str | Path, title: str = "Quantiles against the real data") -> None:
    from lab_shared.files import atomic_write
    from lab_shared.plotting import to_png

    atomic_write(Path(path), to_png(qq_figure(found, title), dpi=120))


def _add(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    if len(a) < len(b):
        a, b = b, a
    total = a.copy()
    total[: len(b)] += b
    return total


def _quantile(histogram: NDArray[np.int64], q: float) -> float:
    """The smallest value with at least a share q of the counts at or below it."""
    return float(np.searchsorted(histogram.cumsum(), q * histogram.sum()))
