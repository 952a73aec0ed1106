"""The report's matplotlib figures: each draws the columns of one table and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.plotting import BLUE, GREEN, GREY, PURPLE, RED, axes, style

from rh_memory.physics import Columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curve(series: Mapping[str, Columns], ylabel: str, references: Mapping[str, float]) -> Figure:
    """Values against optimiser step; `series` maps a split to columns step and value."""
    with style():
        fig, ax = axes()
        for (name, columns), colour in zip(series.items(), (BLUE, PURPLE, GREEN), strict=False):
            alone = "o" if len(columns["step"]) == 1 else None  # a line through one point shows nothing
            ax.plot(columns["step"], columns["value"], color=colour, marker=alone, label=name)
        for name, value in references.items():
            ax.axhline(value, color=GREY, linestyle=(0, (4, 3)), linewidth=1.1, label=name)
        ax.set(xlabel="optimiser step", ylabel=ylabel)
        ax.legend()
    return fig


def ladder(columns: Columns) -> Figure:
    """Baselines and the model as points with intervals, best at the bottom."""
    with style():
        fig, ax = axes(4.6, 0.9 + 0.27 * len(columns["name"]))
        y = np.arange(len(columns["name"]))
        colours = [BLUE if name == "model" else GREY for name in columns["name"]]
        for i, colour in enumerate(colours):
            ax.plot([columns["low"][i], columns["high"][i]], [i, i], color=colour, linewidth=3, alpha=0.5)
            ax.plot(columns["nll_last"][i], i, "o", color=colour, markersize=5)
        ax.set_yticks(y, columns["name"])
        ax.invert_yaxis()
        ax.set(xlabel="nll_last (nats per spacing)")
    return fig


def pit(columns: Columns) -> Figure:
    """PIT histogram with intervals; a calibrated predictor gives 1 everywhere."""
    with style():
        fig, ax = axes()
        edges = np.append(columns["from"], columns["to"][-1])
        ax.stairs(columns["density"], edges, color=BLUE, fill=True, alpha=0.25)
        ax.stairs(columns["density"], edges, color=BLUE)
        middle = (edges[1:] + edges[:-1]) / 2
        ax.vlines(middle, columns["low"], columns["high"], color=BLUE, linewidth=1)
        ax.axhline(1, color=GREY, linestyle=":")
        ax.set(xlabel="probability integral transform", ylabel="density", xlim=(0, 1))
        ax.set_ylim(bottom=0)
    return fig


def coverage(columns: Columns) -> Figure:
    """Observed minus nominal coverage of central intervals."""
    with style():
        fig, ax = axes()
        gap = columns["observed"] - columns["nominal"]
        ax.vlines(
            columns["nominal"], columns["low"] - columns["nominal"], columns["high"] - columns["nominal"], color=BLUE
        )
        ax.plot(columns["nominal"], gap, "o", color=BLUE)
        ax.axhline(0, color=GREY, linestyle=":")
        ax.set(xlabel="nominal coverage", ylabel="observed minus nominal")
    return fig


def context(columns: Columns, references: Mapping[str, float]) -> Figure:
    """NLL against the number of known spacings."""
    with style():
        fig, ax = axes()
        ax.fill_between(columns["context"], columns["low"], columns["high"], color=BLUE, alpha=0.2, linewidth=0)
        ax.plot(columns["context"], columns["nll"], color=BLUE, marker="o", markersize=2.5, label="model")
        for (name, value), colour in zip(references.items(), (GREY, PURPLE, GREEN), strict=False):
            ax.axhline(value, color=colour, linestyle=(0, (4, 3)), linewidth=1.1, label=name)
        ax.set(xlabel="known spacings", ylabel="NLL (nats per spacing)", xscale="log")
        ax.legend()
    return fig


def measured(columns: Columns, x: str, y: str, theory: Mapping[str, str], labels: Mapping[str, Any]) -> Figure:
    """Points `y` against `x` with lines of theory; `theory` maps columns to legend entries."""
    with style():
        fig, ax = axes()
        if "low" in columns:
            ax.fill_between(columns[x], columns["low"], columns["high"], color=BLUE, alpha=0.3, linewidth=0)
        ax.plot(columns[x], columns[y], ".", color=BLUE, markersize=3, label="zeros")
        for (name, title), colour in zip(theory.items(), (RED, GREEN, PURPLE), strict=False):
            ax.plot(columns[x], columns[name], color=colour, linewidth=1.1, label=title)
        ax.set(**labels)
        ax.legend()
    return fig


def form_factor(columns: Columns) -> Figure:
    """Spectral form factor on a logarithmic scale, the lines at log q named."""
    with style():
        fig, ax = axes(9.4, 3.2)
        ax.plot(columns["omega"], columns["K"], color=BLUE, linewidth=0.6, label="zeros")
        ax.plot(columns["omega"], columns["GUE"], color=RED, linewidth=1.1, label="GUE")
        top = columns["K"].max()
        for q in (2, 3, 4, 5, 7, 8, 9, 11, 13, 17, 19, 23, 29, 37, 47):
            ax.annotate(str(q), (math.log(q), top), ha="center", va="bottom", fontsize=7, annotation_clip=False)
        ax.set(xlabel="frequency ω (lines at log q, q prime power)", ylabel="K(ω)", yscale="log")
        ax.set_xlim(0, columns["omega"][-1])
        ax.legend(loc="lower right")
    return fig


def lines(columns: Columns) -> Figure:
    """Line amplitudes at log q in the zeros, the predictions and the residual."""
    with style():
        fig, ax = axes(9.4, 3.2)
        for name, colour, size in (("zeros", GREY, 6), ("model", BLUE, 4), ("residual", RED, 4)):
            ax.errorbar(
                columns["omega"],
                columns[f"{name} cos"],
                1.96 * columns[f"{name} cos error"],
                fmt="o",
                color=colour,
                markersize=size,
                linewidth=0.8,
                label=name,
            )
        prime = columns["kind"] == "prime power"
        order = np.argsort(columns["omega"][prime])
        ax.plot(
            columns["omega"][prime][order],
            columns["theory"][prime][order],
            "_",
            color=GREEN,
            markersize=9,
            label="explicit formula, first order",
        )
        ax.set(xlabel="frequency (log q)", ylabel="amplitude of cos(m log q)")
        ax.legend(ncols=4, loc="upper right")
    return fig


def frequency_use(columns: Columns) -> Figure:
    """What silencing each of the model's frequencies costs."""
    with style():
        fig, ax = axes(9.4, 3.0)
        ax.vlines(columns["frequency"], 0, columns["cost"], color=BLUE, linewidth=1.5)
        ax.vlines(columns["frequency"], columns["low"], columns["high"], color=GREY, linewidth=0.8)
        ax.axhline(0, color=GREY, linewidth=0.7)
        ax.set(xlabel="frequency of the rotated values (log q)", ylabel="cost of silencing (nats)")
    return fig


def bars(columns: Columns, ylabel: str) -> Figure:
    """Costs with intervals, one bar per row; columns name, value, low, high."""
    with style():
        fig, ax = axes()
        x = np.arange(len(columns["name"]))
        ax.bar(x, columns["value"], color=BLUE, alpha=0.4, width=0.6, linewidth=0)
        ax.vlines(x, columns["low"], columns["high"], color=BLUE, linewidth=1.5)
        ax.axhline(0, color=GREY, linewidth=0.7)
        ax.set_xticks(x, columns["name"])
        ax.set(ylabel=ylabel)
    return fig
