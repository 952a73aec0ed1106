"""Figures of the two models of `iceaggr_trained`: resolution, coverage, importance of features, heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evidence.drawing import Drawing
from evidence.iceaggr_trained import BEST, RUNS, V2, analysis, importance, label
from evidence.record import columns, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = RUNS[V2]
"""Where the figures of both lie."""


def _draw_resolution() -> Figure:
    """Median error against energy, zenith and pulses, tracks and cascades, both models."""
    from iceaggr.resolution import LABELS, select
    from lab_shared.plotting import BLUE, RED, axes, style

    shown = {"energy": True, "cos_zenith": False, "n_pulses": True}
    with style():
        fig, first = axes(9.0, 3.2)
        first.remove()
        panels: Any = fig.subplots(1, len(shown), sharey=True)
        for ax, (quantity, log) in zip(panels, shown.items(), strict=True):
            for (name, folder), line in zip(RUNS.items(), ("--", "-"), strict=True):
                for group, colour in (("track", BLUE), ("cascade", RED)):
                    rows = select(columns(f"{folder}/resolution.csv"), quantity, group)
                    y = rows["median"]
                    bars = {"yerr": (y - rows["median_low"], rows["median_high"] - y), "capsize": 2}
                    look: Any = {"color": colour, "linestyle": line, "marker": "o", "markersize": 3, "linewidth": 1.1}
                    ax.errorbar(rows["x"], y, **bars, **look, label=f"{group}, {name}")
            if log:
                ax.set_xscale("log")
            ax.set(xlabel=LABELS[quantity])
            ax.set_ylim(bottom=0)
        panels[0].set_ylabel("median opening angle (°)")
        fig.suptitle(label(), fontsize=9)
        panels[1].legend(fontsize=7)
    return fig


def _draw_coverage() -> Figure:
    """Share of events inside regions of each nominal probability, less that probability."""
    from lab_shared.plotting import BLUE, GREY, PURPLE, RED, axes, style

    with style():
        fig, first = axes(7.0, 3.0)
        first.remove()
        panels: Any = fig.subplots(1, len(RUNS), sharey=True)
        for ax, (name, folder) in zip(panels, RUNS.items(), strict=True):
            record = read(f"{folder}/calibration.json")
            ax.axhline(0, color=GREY, linestyle=":")
            for step, text, colour, marker in (
                ("raw", "raw kappa", RED, "o"),
                ("calibrated", "kappa / temperature", PURPLE, "s"),
                ("levels", "and nominal levels", BLUE, "^"),
            ):
                rows = record[step]["coverage"]
                level = [row["level"] for row in rows]
                low, high = ([row[end] - row["level"] for row in rows] for end in ("low", "high"))
                less = [row["share"] - row["level"] for row in rows]
                ax.plot(level, less, color=colour, marker=marker, markersize=3.5, label=text)
                ax.fill_between(level, low, high, color=colour, alpha=0.25, linewidth=0)
            ax.set(title=name, xlabel="probability of the region", xlim=(0, 1))
        panels[0].set_ylabel("share inside − probability")
        fig.suptitle(label(), fontsize=9)
        panels[0].legend(fontsize=7)
    return fig


def _draw_importance() -> Figure:
    """Increase of the mean error when groups of features are shuffled, both models."""
    from lab_shared.plotting import BLUE, GREY, RED, axes, style

    found = {name: importance(name) for name in RUNS}
    groups = sorted(found[BEST], key=lambda group: -found[BEST][group][0])
    with style():
        fig, ax = axes(5.6, 0.9 + 0.3 * len(groups))
        for (name, values), colour, shift in zip(found.items(), (RED, BLUE), (-0.2, 0.2), strict=True):
            place = [i + shift for i, group in enumerate(groups) if group in values]
            mean, low, high = zip(*(values[group] for group in groups if group in values), strict=True)
            reach = [[m - x for m, x in zip(mean, low, strict=True)], [x - m for m, x in zip(mean, high, strict=True)]]
            ax.barh(place, mean, height=0.38, color=colour, label=name)
            ax.errorbar(mean, place, xerr=reach, fmt="none", ecolor=GREY, elinewidth=1.1, capsize=2)
        ax.set_yticks(range(len(groups)), groups)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set(xlabel="increase of the mean opening angle when shuffled (°)", title=label())
        ax.legend(loc="center right")
    return fig


def _draw_heads(name: str) -> Figure:
    """Rank correlation of every head's weights with properties of the DOMs."""
    import numpy as np
    from iceaggr.analysis.columns import PROPERTIES
    from iceaggr.analysis.figures import heatmaps

    table = analysis(name)["tables"]["head_specialisation"]["by layer and head"]
    layers = 1 + max(table["layer"])
    panels = {key: np.array(table[f"{key} rho"], float).reshape(layers, -1) for key in PROPERTIES}
    return heatmaps(panels, f"mean ρ, {label()}", signed=True)


_BOTH = [*RUNS.values()]
DRAWINGS = [
    Drawing(f"{SHOWN}/resolution.png", [f"{folder}/resolution.csv" for folder in _BOTH], _draw_resolution),
    Drawing(f"{SHOWN}/coverage.png", [f"{folder}/calibration.json" for folder in _BOTH], _draw_coverage),
    Drawing(f"{SHOWN}/importance.png", [f"{folder}/analysis.json" for folder in _BOTH], _draw_importance),
    Drawing(f"{SHOWN}/heads.png", [f"{RUNS[V2]}/analysis.json"], lambda: _draw_heads(V2)),
]
