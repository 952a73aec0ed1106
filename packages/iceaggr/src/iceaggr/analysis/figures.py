"""The kinds of figure the analyses draw, from arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.plotting import BLUE, CYAN, GREEN, GREY, PURPLE, RED, YELLOW, axes, style

from iceaggr.summaries import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (BLUE, RED, GREEN, PURPLE, CYAN, YELLOW, GREY)
# A line and a marker of its own for each, so that a figure can be read without its colours.
_LINES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)), (0, (2, 2)))
_MARKERS = "os^Dv<>"


def bars(
    names: Sequence[str], values: Array, xlabel: str, *, low: Array | None = None, high: Array | None = None
) -> Figure:
    """Horizontal bars from top to bottom, with intervals [low, high] where given."""
    with style():
        fig, ax = axes(4.6, 0.9 + 0.2 * len(names))
        place = np.arange(len(names))
        ax.barh(place, values, color=BLUE, height=0.7)
        if low is not None and high is not None:
            reach = np.abs(np.stack([values - low, high - values]))
            ax.errorbar(values, place, xerr=reach, fmt="none", ecolor=GREY, elinewidth=1.2, capsize=2)
        ax.set_yticks(place, names)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.set(xlabel=xlabel)
    return fig


def lines(
    x: Sequence[str],
    curves: Mapping[str, Array],
    ylabel: str,
    *,
    errors: Mapping[str, Array] | None = None,
    reference: float | None = None,
    log: bool = False,
    xlabel: str = "",
) -> Figure:
    """Curves over named places, with error bars where given, and a level to compare with."""
    with style():
        fig, ax = axes(4.6, 3.1)
        place = np.arange(len(x))
        for i, (name, values) in enumerate(curves.items()):
            look = _look(i) | {"label": name, "marker": _MARKERS[i % len(_MARKERS)], "markersize": 3.5}
            known = place[: len(values)]  # a shorter model has fewer layers
            ax.errorbar(known, values, yerr=None if errors is None else errors[name], capsize=2, **look)
        if reference is not None:
            ax.axhline(reference, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
        if log:
            ax.set_yscale("log")
        turned = {"rotation": 30, "ha": "right"} if sum(map(len, x)) > 50 else {}
        ax.set_xticks(place, x, **turned)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if len(curves) > 1:
            ax.legend(ncols=2 if len(curves) > 4 else 1)
    return fig


def heatmaps(panels: Mapping[str, Array], label: str, *, signed: bool) -> Figure:
    """One panel (layers down, heads across) per name, on one scale."""
    from matplotlib.figure import Figure

    limit = max(1e-9, max(float(np.nanmax(np.abs(values), initial=0)) for values in panels.values()))
    look: dict[str, Any] = {"cmap": "RdBu_r" if signed else "cividis", "vmin": -limit if signed else 0, "vmax": limit}
    layers, heads = next(iter(panels.values())).shape
    with style():
        fig = Figure(figsize=(max(4.6, 1.0 + len(panels) * 2.1), 1.3 + 0.25 * layers), layout="constrained")
        grid = fig.subplots(1, len(panels), squeeze=False)[0]
        for ax, (name, values) in zip(grid, panels.items(), strict=True):
            image = ax.imshow(values, aspect="auto", **look)
            ax.set(title=name, xlabel="head", xticks=range(heads), yticks=range(layers))
            ax.grid(visible=False)
        grid[0].set_ylabel("layer")
        fig.colorbar(image, ax=grid, shrink=0.9, label=label).outline.set_visible(False)
    return fig


def spectra(curves: Mapping[str, Array], ylabel: str) -> Figure:
    """Falling sequences on a logarithmic axis, each against its rank as a share of its length."""
    with style():
        fig, ax = axes()
        for i, (name, values) in enumerate(curves.items()):
            ax.plot((np.arange(len(values)) + 1) / len(values), values, **_look(i), label=name)
        ax.set_yscale("log")
        ax.set(xlabel="rank / number of values", ylabel=ylabel, xlim=(0, 1))
        ax.legend()
    return fig


def cumulatives(edges_deg: Array, shares: Mapping[str, Array]) -> Figure:
    """Fraction of events below an opening angle, a curve per name."""
    with style():
        fig, ax = axes()
        for i, (name, share) in enumerate(shares.items()):
            ax.plot(edges_deg, share, **_look(i), label=name)
        ax.set(xlabel="opening angle (°)", ylabel="fraction of events below", xlim=(0, 180), ylim=(0, 1))
        ax.set_xticks(range(0, 181, 30))
        ax.legend(loc="lower right")
    return fig


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": _LINES[i % len(_LINES)]}
