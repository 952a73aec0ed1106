"""How the trainings of an ablation study went: angle against events, and when each left the plateau it begins on.

A training stands near 90 degrees, the error of a random direction, until the loss breaks away. A study with few events
therefore compares how soon its variants do so: `left_plateau` says when each run did.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_shared.run import read_metrics

from iceaggr.ablation_stats import Record
from iceaggr.ablations import Budget, Study, job_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLATEAU_DEG = 85.0
"""A run whose training angle was never below this is still on the plateau."""


def training_curves(of: Study, budget: Budget, runs: Path) -> list[Record]:
    """One record per trained run of the folder `runs`: {"variant", "seed", "step", "events", "angle_deg"}.

    step: optimiser steps after which the run logged. events: trained on by then, taking steps for equally large.
    angle_deg: mean opening angle on the training events since the entry before, degrees, rotations included.
    """
    found = []
    for name, variant in of.variants.items():
        if variant.scores is not None:  # trains nothing
            continue
        for seed in budget.seeds:
            logged = read_metrics(runs / job_name(name, seed), "train")
            steps = [entry["step"] for entry in logged]
            whole = variant.share * budget.events * budget.epochs
            found.append({
                "variant": name,
                "seed": seed,
                "step": steps,
                "events": [round(whole * step / steps[-1]) for step in steps],
                "angle_deg": [round(entry["angle_deg"], 3) for entry in logged],
            })  # fmt: skip
    return found


def left_plateau(run: Record) -> int | None:
    """Training events after which the angle of a run was first below `PLATEAU_DEG`; None if it never was."""
    below = (events for events, angle in zip(run["events"], run["angle_deg"], strict=True) if angle < PLATEAU_DEG)
    return next(below, None)


def still_on_plateau(run: Record, share: float) -> bool:
    """Whether a run had not left the plateau by this share of its own events."""
    left = left_plateau(run)
    return left is None or left > share * run["events"][-1]


def leaving_text(runs: list[Record]) -> str:
    """When the seeds of one variant left the plateau, in thousand events: `520 / 520 / never`."""
    left = [left_plateau(run) for run in runs]
    return " / ".join("never" if events is None else f"{events / 1000:,.0f}" for events in left)


def by_variant(curves: list[Record]) -> dict[str, list[Record]]:
    """The runs of each variant, in the order of the study."""
    names = dict.fromkeys(run["variant"] for run in curves)
    return {name: [run for run in curves if run["variant"] == name] for name in names}


def curves_figure(curves: list[Record], label: str) -> Figure:
    """Training angle against events: a panel per variant, a line per seed, the plateau's edge dashed."""
    from lab_shared.plotting import BLUE, GREEN, GREY, PURPLE, RED, axes, style

    variants = by_variant(curves)
    columns = min(4, len(variants))
    rows = -(-len(variants) // columns)
    with style():
        fig, first = axes(2.0 * columns, 0.4 + 1.5 * rows)
        first.remove()
        panels: Any = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for ax, (name, runs) in zip(panels, variants.items(), strict=False):
            ax.axhline(PLATEAU_DEG, color=GREY, linestyle="--", linewidth=0.8)
            for run, colour in zip(runs, (BLUE, RED, GREEN, PURPLE) * len(runs), strict=False):
                millions = [events / 1e6 for events in run["events"]]
                ax.plot(millions, run["angle_deg"], color=colour, linewidth=1.1, marker=".", markersize=3)
            ax.set_title(name)
        for ax in panels[max(0, len(variants) - columns) : len(variants)]:  # of these, some have no panel below
            ax.tick_params(labelbottom=True)
        for ax in panels[len(variants) :]:
            ax.remove()
        fig.supxlabel("training events, millions", fontsize=9)
        fig.supylabel(f"training angle, degrees ({label})", fontsize=9)
    return fig
