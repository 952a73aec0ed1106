"""`gauge-attn report`: one HTML page about a run or a grid, drawn from what it saved and from nothing else.

Beside the page, figures/NAME.png and the numbers it shows as figures/NAME.csv.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.arrays import load_arrays
from lab_shared.errors import UserError
from lab_shared.page import Page, Width
from lab_shared.report_files import flat_rows, keep_figure, read_object

from gauge_attn import figures
from gauge_attn.printed import perplexity_text

Columns = Mapping[str, Sequence[Any]]


def write_report(folder: Path) -> Path:
    """Write report.html into a run's or a grid's folder; returns its path.

    Raises UserError for any other folder, and for records that lack something or hold something else.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        with _sound(folder / "evaluation.json", f"`gauge-attn train --resume {folder}` makes it anew"):
            return _write_run_report(folder)
    if (folder / "results.json").exists():
        with _sound(folder / "results.json", "`gauge-attn grid NAME --collect` with the grid's options makes it anew"):
            return write_grid_report(folder)
    raise UserError(f"{folder} is neither a run (config.json) nor a grid (results.json)")


@contextmanager
def _sound(records: Path, way_out: str) -> Iterator[None]:
    """Turn what a page trips over in records of another shape into a UserError about their file."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{records} is not what this version writes ({type(error).__name__}: {error}): {way_out}"
        ) from error


def _write_run_report(folder: Path) -> Path:
    from lab_shared.run import read_metrics

    config = _read(folder / "config.json")
    if not (folder / "evaluation.json").exists():
        raise UserError(f"{folder} has no evaluation.json: finish it with `gauge-attn train --resume {folder}`")
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} has no metrics.jsonl: copy the whole run folder")
    result, metrics = _read(folder / "evaluation.json"), read_metrics(folder)
    page = Page(f"gauge_attn · {folder.resolve().name}", f"KL attention between Gaussian beliefs; {result['label']}")
    _result(page, result)
    _training(page, folder, metrics, result)
    _heads(page, folder, result, metrics)
    page.section("Set-up")
    page.table(["configuration", "value"], flat_rows(config), align="ll")
    if (folder / "manifest.json").exists():
        page.table(["environment", "value"], flat_rows(_read(folder / "manifest.json")), align="ll")
    return page.write(folder / "report.html")


def _result(page: Page, result: dict[str, Any]) -> None:
    page.section("Result")
    page.text(
        f"**{result['loss']:.4f} nats** per token (perplexity {perplexity_text(result['perplexity'])}) "
        f"on {result['n_tokens']:,} {result['split']} tokens of {result['label']}, "
        f"with {result['parameters']:,} parameters."
    )
    rows = [
        [
            name,
            f"{r['loss']:.4f}",
            perplexity_text(r["perplexity"]),
            "–" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}",
        ]
        for name, r in result["predictors"].items()
    ]
    page.table(["predictor", "nats / token", "perplexity", "bits / byte"], rows, highlight={0})


def _training(page: Page, folder: Path, metrics: list[dict[str, Any]], result: dict[str, Any]) -> None:
    page.section("Training")
    train = [m for m in metrics if m["split"] == "train"]
    val = [m for m in metrics if m["split"] == "val"]
    lines = {"training": _series(train, "ce"), "validation": _series(val, "loss")}
    references = {n: r["loss"] for n, r in result["predictors"].items() if n != "model"}
    fig = figures.curves(lines, "cross-entropy (nats)", references=references)
    _figure(page, folder, "loss", fig, _long(lines), f"Cross-entropy on {result['label']}.")
    lines = {"gradient norm": _series(train, "grad_norm")}
    fig = figures.curves(lines, "gradient norm")
    _figure(page, folder, "grad_norm", fig, _long(lines), "Gradient norm before clipping.")


def _heads(page: Page, folder: Path, result: dict[str, Any], metrics: list[dict[str, Any]]) -> None:
    diagnosis, label = result["diagnosis"], result["label"]
    records, n = diagnosis["heads"], diagnosis["window"]
    page.section("Heads")
    page.text("\n".join("    " + line for line in diagnosis["lines"]))
    from gauge_attn.diagnostics import row_std_onehot, row_std_uniform

    names = [
        "row_std",
        "row_std_rescaled",
        "entropy_ratio",
        "effective_keys",
        "relative_participation",
        "attended_kl",
        "kappa",
    ]
    rows = [[f"{r['layer']}.{r['head']}", r["label"], *(f"{r[name]:.4g}" for name in names)] for r in records]
    page.table(
        ["layer.head", "type", *names], rows, f"Sharpness of every head, {label}; rescaled: 0 uniform, 1 one-hot."
    )
    figure = figures.head_bars(records, row_std_uniform(n), row_std_onehot(n))
    columns = {"head": [f"{r['layer']}.{r['head']}" for r in records], "row_std": [r["row_std"] for r in records]}
    _figure(page, folder, "row_std", figure, columns, f"row_std by head at N = {n}, {label}.", "full")

    logged = [m for m in metrics if m["split"] == "heads"]
    for name, text in (("row_std", "row_std"), ("entropy_ratio", "H / log n")):
        lines = {
            str(l): _means(logged, [f"L{r['layer']}.H{r['head']}.{name}" for r in records if r["l"] == l])
            for l in sorted({r["l"] for r in records})
            if l >= 0
        }
        if lines and len(logged) > 1:
            fig = figures.curves(lines, text, by_l=True)
            _figure(page, folder, f"{name}_training", fig, _long(lines), f"{text} over training, mean by l, {label}.")
    for name in ("kl_std", "mu_dist"):
        x, y = _series(logged, name)
        if len(x) > 1:
            fig = figures.curves({name: (x, y)}, name)
            _figure(page, folder, name, fig, {"step": x, name: y}, f"{name} of the [DIVERSITY] line, {label}.")
    if (folder / "maps.npz").exists():
        _maps(page, folder, records, label)
    if result["ablation"]:
        rows = [
            [f"{c['layer']}.{c['head']}", f"ℓ{c['l']}", f"{c['uniform']:+.4f}", f"{c['removed']:+.4f}"]
            for c in result["ablation"]
        ]
        page.table(
            ["layer.head", "type", "made uniform", "removed"], rows, f"Cost of a head in nats per token, {label}."
        )


def _maps(page: Page, folder: Path, records: list[dict[str, Any]], label: str) -> None:
    arrays = load_arrays(folder / "maps.npz")
    names, beta, kl = [str(x) for x in arrays["names"]], arrays["beta"], arrays["kl"]
    caption = f"Attention of one window by head, {label}; rows are queries, colour is the square root of the weight."
    columns = {"map": names, "largest weight": beta.max((1, 2)).tolist()}
    _figure(page, folder, "maps", figures.maps(beta, names), columns, caption, "full")
    l_of = [r["l"] for r in records]
    if min(l_of) >= 0:
        fig = figures.kl_histogram(kl, names, l_of)
        columns = {"map": names, "median KL": np.median(kl, axis=(1, 2)).tolist()}
        _figure(page, folder, "kl", fig, columns, f"Divergences between tokens of one window, {label}.")


def write_grid_report(folder: Path) -> Path:
    """Write report.html for a grid's folder from its results.json."""
    from gauge_attn.comparisons import different
    from gauge_attn.grid_tables import grid_rows
    from gauge_attn.records import unpack
    from gauge_attn.verdicts import verdicts

    result = _read(folder / "results.json")
    runs = unpack(result)
    if not runs:
        raise UserError(f"{folder / 'results.json'} holds no run: finish the grid first")
    labels = sorted({r["summary"]["label"] for r in runs})
    page = Page(f"gauge_attn · grid {result['name']}", f"{len(different(runs))} runs on {', '.join(labels)}")
    page.section("Verdicts")
    rows = [[v["claim"], v["measured"], v["status"]] for v in verdicts(runs)]
    caption = "Intervals: 95%, Student's t over seeds; H2's by bootstrap over runs."
    page.table(["claim", "measured", "status"], rows, caption, align="lll")
    page.section("Cells")
    header, rows = grid_rows(runs)
    page.table(
        header, rows, "Mean over seeds ± half the 95% interval; noise: random beliefs with the runs' mu_dist and kappa."
    )

    page.section("Sharpness")
    where = ", ".join(labels)
    shown = {
        "sharpness_scale": ("logit_std", "entropy_ratio", f"Heads after training, {where}."),
        "ablation": (
            "entropy_ratio",
            "cost",
            f"What a head's attention is worth: rise of the loss when it is made uniform, {where}.",
        ),
        "predicted": (
            "predicted",
            "measured",
            f"The closed form against untrained models on {where}; the band is 10%.",
        ),
    }
    for name, (x, y, caption) in shown.items():
        if points := figures.grid_points(runs, name):
            _figure(page, folder, name, figures.grid_figure(points, name), _points(points, x, y), caption)
    return page.write(folder / "report.html")


def _points(points: Sequence[tuple[int, float, float]], x: str, y: str) -> Columns:
    return {"l": [p[0] for p in points], x: [p[1] for p in points], y: [p[2] for p in points]}


def _series(metrics: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    known = [m for m in metrics if m.get(key) is not None]
    return [m["step"] for m in known], [m[key] for m in known]


def _means(metrics: list[dict[str, Any]], keys: list[str]) -> tuple[list[float], list[float]]:
    """Steps and the mean over several entries of each record."""
    known = [m for m in metrics if all(m.get(key) is not None for key in keys)]
    return [m["step"] for m in known], [math.fsum(m[key] for key in keys) / len(keys) for m in known]


def _long(lines: figures.Lines) -> Columns:
    """Lines as columns: name, step, value."""
    return {
        "line": [name for name, (x, _) in lines.items() for _ in x],
        "step": [s for x, _ in lines.values() for s in x],
        "value": [v for _, y in lines.values() for v in y],
    }


def _figure(
    page: Page, folder: Path, name: str, figure: Any, columns: Columns, caption: str, width: Width = "half"
) -> None:
    keep_figure(page, folder / "figures", name, figure, columns, caption, width)


def _read(path: Path) -> dict[str, Any]:
    value = read_object(path)
    if value is None:
        raise UserError(f"{path} is not there: finish the training or the grid first")
    return value
