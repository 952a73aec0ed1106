"""The report's matplotlib figures: each draws the columns one function of `iceaggr.summaries` returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.plotting import BLUE, GREEN, GREY, PURPLE, RED, axes, style

from iceaggr.summaries import Array, Columns, smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOUR = {"model": BLUE, "line fit": RED, "random": GREY, "ideal": GREEN, "cascade": PURPLE, "track": GREEN}
# Each colour has a line or a marker of its own too: figures are read in grey, and not by all eyes alike.
_DASHED, _DASH_DOTTED, _DOTTED = (0, (4, 2)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1.2))
_LINE: dict[str, Any] = {"line fit": _DASHED, "random": ":", "ideal": _DASH_DOTTED, "cascade": _DASHED}
_MARKER = {"line fit": "s", "cascade": "s", "track": "^"}
_CALIBRATION: dict[str, dict[str, Any]] = {
    "raw": {"color": RED, "linestyle": _DOTTED},
    "temperature": {"color": PURPLE, "linestyle": _DASHED},
    "temperature and levels": {"color": BLUE, "linestyle": "-"},
}
_ANGLE_TICKS = range(0, 181, 30)
_COS_TICKS = (-1, -0.5, 0, 0.5, 1)
_ON_CELLS = "#30363c"  # near INK but not INK: stays dark on a dark page


def curve(
    series: Mapping[str, tuple[Array, Array]],
    ylabel: str,
    *,
    width: float = 4.6,
    references: Mapping[str, float] | None = None,
) -> Figure:
    """Values against optimiser step. `series` maps "train" and "val" to (steps, values).

    Training values scatter from batch to batch: each is drawn faintly and their moving mean on top.
    `references` are horizontal lines.
    """
    with style():
        fig, ax = axes(width, 2.9 if width > 4 else 2.5)
        for split, (steps, values) in series.items():
            if split == "train" and len(values) > 20:
                ax.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.7)
                ax.plot(steps, smooth(values), color=BLUE, label="training")
            elif split == "train":
                ax.plot(steps, values, color=BLUE, label="training")
            else:
                ax.plot(steps, values, color=PURPLE, marker="o", markersize=3.5, label="held-out")
        for name, value in (references or {}).items():
            ax.axhline(value, color=COLOUR[name], linestyle=_LINE[name], linewidth=1.1, label=name)
        ax.set(xlabel="optimiser step", ylabel=ylabel)
        ax.xaxis.set_major_locator(_step_ticks())
        if len(series) > 1 or references:
            ax.legend()
    return fig


def error_density(columns: Columns, medians: Mapping[str, float]) -> Figure:
    """Density of the opening angle; ticks on the axis mark the medians."""
    with style():
        fig, ax = axes()
        edges = np.append(columns["low_deg"], columns["high_deg"][-1])
        for name in _predictors(columns, " density"):
            values, random = columns[f"{name} density"], name == "random"
            if random:
                ax.plot((edges[1:] + edges[:-1]) / 2, values, color=GREY, linestyle=":", label="random")
            else:
                look = {"linewidth": 1.5, "linestyle": _LINE.get(name, "-")}
                ax.stairs(values, edges, color=COLOUR[name], label=f"{name}, median {medians[name]:.1f}°", **look)
                ax.stairs(values, edges, color=COLOUR[name], alpha=0.13, fill=True)
                ax.axvline(medians[name], ymax=0.045, color=COLOUR[name], linewidth=2.5)
        ax.set(xlabel="opening angle (°)", ylabel="density (per °)", xlim=(0, 180), xticks=_ANGLE_TICKS)
        ax.set_ylim(bottom=0)
        ax.legend()
    return fig


def cumulative(columns: Columns, names: Mapping[str, str] | None = None) -> Figure:
    """Fraction of events below an opening angle. `names` maps predictors to legend entries."""
    with style():
        fig, ax = axes()
        for name in _predictors(columns, " cumulative"):
            y = np.append(0.0, columns[f"{name} cumulative"])
            x = np.append(0.0, columns["high_deg"])
            ax.plot(x, y, color=COLOUR[name], label=(names or {}).get(name, name), linestyle=_LINE.get(name, "-"))
        ax.set(xlabel="opening angle (°)", ylabel="fraction of events below")
        ax.set(xlim=(0, 180), ylim=(0, 1), xticks=_ANGLE_TICKS)
        ax.legend(loc="lower right")
    return fig


def resolution(columns: Columns, xlabel: str, *, log: bool = False) -> Figure:
    """Median (line) and 16-84% band of the opening angle against an event property."""
    with style():
        fig, ax = axes()
        for name in _predictors(columns, " median"):
            colour = COLOUR[name]
            band = columns[f"{name} p16"], columns[f"{name} p84"]
            ax.fill_between(columns["x"], *band, color=colour, alpha=0.15, linewidth=0)
            look = {"marker": _MARKER.get(name, "o"), "markersize": 3.5, "linestyle": _LINE.get(name, "-")}
            ax.plot(columns["x"], columns[f"{name} median"], color=colour, label=name, **look)
        if log:
            ax.set_xscale("log")
            log_axis(ax.xaxis, *ax.get_xlim())
        ax.set(xlabel=xlabel, ylabel="opening angle (°)", ylim=(0, 180), yticks=_ANGLE_TICKS)
        ax.legend()
    return fig


def resolution_by_group(table: Columns, xlabel: str, *, log: bool = False) -> Figure:
    """Median opening angle of each group of `iceaggr.resolution.resolution_table`, bars: 95% interval."""
    with style():
        fig, ax = axes()
        for group in dict.fromkeys(table["group"].tolist()):
            rows = table["group"] == group
            x, y = table["x"][rows], table["median"][rows]
            bars = {"yerr": (y - table["median_low"][rows], table["median_high"][rows] - y), "capsize": 2}
            look = {"marker": _MARKER.get(group, "o"), "markersize": 3.5, "linestyle": _LINE.get(group, "-")}
            ax.errorbar(x, y, **bars, **look, color=COLOUR.get(group, BLUE), label=group)
        if log:
            ax.set_xscale("log")
            log_axis(ax.xaxis, *ax.get_xlim())
        ax.set(xlabel=xlabel, ylabel="median opening angle (°)")
        ax.set_ylim(bottom=0)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # above: intervals may reach anywhere inside
    return fig


def coverage(columns: Columns) -> Figure:
    """Share of events inside regions of each probability; the diagonal is calibrated."""
    with style():
        fig, ax = axes()
        ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="ideal")
        for name, look in _CALIBRATION.items():
            ax.plot(columns["level"], columns[name], label=name, **look)
        ax.set(xlabel="probability of the region", ylabel="share of events inside", xlim=(0, 1), ylim=(0, 1))
        ax.legend()
    return fig


def pit_histogram(columns: Columns) -> Figure:
    """Density of u, the probability nearer to the answer than the truth; flat is calibrated."""
    with style():
        fig, ax = axes()
        edges = np.append(columns["low"], 1.0)
        ax.axhline(1, color=GREY, linestyle=":")
        for name, look in _CALIBRATION.items():
            ax.stairs(columns[name], edges, label=name, linewidth=1.4, **look)
        ax.set(xlabel="u (PIT)", ylabel="density", xlim=(0, 1))
        ax.set_ylim(bottom=0)
        ax.legend()
    return fig


def pulls(columns: Columns) -> Figure:
    """Density of the pull beside the two-dimensional Rayleigh law."""
    with style():
        fig, ax = axes()
        edges = np.append(columns["low"], columns["high"][-1])
        for name, look in _CALIBRATION.items():
            ax.stairs(columns[name], edges, label=name, linewidth=1.4, **look)
        middle = (edges[1:] + edges[:-1]) / 2
        ax.plot(middle, columns["rayleigh"], color=GREY, linestyle=":", label="Rayleigh")
        ax.set(xlabel="pull (opening angle in its own σ)", ylabel="density", xlim=(0, edges[-1]))
        ax.set_ylim(bottom=0)
        ax.legend()
    return fig


def promised(columns: Columns) -> Figure:
    """Mean opening angle against the one kappa promises, in bins of kappa; bars: 95% interval of the mean."""
    with style():
        fig, ax = axes()
        top = 1.05 * max(columns["promised raw"].max(), columns["promised calibrated"].max(), columns["mean"].max())
        ax.plot([0, top], [0, top], color=GREY, linestyle=":", label="ideal")
        for name, colour, marker in (("raw", RED, "s"), ("calibrated", BLUE, "o")):
            bars = {"yerr": 1.96 * columns["standard error"], "capsize": 2, "marker": marker, "markersize": 3.5}
            ax.errorbar(columns[f"promised {name}"], columns["mean"], **bars, color=colour, label=name)
        ax.set(xlabel="promised mean opening angle (°)", ylabel="mean opening angle (°)", xlim=(0, top), ylim=(0, top))
        ax.legend()
    return fig


def sharpness(columns: Columns) -> Figure:
    """Mean error of the most confident fraction of the events."""
    with style():
        fig, ax = axes()
        for name in ("model", "line fit", "ideal"):
            if name in columns:
                line = _LINE.get(name, "-")
                ax.plot(columns["fraction"], columns[name], color=COLOUR[name], linestyle=line, label=name)
        ax.set(xlabel="fraction of events kept, most confident first", ylabel="mean opening angle (°)", xlim=(0, 1))
        ax.set_ylim(bottom=0)
        ax.legend()
    return fig


def sky_map(columns: Columns, key: str, label: str, *, signed: bool = False) -> Figure:
    """A column of `summaries.sky` over all true directions: Mollweide, straight down-going on top."""
    longitude = np.radians(np.append(np.unique(columns["azimuth_low_deg"]), 360.0)) - np.pi
    latitude = np.arcsin(np.append(np.unique(columns["cos_zenith_low"]), 1.0))
    values = np.ma.masked_invalid(columns[key].reshape(len(latitude) - 1, len(longitude) - 1))
    # Meridians are curved and a mesh cell has straight sides: each band is drawn as eight thin ones.
    thin = np.interp(np.arange(8 * len(values) + 1) / 8, np.arange(len(latitude)), latitude)
    limit = float(abs(values).max()) if values.count() else 1.0
    scale: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if signed else {"cmap": "viridis_r"}
    with style():
        fig, ax = axes(4.6, 3.0, projection="mollweide")
        mesh = ax.pcolormesh(longitude, thin, values.repeat(8, axis=0), rasterized=True, **scale)
        ax.set_axisbelow(False)
        ax.grid(color=GREY, alpha=0.4, linewidth=0.5)
        ax.set_xticks(np.radians(range(-120, 121, 60)), [f"{a}°" for a in range(60, 301, 60)], fontsize=7.5)
        ax.set_yticks(np.radians(range(60, -61, -30)), [f"{z}°" for z in range(30, 151, 30)], fontsize=7.5)
        for text in ax.get_xticklabels():  # they stand on the cells, not on the page
            text.set(color=_ON_CELLS, path_effects=_halo())
        bar = fig.colorbar(mesh, ax=ax, orientation="horizontal", shrink=0.72, aspect=32, pad=0.04)
        _finish_bar(bar, label)
    return fig


def zenith_response(columns: Columns) -> Figure:
    """Predicted against true cos zenith; each vertical strip of the picture adds up to one."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    edges = np.append(np.unique(columns["true_low"]), 1.0)
    density = np.ma.masked_invalid(columns["density"].reshape(len(edges) - 1, len(edges) - 1).T)
    fade = LinearSegmentedColormap.from_list("fade", [(*to_rgb(BLUE), 0.0), (*to_rgb(BLUE), 1.0)])
    with style():
        fig, ax = axes(4.6, 3.6)
        mesh = ax.pcolormesh(edges, edges, density, vmin=0, cmap=fade, rasterized=True)
        ax.plot([-1, 1], [-1, 1], color=RED, linewidth=1, linestyle=(0, (4, 3)))
        ax.set(xlabel="true cos zenith (1: from above)", ylabel="predicted cos zenith", aspect="equal")
        ax.set(xticks=_COS_TICKS, yticks=_COS_TICKS)
        ax.grid(visible=False)
        _finish_bar(fig.colorbar(mesh, ax=ax, shrink=0.8, aspect=28), "density given the true value")
    return fig


def zenith_bias(columns: Columns) -> Figure:
    """Mean of predicted minus true z component against true cos zenith, with its standard error."""
    with style():
        fig, ax = axes(4.6, 3.6)
        for name in _predictors(columns, " bias"):
            bars = {"yerr": columns[f"{name} standard error"], "capsize": 2, "marker": "o", "markersize": 3.5}
            ax.errorbar(columns["x"], columns[f"{name} bias"], **bars, color=COLOUR[name], label=name)
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set(xlabel="true cos zenith (1: from above)", ylabel="mean of predicted − true z component")
        ax.set(xlim=(-1, 1), xticks=_COS_TICKS)
    return fig


def _predictors(columns: Columns, suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in columns if name.endswith(suffix)]


def _finish_bar(bar: Any, label: str) -> None:
    bar.set_label(label)
    bar.outline.set_visible(False)


def _step_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True)


def log_axis(axis: Any, low: float, high: float) -> None:
    """Log ticks that do not run into each other: 20, 50, 100 on a short range, powers of ten on a long."""
    from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, NullFormatter

    short = high < 300 * low
    shortest = (1, 1.2, 1.5, 2, 3, 5, 7)  # one of them at least falls into the shortest range
    axis.set_major_locator(LogLocator(subs=shortest if high < 6 * low else (1, 2, 5) if short else (1,)))
    axis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}") if short else LogFormatterMathtext()
    )
    axis.set_minor_formatter(NullFormatter())


def _halo() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=1.6, foreground="white")]
