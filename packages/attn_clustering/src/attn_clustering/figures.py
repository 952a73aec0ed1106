"""The report's matplotlib figures: each draws the rows (one dictionary per point) that its CSV file lists."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.plotting import BLUE, CYAN, GREEN, GREY, INK, PURPLE, RED, YELLOW, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
COLOUR = {
    "shuffled": BLUE,
    "topic_ordered": RED,
    "random_blocks": GREEN,
    "homogeneous_blocks": PURPLE,
    "reversed": YELLOW,
    "interleaved": CYAN,
}
DASH: dict[str, Any] = {"rope": "-", "drope": (0, (4, 2)), "extra": (0, (1, 1.5)), "nope": (0, (6, 2, 1, 2))}
PHASE = {"rope": "RoPE", "drope": "after DroPE", "extra": "RoPE, extra steps", "nope": "NoPE"}


def loss_curves(rows: Rows, levels: Mapping[str, float]) -> Figure:
    """Validation loss against step, a panel per attention variant, a line per condition: mean over seeds."""
    with style():
        fig, axes = _panels(_values(rows, "attention"), height=3.3)
        for attention, ax in axes.items():
            for part in _groups(_where(rows, attention=attention), "ordering", "phase"):
                steps, mean, low, high = _over_seeds(part, "step", "loss")
                _line(ax, part[0], steps, mean, low, high)
            _levels(ax, levels)
            ax.set(xlabel="optimiser step", title=attention)
        _legend(axes, "validation loss (nats)")
    return fig


def probe_curves(rows: Rows, floor: float, ceiling: float | None) -> Figure:
    """Probe accuracy by place, mean and range over seeds, between the token floor and the Bayes ceiling."""
    with style():
        fig, axes = _panels(_values(rows, "attention"), height=3.3)
        for attention, ax in axes.items():
            ax.axhspan(0, floor, color=GREY, alpha=0.15, linewidth=0, label="a token alone")
            if ceiling is not None:
                ax.axhspan(ceiling, 1, color=GREY, alpha=0.3, linewidth=0, label="beyond the Bayes filter")
            for part in _groups(_where(rows, attention=attention), "ordering", "phase"):
                _line(ax, part[0], *_over_seeds(part, "place", "accuracy"), marker="o", markersize=3)
            ax.set(xlabel="after block (0: embedding)", title=attention)
            _whole_numbers(ax.xaxis)
            values = [row["accuracy"] for row in rows] + [floor]
            ax.set_ylim(max(0.0, min(values) - 0.05), min(1.0, max([*values, ceiling or 0]) + 0.05))
        _legend(axes, "topic probe accuracy")
    return fig


def boundary_response(rows: Rows) -> Figure:
    """Probe accuracy in the middle blocks against tokens since the topic changed, beside the Bayes filter."""
    with style():
        fig, axes = _panels(_values(rows, "attention"), height=3.1)
        for attention, ax in axes.items():
            for part in _groups(_where(rows, attention=attention), "ordering", "phase"):
                name, known = part[0]["ordering"], {"Bayes filter": INK, "token": GREY}
                x, *curve = _over_seeds(part, "distance", "accuracy")
                if name in known:
                    ax.plot(np.add(x, 1), curve[0], color=known[name], linewidth=1.2, label=name)
                else:
                    _line(ax, part[0], np.add(x, 1), *curve, marker="o", markersize=3)
            ax.set_xscale("log", base=2)
            ax.set(xlabel="tokens of the new topic seen", title=attention)
        _legend(axes, "topic named correctly")
    return fig


def before_after(rows: Rows) -> Figure:
    """What removing the positions does: one panel per metric, a line per run from RoPE to DroPE."""
    with style():
        fig, axes = _panels(_values(rows, "metric"), height=3.0, share=False)
        for metric, ax in axes.items():
            for row in _where(rows, metric=metric):
                dash = "-" if row["attention"] == "mha" else DASH["drope"]
                label = f"{row['ordering']}, {row['attention']}"
                points = [row["before"], row["after"]]
                ax.plot(
                    [0, 1],
                    points,
                    color=COLOUR[row["ordering"]],
                    linestyle=dash,
                    marker="o",
                    markersize=3.5,
                    label=label,
                )
            ax.set_xticks([0, 1], ["RoPE", "DroPE"])
            ax.set_title(metric, fontsize=8)
            ax.set_xlim(-0.2, 1.2)
            ax.yaxis.set_major_formatter("{x:g}")
        _legend(axes, "")
    return fig


def seed_scatter(rows: Rows, label: str, levels: Mapping[str, float] | None = None) -> Figure:
    """One point per seed and ordering; a line joins the runs of a seed, which share weights and data.

    levels: reference values, drawn dotted.
    """
    orderings = _values(rows, "ordering")
    with style():
        names = [(row["attention"], row["phase"]) for row in rows]
        fig, axes = _panels(list(dict.fromkeys(names)), height=3.3, width=2.6)
        first = next(iter(axes.values()))
        for (attention, phase), ax in axes.items():
            part = _where(rows, attention=attention, phase=phase)
            for seed in _values(part, "seed"):
                line = {row["ordering"]: row["value"] for row in _where(part, seed=seed)}
                x = [i for i, name in enumerate(orderings) if name in line]
                ax.plot(x, [line[orderings[i]] for i in x], color=GREY, linewidth=0.9, zorder=1)
            for i, name in enumerate(orderings):
                values = [row["value"] for row in _where(part, ordering=name)]
                ax.scatter([i] * len(values), values, color=COLOUR[name], s=22, zorder=2)
            ax.set_xticks(range(len(orderings)), [name.replace("_", "\n") for name in orderings])
            ax.set(title=f"{attention}, {PHASE[phase]}", xlim=(-0.4, len(orderings) - 0.6))
            _levels(ax, levels or {}, named=ax is first)
        first.set_ylabel(label)
    return fig


def head_maps(rows: Rows, key: str, label: str) -> Figure:
    """Layer x head, one panel per run, one symmetric colour scale."""
    names = _values(rows, "run")
    limit = max((abs(row[key]) for row in rows if np.isfinite(row[key])), default=1.0) or 1.0
    columns = min(4, len(names))
    with style():
        from matplotlib.figure import Figure

        lines = -(-len(names) // columns)
        fig = Figure(figsize=(1.3 + 1.9 * columns, 0.4 + 1.9 * lines), layout="constrained")
        grid = fig.subplots(lines, columns, squeeze=False).ravel()
        for ax in grid[len(names) :]:
            ax.set_visible(False)
        for name, ax in zip(names, grid, strict=False):
            part = _where(rows, run=name)
            values = np.zeros((1 + max(row["layer"] for row in part), 1 + max(row["head"] for row in part)))
            for row in part:
                values[row["layer"], row["head"]] = row[key]
            image = ax.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
            ax.grid(visible=False)
            ax.set_title(_two_lines(name), fontsize=7)
            ax.set(xlabel="head", ylabel="layer")
            _whole_numbers(ax.xaxis, ax.yaxis)
        bar = fig.colorbar(image, ax=list(grid), shrink=0.8, aspect=30)
        bar.set_label(label)
        bar.outline.set_visible(False)
    return fig


def entropy_by_position(rows: Rows) -> Figure:
    """Entropy of every head against the number of visible tokens t, below ln t."""
    with style():
        fig, axes = _panels(_values(rows, "run"), height=2.9, width=2.5)
        for name, ax in axes.items():
            part = _where(rows, run=name)
            for line in _groups(part, "layer", "head"):
                shade = line[0]["layer"] / max(1, max(row["layer"] for row in part))
                ax.plot(
                    [row["t"] for row in line], [row["entropy"] for row in line], color=_between(shade), linewidth=0.7
                )
            t = np.array(_values(part, "t"))
            ax.plot(t, np.log(t), color=INK, linewidth=1.2, linestyle=DASH["drope"], label="ln t")
            ax.set_xscale("log", base=2)
            ax.set_title(_two_lines(name), fontsize=7)
            ax.set(xlabel="t, tokens visible")
        _legend(axes, "attention entropy (nats)")
    return fig


def recurrence_scatter(rows: Rows) -> Figure:
    """Each head: clustering in running text against attention to a topic that comes back."""
    with style():
        fig, axes = _panels(_values(rows, "phase"), height=3.1, share=False)
        for phase, ax in axes.items():
            for part in _groups(_where(rows, phase=phase), "ordering"):
                x, y = ([row[key] for row in part] for key in ("excess_lag", "recurrence"))
                name = part[0]["ordering"]
                ax.scatter(x, y, s=9, color=COLOUR[name], alpha=0.6, linewidth=0, label=name)
            ax.axhline(0, color=GREY, linewidth=0.7)
            ax.axvline(0, color=GREY, linewidth=0.7)
            ax.set(xlabel="within-topic share above lag-matched null", title=PHASE[phase])
            ax.locator_params(nbins=5)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_major_formatter("{x:g}")
        _legend(axes, "attention mass to a recurring topic")
    return fig


def spectra(rows: Rows) -> Figure:
    """Singular values of the QK and OV circuits over the largest, mean over heads: thin per layer, bold over layers.
    A panel per circuit and attention variant."""
    with style():
        several = len(_values(rows, "attention")) > 1
        shown = [(row["circuit"], row["attention"]) for row in rows]
        fig, axes = _panels(list(dict.fromkeys(shown)), height=3.1, width=2.6 if several else 3.6)
        for (circuit, attention), ax in axes.items():
            for part in _groups(_where(rows, circuit=circuit, attention=attention), "ordering", "phase"):
                for layer in _groups(part, "layer"):
                    x, mean, _, _ = _over_seeds(layer, "index", "value")
                    ax.plot(x, mean, color=COLOUR[part[0]["ordering"]], linewidth=0.4, alpha=0.5)
                x, mean, _, _ = _over_seeds(part, "index", "value")
                _line(ax, part[0], x, mean)
            ax.set(xlabel="index", title=f"{circuit}, {attention}" if several else circuit, yscale="log")
            _whole_numbers(ax.xaxis)
        _legend(axes, "singular value / largest")
    return fig


def _panels(
    names: Sequence[Any], *, height: float, width: float = 3.6, share: bool = True
) -> tuple[Figure, dict[Any, Any]]:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(max(4.6, width * len(names)), height), layout="constrained")
    axes = fig.subplots(1, max(1, len(names)), sharey=share, squeeze=False)[0]
    return fig, dict(zip(names, axes, strict=False))


def _line(
    ax: Any, row: Mapping[str, Any], x: Any, mean: Any, low: Any = None, high: Any = None, **options: Any
) -> None:
    colour = COLOUR[row["ordering"]]
    label = f"{row['ordering']}, {PHASE[row['phase']]}"
    ax.plot(x, mean, color=colour, linestyle=DASH[row["phase"]], label=label, **options)
    if low is not None:
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _levels(ax: Any, levels: Mapping[str, float], *, named: bool = True) -> None:
    for name, value in levels.items():
        ax.axhline(value, color=GREY, linewidth=0.9, linestyle=DASH["extra"])
        if named:
            ax.annotate(
                name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color=GREY
            )


def _legend(axes: Mapping[Any, Any], ylabel: str) -> None:
    """The first panel's label and one legend for all panels, under the last."""
    first, *_, last = list(axes.values()) * 2
    first.set_ylabel(ylabel)
    handles: dict[str, Any] = {}
    for ax in axes.values():
        found, labels = ax.get_legend_handles_labels()
        handles = dict(zip(labels, found, strict=True)) | handles
    if handles:
        last.figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, 1 + len(axes)))


def _two_lines(run: str) -> str:
    """A run's name, broken after its seed."""
    return re.sub(r"(-s\d+)-", r"\1\n", run)


def _whole_numbers(*axes: Any) -> None:
    for axis in axes:
        axis.get_major_locator().set_params(integer=True)


def _between(fraction: float) -> Any:
    from matplotlib import colormaps

    return colormaps["cividis"](0.1 + 0.8 * fraction)


def _over_seeds(rows: Rows, x: str, y: str) -> tuple[list[Any], list[float], list[float], list[float]]:
    """x in order, and of y at each x the mean, least and largest."""
    places = sorted(set(_values(rows, x)))
    values = [[row[y] for row in rows if row[x] == place] for place in places]

    def of(f: Callable[[Iterable[float]], Any]) -> list[float]:
        return [float(f(v)) for v in values]

    return places, of(lambda v: np.mean(list(v))), of(min), of(max)


def _values(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _where(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _groups(rows: Rows, *keys: str) -> list[list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())
