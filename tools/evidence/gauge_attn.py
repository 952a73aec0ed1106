"""Gauge-equivariant KL attention: the main job, grids with their verdicts, theory, speeds."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from evidence import gauge_speeds
from evidence.drawing import Drawing
from evidence.record import ROOT, Claim, bare, markdown, observed, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "packages/gauge_attn/results"
QUICK = f"{RESULTS}/quick-cpu-seed0"
TEXT = "grid-tinyshakespeare"


def main_job() -> str:
    """Losses of the quick run beside what needs no network."""
    found = read(f"{QUICK}/evaluation.json")
    steps = read(f"{QUICK}/config.json")["steps"]
    names = {"unigram": "unigram", "bigram": "bigram"}
    names |= {"model": f"model, {found['parameters']:,} parameters, {steps} steps", "optimal": "optimal"}
    body = [[text, bare(found["predictors"][name]["loss"], 4)] for name, text in names.items()]
    return markdown(["predictor", f"loss, nats per symbol, {found['split']} split"], body, "lr")


def theory() -> str:
    """The closed form at the original's temperatures: mean row_std by l, and the dimension a sharp head would need."""
    found = read(f"{RESULTS}/theory.json")
    smallest = {row["kappa"]: row["smallest_dimension"] for row in found["minimum"]}
    body = []
    for kappa, dimension in smallest.items():
        by_l = {row["l"]: bare(row["row_std"], 4) for row in found["rows"] if row["kappa"] == kappa}
        body.append([f"{kappa:g}", *by_l.values(), f"{dimension:,.0f}"])
    header = ["kappa", *(f"row_std, l = {l}" for l in by_l), f"dimension for row_std {found['target_row_std']:g}"]
    return markdown(header, body, "r" * len(header))


@cache
def _runs(grid: str) -> list[dict[str, Any]]:
    from gauge_attn.records import unpack

    return unpack(read(f"{RESULTS}/{grid}/results.json"))


def verdict_table(grid: str) -> str:
    """Each claim a grid bears on: what was measured, and what follows."""
    from gauge_attn.verdicts import verdicts

    body = [[v["claim"], v["measured"], f"**{v['status']}**"] for v in verdicts(_runs(grid))]
    return markdown(["claim", "measured", "verdict"], body)


def headline() -> list[str]:
    """Measure, as first stated, here, for comparison: whether l itself makes heads of the original's model sharp."""
    from gauge_attn.comparisons import different, of_l, said, summary
    from gauge_attn.seed_claims import SHARP, low_spin_cannot

    runs = _runs(TEXT)

    def rise(mode: str) -> str:
        members = different(run for run in runs if run["cell"] == f"19,{mode},none")
        return said(summary([(of_l(run, 2) or 0.0) - (of_l(run, 0) or 0.0) for run in members]))

    low_spin = low_spin_cannot(runs)
    assert low_spin is not None, "the grid has heads of l = 0 and 1"
    return [
        "row_std of heads of l = 2 less that of l = 0 (the original's model, tinyshakespeare)",
        "positive at any temperature (as first stated)",
        f"**{rise('dim')}** with temperatures in proportion to the dimension; {rise('shared')} with one for all",
        f"that heads of l = 0, 1 stay below {SHARP:.2f} {low_spin['status']} in this model's grid",
    ]


def cell_table(grid: str) -> str:
    """Every cell of a grid: mean over seeds and half of its 95 % interval."""
    from gauge_attn.grid_tables import grid_rows

    header, body = grid_rows(_runs(grid))
    return markdown(header, body, "l".ljust(len(header), "r"))


def claims() -> list[Claim]:
    """The main job, theory, speeds, the grids' verdicts."""
    found = read(f"{QUICK}/evaluation.json")
    closed = read(f"{RESULTS}/theory.json")
    uniform, onehot = closed["row_std_uniform"], closed["row_std_onehot"]
    losses = {name: bare(row["loss"], 4) for name, row in found["predictors"].items()}
    head = next(h for h in found["diagnosis"]["heads"] if (h["layer"], h["head"]) == (0, 0))
    at_50 = next(
        row["L0.H0.row_std"] for row in read(f"{QUICK}/metrics.jsonl") if (row["step"], row["split"]) == (50, "heads")
    )
    shared: dict[str, Any] = {"config": f"{QUICK}/config.json", "seeds": [0]}
    made = [
        Claim(
            "gauge_attn/main-job",
            f"The quick model ends at {losses['model']} nats per symbol, where the optimum is {losses['optimal']} nats "
            f"(generated induction language, one seed).",
            "loss, nats per symbol",
            [found["loss"]],
            "measured",
            [f"{QUICK}/evaluation.json"],
            **shared,
        ),
        Claim(
            "gauge_attn/sharp-scalar-head",
            f"Scalar head 0 of layer 0 of the quick model ends with row_std {bare(head['row_std'], 3)} at N = 64 "
            f"({bare(at_50, 3)} at step 50) and H / log n = {bare(head['entropy_ratio'], 3)} (generated induction "
            "language, one seed).",
            "row_std; entropy over log n",
            [head["row_std"], head["entropy_ratio"]],
            "measured",
            [f"{QUICK}/evaluation.json", f"{QUICK}/metrics.jsonl"],
            **shared,
        ),
        Claim(
            "gauge_attn/theory",
            f"At N = {closed['n']} uniform causal attention has row_std {bare(uniform, 4)} ({bare(uniform, 3)}), "
            f"one-hot attention {bare(onehot, 4)} ({bare(onehot, 3)}); row_std {bare(closed['target_row_std'], 2)} by "
            f"independent beliefs takes a participation of {closed['target_participation']:.0f} of {closed['n']}; the "
            f"original's largest temperature is {bare(max(row['kappa'] for row in closed['rows']), 2)}.",
            "closed form of row_std",
            [uniform, onehot, closed["target_participation"]],
            "measured",
            [f"{RESULTS}/theory.json"],
            test="closed form, no data",
        ),
    ]
    made += gauge_speeds.claims()
    made += observed("gauge_attn", f"{RESULTS}/observed.json")
    for grid in _grids():
        made += _of_grid(grid)
    return made


def _of_grid(grid: str) -> list[Claim]:
    from gauge_attn.comparisons import different
    from gauge_attn.verdicts import verdicts

    runs = _runs(grid)
    seeds = sorted({run["seed"] for run in runs})
    labels = ", ".join(sorted({run["summary"]["label"] for run in runs}))
    once = len(different(runs))
    return [
        Claim(
            f"gauge_attn/{grid}-runs",
            f"{len(runs)} runs on {labels}" + (f", {once} of them different." if once < len(runs) else "."),
            "runs; different ones",
            [len(runs), once],
            "measured",
            [f"{RESULTS}/{grid}/results.json"],
            seeds=seeds,
        )
    ] + [
        Claim(
            f"gauge_attn/{grid}-{i:02d}",
            f"{v['claim']} ({labels}): {v['status']}. {v['measured'].rstrip('.')}.",
            v["claim"],
            [],
            v["status"],
            [f"{RESULTS}/{grid}/results.json"],
            config=f"{RESULTS}/{grid}/results.json",
            seeds=seeds,
            test=v.get("test", "Student's t over seeds, 95 %"),
        )
        for i, v in enumerate(verdicts(runs))
    ]


def _grids() -> list[str]:
    """Folders of grid records."""
    return sorted(path.parent.name for path in (ROOT / RESULTS).glob("*/results.json"))


def row_std_training() -> Figure:
    """Mean row_std of the heads of each l while the quick model trains."""
    from gauge_attn.figures import curves

    by_l: dict[int, list[str]] = {}
    for head in read(f"{QUICK}/evaluation.json")["diagnosis"]["heads"]:
        by_l.setdefault(head["l"], []).append(f"L{head['layer']}.H{head['head']}.row_std")
    logged = [row for row in read(f"{QUICK}/metrics.jsonl") if row["split"] == "heads"]
    steps = [row["step"] for row in logged]
    lines = {str(l): (steps, [sum(row[k] for k in names) / len(names) for row in logged]) for l, names in by_l.items()}
    return curves(lines, "row_std", by_l=True)


TABLES = {
    "gauge_attn.main-job": main_job,
    "gauge_attn.theory": theory,
    **gauge_speeds.TABLES,
    **{f"gauge_attn.{grid}-verdicts": lambda grid=grid: verdict_table(grid) for grid in _grids()},  # type: ignore[misc]
    **{f"gauge_attn.{grid}-cells": lambda grid=grid: cell_table(grid) for grid in _grids()},  # type: ignore[misc]
}


def grid_figure(grid: str, name: str) -> Figure:
    from gauge_attn import figures

    return figures.grid_figure(figures.grid_points(_runs(grid), name), name)


DRAWINGS = [
    Drawing(f"{QUICK}/row_std_training.png", [f"{QUICK}/evaluation.json", f"{QUICK}/metrics.jsonl"], row_std_training),
    *(
        Drawing(
            f"{RESULTS}/{grid}/figures/{name}.png",
            [f"{RESULTS}/{grid}/results.json"],
            lambda grid=grid, name=name: grid_figure(grid, name),  # type: ignore[misc]
        )
        for grid in _grids()
        for name in ("sharpness_scale", "predicted")
    ),
]
