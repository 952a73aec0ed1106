"""Is a folder of events like the real data? Its figures beside the published ones of the Kaggle files.

The published figures are those of batch 1 (200,000 real events); the tolerances are this project's own
requirements. The same statistics run on real and simulated, labelled and unlabelled events.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from lab_shared.errors import UserError
from numpy.typing import NDArray

from iceaggr.data.pulses import Pulses
from iceaggr.geometry import N_SENSORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHARGE_GRID = 0.025
"""p.e."""
_LATEST, _MOST_STEPS = 1 << 22, 1 << 22
"""Ends of the time (ns) and charge histograms: what a strange file has beyond counts as this much."""
_N_PULSES: dict[float, float] = {
    0.01: 30,
    0.05: 36,
    0.1: 40,
    0.25: 48,
    0.5: 63,
    0.75: 89,
    0.9: 144,
    0.95: 219,
    0.99: 1130,
}
_N_PULSES |= {0.995: 3320, 0.999: 19553}
_SPAN: dict[float, float] = {
    0.01: 8408,
    0.05: 9114,
    0.1: 9446,
    0.25: 9990,
    0.5: 10965,
    0.75: 12431,
    0.9: 14426,
    0.95: 17532,
}
_SPAN |= {0.99: 21872, 0.999: 28156}
_DOMS: dict[float, float] = {0.5: 49, 0.75: 65, 0.9: 92, 0.95: 120, 0.99: 242, 0.999: 872}
_CHARGE: dict[float, float] = {0.25: 0.775, 0.5: 1.075, 0.75: 1.775}
_PULSES_PER_DOM: dict[float, float] = {0.9: 3, 0.95: 5, 0.99: 43, 0.999: 147}
_TIME: dict[float, float] = {0.25: 10566, 0.5: 11815, 0.75: 13916}
_ZENITH: dict[float, float] = {0.25: 1.005, 0.5: 1.527, 0.75: 2.055}

Statistics = dict[str, float]
"""Name of a figure -> value; names are those of `TARGETS`, plus counts."""


@dataclass(frozen=True)
class Target:
    """A published figure, and how far a simulation may be from it."""

    real: float
    tolerance: float | None = None
    """None: shown, not judged."""
    kind: Literal["relative", "absolute"] = "relative"


def _targets() -> dict[str, Target]:
    targets: dict[str, Target] = {}

    def add(name: str, table: dict[float, float], judged: tuple[float, float], tolerance: float) -> None:
        for q, value in table.items():
            inside = judged[0] <= q <= judged[1]
            targets[quantile_name(name, q)] = Target(value, tolerance if inside else None)

    add("n_pulses", _N_PULSES, (0.05, 0.99), 0.10)
    targets["n_pulses mean"] = Target(164.0)
    add("span", _SPAN, (0.05, 0.95), 0.10)
    targets["span mean"] = Target(11665.0)
    targets["span correlation with n_pulses"] = Target(0.265)
    add("doms", _DOMS, (0.5, 0.5), 0.05)
    targets["doms mean"] = Target(60.6)
    targets["doms with one pulse"] = Target(0.78)
    add("pulses per dom", _PULSES_PER_DOM, (2, 2), 0)
    add("charge", _CHARGE, (0.25, 0.75), 0.15)
    targets["charge mean"] = Target(3.91)
    targets["auxiliary per event"] = Target(0.64, 0.03, "absolute")
    targets["auxiliary per pulse"] = Target(0.28)
    add("time", _TIME, (2, 2), 0)
    targets["time mean"] = Target(13130.0)
    targets["first pulse median"] = Target(6129.0)
    add("zenith", _ZENITH, (2, 2), 0)
    targets["zenith mean"] = Target(1.534)
    targets["zenith std"] = Target(0.690)
    return targets


def quantile_name(name: str, q: float) -> str:
    return f"{name} {100 * q:g}%"


TARGETS = _targets()
"""Real Kaggle data, batch 1: pulses and time spans of all 200,000 events, the rest as public notebooks report
it. Times in ns, charges in p.e., angles in rad."""


class Collector:
    """Running statistics over batches of events; memory grows by a few bytes per event, not per pulse."""

    def __init__(self) -> None:
        self._events: list[NDArray[np.float64]] = []
        self._zenith: list[NDArray[np.float64]] = []
        self._charges = np.zeros(1, dtype=np.int64)
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
        self._times = _add(self._times, np.bincount(time.clip(0, _LATEST)))
        self._per_dom = _add(self._per_dom, np.bincount(np.diff(first, append=len(hit))))
        if pulses.zenith_E is not None:
            self._zenith.append(pulses.zenith_E.cpu().numpy())

    def result(self) -> Statistics:
        """Raises UserError when no event was added."""
        if not self._events:
            raise UserError("no events: the folder's files are empty")
        counts, span, doms, auxiliary, start = np.concatenate(self._events, axis=1)
        out: Statistics = {"events": float(len(counts)), "pulses": float(counts.sum())}
        for name, values, table in (
            ("n_pulses", counts, _N_PULSES),
            ("span", span, _SPAN),
            ("doms", doms, _DOMS),
        ):
            out |= {quantile_name(name, q): float(np.quantile(values, q)) for q in table}
            out[f"{name} mean"] = float(values.mean())
        if counts.std() > 0 and span.std() > 0:
            out["span correlation with n_pulses"] = float(np.corrcoef(counts, span)[0, 1])
        out["n_pulses max"] = float(counts.max())
        out["doms with one pulse"] = float(self._per_dom[1] / self._per_dom.sum())
        for name, histogram, unit, table in (
            ("charge", self._charges, CHARGE_GRID, _CHARGE),
            ("time", self._times, 1.0, _TIME),
            ("pulses per dom", self._per_dom, 1.0, _PULSES_PER_DOM),
        ):
            out |= {quantile_name(name, q): _quantile(histogram, q) * unit for q in table}
            out[f"{name} mean"] = float(histogram @ np.arange(len(histogram)) / histogram.sum() * unit)
        out["charge max"] = (len(self._charges) - 1) * CHARGE_GRID
        out["auxiliary per event"] = float((auxiliary / counts).mean())
        out["auxiliary per pulse"] = float(auxiliary.sum() / counts.sum())
        out["events without coincidence"] = float((auxiliary == counts).sum())
        out["first pulse median"] = float(np.median(start))
        if self._zenith:
            zenith = np.concatenate(self._zenith)
            out |= {quantile_name("zenith", q): float(np.quantile(zenith, q)) for q in _ZENITH}
            out |= {"zenith mean": float(zenith.mean()), "zenith std": float(zenith.std())}
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
    def ratio(self) -> float:
        return self.here / self.real


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
        away = abs(found[name] - target.real) / (target.real if target.kind == "relative" else 1.0)
        ok = None if target.tolerance is None else away <= target.tolerance
        rows.append(Row(name, target.real, found[name], target.tolerance, ok))
    return rows


def table(rows: list[Row]) -> str:
    """The comparison as aligned text."""
    lines = [f"{'quantity':<32}{'real':>10}{'here':>12}{'ratio':>8}  required"]
    for row in rows:
        verdict = ""
        if row.tolerance is not None:
            kind = TARGETS[row.quantity].kind
            allowed = f"{row.tolerance:.0%}" if kind == "relative" else f"{row.tolerance:g}"
            verdict = f"within {allowed}: {'ok' if row.ok else 'NO'}"
        lines.append(f"{row.quantity:<32}{row.real:>10.5g}{row.here:>12.5g}{row.ratio:>8.3f}  {verdict}".rstrip())
    return "\n".join(lines)


def qq_figure(found: Statistics, title: str) -> Figure:
    """Quantiles found against published ones, log-log, for pulses, DOMs, time span and charge. Needs
    matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    figure.suptitle(title)
    panels = (
        ("n_pulses", _N_PULSES, "pulses per event"),
        ("span", _SPAN, "time span (ns)"),
        ("charge", _CHARGE, "charge (p.e.)"),
        ("doms", _DOMS, "hit DOMs per event"),
    )
    for axes, (name, quantiles, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        real = np.array(list(quantiles.values()))
        here = np.array([found[quantile_name(name, q)] for q in quantiles])
        line = np.array([min(real.min(), here.min()), max(real.max(), here.max())])
        axes.fill_between(line, line * 0.9, line * 1.1, color="0.9", label="within 10%")
        axes.plot(line, line, color="0.6", linewidth=1)
        axes.plot(real, here, "o-", markersize=4, color="tab:blue")
        for q, x, y in zip(quantiles, real, here, strict=True):
            axes.annotate(f"{100 * q:g}%", (x, y), xytext=(4, -9), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", yscale="log", xlabel=f"{label}, real", ylabel=f"{label}, here")
        axes.legend(frameon=False, fontsize=8)
    return figure


def save_qq_figure(found: Statistics, path: str | Path, title: str = "Quantiles against the real data") -> None:
    qq_figure(found, title).savefig(path, dpi=120)


def _add(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    if len(a) < len(b):
        a, b = b, a
    total = a.copy()
    total[: len(b)] += b
    return total


def _quantile(histogram: NDArray[np.int64], q: float) -> float:
    """The smallest value with at least a share q of the counts at or below it."""
    return float(np.searchsorted(histogram.cumsum(), q * histogram.sum()))
