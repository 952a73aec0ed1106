"""The reports' matplotlib figures; each draws arrays and returns the figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.plotting import BLUE, CYAN, GREEN, GREY, PURPLE, RED, YELLOW, axes, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {0: BLUE, 1: RED, 2: GREEN, 3: PURPLE, 4: YELLOW, 9: CYAN}
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def colour(l: int) -> str:
    return COLOURS.get(l, GREY)


def curves(lines: Lines, ylabel: str, *, references: Mapping[str, float] | None = None, by_l: bool = False) -> Figure:
    """Values against optimiser step. by_l: names are l, and choose the colours. references: dashed levels."""
    palette = [BLUE, PURPLE, GREEN, RED, YELLOW, CYAN, GREY]
    with style():
        fig, ax = axes(4.6, 2.9)
        for i, (name, (x, y)) in enumerate(lines.items()):
            marker = "o" if len(x) < 30 else None
            shade = colour(int(name)) if by_l else palette[i % len(palette)]
            ax.plot(x, y, label=f"ℓ{name}" if by_l else name, color=shade, marker=marker, markersize=3)
        for i, (name, level) in enumerate((references or {}).items()):
            ax.axhline(level, color=GREY, linestyle=(0, (4, 2 + 2 * i)), linewidth=1.1, label=name)
        ax.set(xlabel="optimiser step", ylabel=ylabel)
        ax.legend()
    return fig


def head_bars(records: Sequence[Mapping[str, Any]], uniform: float, onehot: float) -> Figure:
    """row_std of every head, with the values of uniform and of one-hot attention."""
    with style():
        fig, ax = axes(max(4.6, 0.32 * len(records)), 2.9)
        for i, r in enumerate(records):
            ax.bar(i, r["row_std"], color=colour(r["l"]), width=0.7)
        ax.set_xticks(range(len(records)), [f"{r['layer']}.{r['head']}\n{r['label']}" for r in records], fontsize=7)
        ax.axhline(uniform, color=GREY, linestyle=":", label="uniform")
        ax.axhline(onehot, color=GREY, linestyle=(0, (4, 3)), label="one-hot")
        ax.axhline(0.1, color=RED, linewidth=0.8, label="the seed's SHARP")
        ax.set(xlabel="layer.head", ylabel="row_std")
        ax.legend(ncols=3, loc="upper left")
        ax.set_ylim(0, 1.25 * onehot)
    return fig


def maps(beta_HNN: np.ndarray, names: Sequence[str]) -> Figure:
    """Attention weights of every head for one window; the colour is the square root of the weight."""
    from matplotlib.figure import Figure

    columns = min(len(names), 5)
    rows = math.ceil(len(names) / columns)
    with style():
        fig = Figure(figsize=(1.75 * columns, 1.95 * rows), layout="constrained")
        for i, (beta, name) in enumerate(zip(beta_HNN, names, strict=True)):
            ax = fig.add_subplot(rows, columns, i + 1)
            ax.imshow(np.sqrt(beta), vmin=0, vmax=1, cmap="magma", rasterized=True)
            ax.set_title(name, fontsize=6.5)
            ax.set(xticks=[], yticks=[])
    return fig


def kl_histogram(kl_HNN: np.ndarray, names: Sequence[str], l_of: Sequence[int]) -> Figure:
    """Density of log10 KL over pairs j < i, pooled over the heads of each l."""
    with style():
        fig, ax = axes()
        before = np.tril_indices(kl_HNN.shape[1], -1)
        for l in sorted(set(l_of)):
            values = np.concatenate([kl_HNN[i][before] for i in range(len(names)) if l_of[i] == l])
            ax.hist(
                np.log10(np.maximum(values, 1e-8)),
                bins=60,
                density=True,
                histtype="step",
                color=colour(l),
                label=f"ℓ{l}",
            )
        ax.set(xlabel="log10 KL (nats)", ylabel="density")
        ax.legend()
    return fig


def scatter(
    points: Sequence[tuple[int, float, float]], xlabel: str, ylabel: str, *, identity: bool, log: bool
) -> Figure:
    """Points (l, x, y) coloured by l. identity: draw y = x and a band of 10% around it."""
    with style():
        fig, ax = axes(4.6, 3.4)
        for l in sorted({p[0] for p in points}):
            x, y = zip(*[(p[1], p[2]) for p in points if p[0] == l], strict=True)
            ax.plot(x, y, linestyle="none", marker="o", markersize=3.5, alpha=0.7, color=colour(l), label=f"ℓ{l}")
        if identity:
            ends = np.array([min(p[1] for p in points), max(p[1] for p in points)])
            ax.plot(ends, ends, color=GREY, linewidth=1)
            ax.fill_between(ends, 0.9 * ends, 1.1 * ends, color=GREY, alpha=0.2, linewidth=0)
        if log:
            ax.set_xscale("log")
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.legend()
    return fig


Points = list[tuple[int, float, float]]


def grid_points(runs: Sequence[Mapping[str, Any]], name: str) -> Points:
    """(l, x, y) of what a figure of a grid's runs shows: "sharpness_scale", "ablation" or "predicted"."""
    heads = [h for r in runs for h in r["summary"]["heads"]]
    if name == "sharpness_scale":
        return [(h["l"], h["logit_std"], h["entropy_ratio"]) for h in heads if h.get("logit_std", 0) > 0]
    if name == "ablation":
        return [(h["l"], h["entropy_ratio"], h["uniform"]) for h in heads if "uniform" in h]
    return [(h["l"], h["predicted"], h["row_std"]) for r in runs for h in r["summary"]["initial"]]


def grid_figure(points: Points, name: str) -> Figure:
    """The scatter of `grid_points`."""
    if name == "sharpness_scale":
        return scatter(points, "std of the logits over keys", "H / log n", identity=False, log=True)
    if name == "ablation":
        return scatter(points, "H / log n", "cost of uniform attention (nats)", identity=False, log=False)
    return scatter(points, "row_std predicted", "row_std before training", identity=True, log=False)
