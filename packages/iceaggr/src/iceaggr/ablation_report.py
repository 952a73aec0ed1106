"""An ablation study's record, its tables, its figure and its page, from the errors its runs left.

Suffixes: S seeds, N held-out events.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lab_shared.arrays import load_arrays, save_arrays
from lab_shared.errors import UserError
from lab_shared.files import atomic_write, make_folder
from lab_shared.page import Page

from iceaggr.ablation_curves import PLATEAU_DEG, by_variant, curves_figure, leaving_text, training_curves
from iceaggr.ablation_stats import (
    MARGIN_DEG,
    Record,
    contrasts,
    holm_over_seeds,
    interval,
    over_events,
    row,
    verdicts,
)
from iceaggr.ablations import BASELINES, Budget, Study, job_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT_EVENTS = 50_000
_BASELINE_NAMES = {
    "random": "random direction",
    "linefit_hlc": "line fit, HLC",
    "linefit": "line fit, HLC in 1.5 us",
    "oracle": "oracle",
}


def collect(of: Study, budget: Budget, out: Path, summaries: Mapping[str, Record]) -> Record:
    """Everything the finished runs in OUT/runs say: OUT/results.json, curves.json, errors/ and report.html.

    curves.json is what `training_curves` returns. errors/events.npz and errors/NAME.npz keep up to 50,000 evenly spaced
    held-out events: ids, pulses, energies and baselines of the one, float16 degrees (S, N) of the others. All figures
    are of all held-out events.
    """
    runs = out / "runs"
    shared = load_arrays(runs / BASELINES / "errors.npz")
    errors = {
        name: np.stack([_errors(runs / job_name(name, seed), shared) for seed in budget.seeds]) for name in of.variants
    }
    first = summaries[BASELINES]
    result: Record = {
        "name": of.name,
        "label": first["label"],
        "device": first["device"],
        "budget": {
            "events": budget.events,
            "epochs": budget.epochs,
            "held_out": budget.held_out,
            "seeds": list(budget.seeds),
            "recipe": budget.recipe,
            "stream": budget.stream,
            "tokens_per_batch": budget.tokens_per_batch,
        },
        "baselines": _baselines(shared),
        "rows": [
            row(name, errors[name], [summaries[job_name(name, seed)] for seed in budget.seeds])
            | {"events": max(1, round(budget.events * variant.share))}
            for name, variant in of.variants.items()
        ],
        "contrasts": contrasts(of.contrasts, errors),
    }
    result["verdicts"] = verdicts(result) if of.name == "seed-table" else []
    _keep_errors(out / "errors", shared, errors)
    atomic_write(out / "results.json", json.dumps(result, indent=1) + "\n")
    curves = training_curves(of, budget, runs)
    atomic_write(out / "curves.json", json.dumps(curves) + "\n")
    page = write_page(result, curves, out / "report.html")
    return result | {"folder": str(out), "text": f"{text(result)}\n\nreport: {page}"}


def text(result: Record) -> str:
    """The tables of a study as aligned text."""
    parts = [f"{result['name']}: {_setting(result)}"]
    for header, rows in (_rows_table(result), _contrast_table(result), _verdict_table(result)):
        if rows:
            widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
            lines = (
                "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in [header, *rows]
            )
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def write_page(result: Record, curves: list[Record], path: Path) -> Path:
    """The study's self-contained HTML page from its records alone."""
    page = Page(f"Ablation study: {result['name']}", _setting(result))
    page.section("Runs")
    page.table(
        *_rows_table(result),
        caption=f"Opening angle on the same held-out events ({result['label']}), degrees. Intervals of 95%: over "
        "events by BCa bootstrap of the errors averaged over seeds, over seeds by Student's t.",
    )
    page.figure(
        learning_curves(result) if result["name"] == "scale" else forest(result),
        f"Mean opening angle with its interval over seeds ({result['label']}).",
        alt="Mean error of every variant with its interval.",
    )
    page.table(
        ["variant", "thousand events, by seed"],
        [[name, leaving_text(of_one)] for name, of_one in by_variant(curves).items()],
        caption=f"Events after which the training angle was first below {PLATEAU_DEG:g} degrees ({result['label']}). "
        "Where that is late or never, a comparison says how soon a variant starts to learn, not where it ends.",
    )
    page.figure(
        curves_figure(curves, result["label"]),
        f"Training angle, a line per seed ({result['label']}).",
        alt="Training angle of every run against events.",
    )
    if result["contrasts"]:
        page.section("Paired comparisons")
        page.text(
            "Differences on the same events: negative is better than the control. p is of a sign-flip test over "
            "events, Holm of all tests of this study. **lower** and **higher** stand where Holm's p is below 0.05 and "
            "both intervals exclude 0. The intervals over seeds are each at 95%, not corrected for the number of "
            "comparisons: the last but one column has what Holm's correction leaves of the t-test over seeds."
        )
        page.table(*_contrast_table(result), caption=f"Treated minus control, degrees ({result['label']}).")
    if result["verdicts"]:
        page.section("The seed's findings")
        page.table(
            *_verdict_table(result),
            caption=f"Margin of sameness {MARGIN_DEG:g} degree ({result['label']}).",
            align="lll",
        )
    return page.write(path)


def forest(result: Record) -> Figure:
    """Mean error of each variant with its interval over seeds, and a dot per seed."""
    from lab_shared.plotting import BLUE, GREY, axes, style

    rows = result["rows"][::-1]
    with style():
        fig, ax = axes(6.4, 0.8 + 0.32 * len(rows))
        for y, r in enumerate(rows):
            ax.plot(r["seed_means"], [y] * len(r["seed_means"]), "o", color=GREY, markersize=4)
            if r["seeds_low"] is not None:
                ax.plot([r["seeds_low"], r["seeds_high"]], [y, y], color=BLUE)
            ax.plot(r["mean_deg"], y, "D", color=BLUE, markersize=5)
        ax.set_yticks(range(len(rows)), [r["name"] for r in rows])
        ax.set_xlabel(f"mean opening angle, degrees ({result['label']})")
    return fig


def learning_curves(result: Record) -> Figure:
    """Mean error against training events, one line per size of model."""
    from lab_shared.plotting import BLUE, GREEN, GREY, PURPLE, RED, axes, style

    sizes = sorted({r["parameters"] for r in result["rows"]})
    with style():
        fig, ax = axes(5.4, 3.6)
        for colour, size in zip((BLUE, RED, GREEN, PURPLE, GREY), sizes, strict=False):
            rows = sorted((r for r in result["rows"] if r["parameters"] == size), key=lambda r: r["events"])
            events = [r["events"] for r in rows]
            ax.plot(events, [r["mean_deg"] for r in rows], "o-", color=colour, label=f"{size / 1e6:.2g}M parameters")
            for r in rows:
                ax.plot([r["events"]] * len(r["seed_means"]), r["seed_means"], ".", color=colour, alpha=0.5)
        ax.set_xscale("log")
        ax.set_xlabel(f"training events, {result['budget']['epochs']:g} passes over each")
        ax.set_ylabel(f"mean opening angle, degrees ({result['label']})")
        ax.legend()
    return fig


def _baselines(shared: Mapping[str, np.ndarray]) -> list[Record]:
    """One record for each of `_BASELINE_NAMES` that was scored, the oracle perhaps on fewer events."""
    found = []
    for name, said in _BASELINE_NAMES.items():
        if (error_N := shared.get(f"{name}_error_deg")) is not None:
            fitted = error_N[np.isfinite(error_N)].astype(np.float64)
            of_them = f", {fitted.size:,} of the events" if fitted.size < error_N.size else ""
            found.append({"name": said + of_them, **over_events(fitted), "median_deg": float(np.median(fitted))})
    return found


def _errors(folder: Path, shared: Mapping[str, np.ndarray]) -> np.ndarray:
    """(N,) float32 degrees of a run. Raises UserError if they are of other events than the study's."""
    arrays = load_arrays(folder / "errors.npz")
    same = np.array_equal(arrays["event_id"], shared["event_id"])
    if same and "true" in arrays and "true" in shared:  # which older runs have not kept
        same = np.allclose(arrays["true"], shared["true"], atol=1e-6)
    if not same:
        raise UserError(
            f"{folder} was scored on other events than the rest of the study, as another kind of device simulates "
            "them: use another --out"
        )
    return arrays["error_deg"]


def _keep_errors(folder: Path, shared: Mapping[str, np.ndarray], errors: Mapping[str, np.ndarray]) -> None:
    make_folder(folder)
    n = shared["event_id"].size
    rows = np.unique(np.linspace(0, n - 1, min(n, KEPT_EVENTS)).round().astype(np.int64))
    half = {name: x.astype(np.float16) for name, x in shared.items() if name.endswith("_deg")}
    kept: dict[str, Any] = {name: x[rows] for name, x in {**shared, **half}.items() if name != "true"}
    save_arrays(folder / "events.npz", **kept)
    for name, error_SN in errors.items():
        save_arrays(folder / f"{name}.npz", error_deg=error_SN[:, rows].astype(np.float16))


def _setting(result: Record) -> str:
    b = result["budget"]
    batch = f" in batches of {b['tokens_per_batch']:,} tokens" if b.get("tokens_per_batch") else ""
    return (
        f"{b['events']:,} training events x {b['epochs']:g} epochs{batch}, {b['held_out']:,} held out, "
        f"{len(b['seeds'])} seeds, {b['recipe']} recipe, {result['device']} ({result['label']})"
    )


def _rows_table(result: Record) -> tuple[list[str], list[list[str]]]:
    header = ["variant", "mean", "over events", "over seeds", "median", "90%", "parameters", "events", "train ev/s"]
    rows = [
        [
            r["name"],
            f"{r['mean_deg']:.2f}",
            interval(r["events_low"], r["events_high"]),
            "–",
            f"{r['median_deg']:.2f}" if "median_deg" in r else "–",
            *["–"] * 4,
        ]
        for r in result["baselines"]
    ]
    for r in result["rows"]:
        rate = "–" if r["train_events_per_s"] is None else f"{r['train_events_per_s']:,.0f}"
        rows.append([
            r["name"], f"{r['mean_deg']:.2f}", interval(r["events_low"], r["events_high"]),
            interval(r["seeds_low"], r["seeds_high"]), f"{r['median_deg']:.2f}", f"{r['p90']:.1f}",
            f"{r['parameters']:,}", f"{r['events']:,}", rate,
        ])  # fmt: skip
    return header, rows


def _contrast_table(result: Record) -> tuple[list[str], list[list[str]]]:
    header = ["comparison", "difference", "over events", "over seeds", "p", "Holm", "Holm over seeds", "error is"]
    return header, [
        [
            c["question"], f"{c['difference']:+.2f}", interval(c["events_low"], c["events_high"]),
            interval(c["seeds_low"], c["seeds_high"]), f"{c['p']:.4f}", f"{c['p_holm']:.4f}",
            "–" if over_seeds is None else f"{over_seeds:.4f}", c["finding"],
        ]
        for c, over_seeds in zip(result["contrasts"], holm_over_seeds(result), strict=True)
    ]  # fmt: skip


def _verdict_table(result: Record) -> tuple[list[str], list[list[str]]]:
    return ["finding of the seed", "verdict", "measured"], [
        [v["claim"], v["status"], v["measured"]] for v in result["verdicts"]
    ]
