"""Figures of neutrino directions, drawn from the quick run's evaluation, the record of realism and the ablations."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from evidence import iceaggr_ablations, iceaggr_trained_figures
from evidence.drawing import Drawing
from evidence.iceaggr import RESULTS, evaluation
from evidence.record import read

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def error_quantiles() -> Figure:
    """Quantiles of the quick run's errors, with their intervals over events."""
    from lab_shared.plotting import BLUE, GREY, RED, axes, style

    predictors = evaluation("quick-cpu-seed0")["predictors"]
    shown = {"p10": 0.10, "p25": 0.25, "median_deg": 0.50, "p75": 0.75, "p90": 0.90}
    with style():
        fig, ax = axes()
        for name, text, colour in (("model", "model", BLUE), ("linefit", "line fit", RED), ("random", "random", GREY)):
            quantiles = [predictors[name][key] for key in shown]
            x = [q["value"] for q in quantiles]
            spread = [[q["value"] - q["low"] for q in quantiles], [q["high"] - q["value"] for q in quantiles]]
            ax.errorbar(x, list(shown.values()), xerr=spread, color=colour, marker="o", markersize=3.5, label=text)
        ax.set(xlabel="opening angle (°)", ylabel="fraction of events below", xlim=(0, 180), ylim=(0, 1))
        ax.legend(loc="lower right")
    return fig


def resolution_by_pulses() -> Figure:
    """Median error of the quick run's model in bins of pulses, with intervals over events."""
    from lab_shared.plotting import BLUE, axes, style

    bins = evaluation("quick-cpu-seed0")["by"]["n_pulses"]
    medians = [row["median_deg"] for row in bins]
    with style():
        fig, ax = axes()
        spread = [[m["value"] - m["low"] for m in medians], [m["high"] - m["value"] for m in medians]]
        ax.errorbar(range(len(bins)), [m["value"] for m in medians], yerr=spread, color=BLUE, marker="o", capsize=2)
        ax.set_xticks(range(len(bins)), [row["bin"] for row in bins], rotation=30)
        ax.set(xlabel="pulses in the event", ylabel="median opening angle (°)")
        ax.set_ylim(bottom=0)
    return fig


def qq() -> Figure:
    """Quantiles of simulated events against the published ones; grey: within 10 %."""
    from lab_shared.plotting import BLUE, GREY, axes, style

    rows = read(f"{RESULTS}/realism/inspect.json")["comparison"]
    panels = {
        "n_pulses": "pulses per event",
        "span": "time span (ns)",
        "charge": "charge (p.e.)",
        "doms": "hit DOMs per event",
    }
    with style():
        fig, first = axes(8.0, 7.0)
        first.remove()
        for ax, (name, label) in zip(fig.subplots(2, 2).flat, panels.items(), strict=True):
            quantiles = [row for row in rows if re.fullmatch(rf"{name} [\d.]+%", row["quantity"]) and row["real"] > 0]
            real, here = ([row[key] for row in quantiles] for key in ("real", "here"))
            line = [min(real + here), max(real + here)]
            ax.fill_between(line, [0.9 * x for x in line], [1.1 * x for x in line], color=GREY, alpha=0.25, linewidth=0)
            ax.plot(real, here, "o-", color=BLUE, markersize=4)
            for row in quantiles:
                place = (row["real"], row["here"])
                level = row["quantity"].rsplit(" ", 1)[-1]
                ax.annotate(level, place, xytext=(4, -9), textcoords="offset points", fontsize=7)
            ax.set(xscale="log", yscale="log", xlabel=f"{label}, real", ylabel=f"{label}, simulated")
    return fig


_QUICK = f"{RESULTS}/quick-cpu-seed0"
DRAWINGS = [
    Drawing(f"{_QUICK}/error_cumulative.png", [f"{_QUICK}/evaluation.json"], error_quantiles),
    Drawing(f"{_QUICK}/resolution_n_pulses.png", [f"{_QUICK}/evaluation.json"], resolution_by_pulses),
    Drawing(f"{RESULTS}/realism/qq.png", [f"{RESULTS}/realism/inspect.json"], qq),
    *iceaggr_ablations.DRAWINGS,
    *iceaggr_trained_figures.DRAWINGS,
]
