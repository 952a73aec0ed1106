"""Gauge-equivariant KL attention: the main job, grids with their verdicts, theory, speeds."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from evidence import speeds
from evidence.drawing import Drawing
from evidence.record import ROOT, Claim, bare, markdown, observed, read, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "packages/gauge_attn/results"
QUICK = f"{RESULTS}/quick-cpu-seed0"
CPU_SPEEDS, GPU_SPEEDS, GPU_LENGTHS, GPU_MODELS = (
    f"{RESULTS}/bench/gauge-attn-{of}.json" for of in ("cpu", "cuda", "lengths-cuda", "models-cuda")
)
WAYS = (
    "features, mean",
    "features, mean and covariance",
    "plain attention of width 21",
    "dense reference, diagonal approximation",
    "dense reference, full covariance",
)
_AS_FAST_AS_DENSE = 50


def main_job() -> str:
    """Losses of the quick run beside what needs no network."""
    found = read(f"{QUICK}/evaluation.json")
    steps = read(f"{QUICK}/config.json")["steps"]
    names = {"unigram": "unigram", "bigram": "bigram"}
    names |= {"model": f"model, {found['parameters']:,} parameters, {steps} steps", "optimal": "optimal"}
    body = [[text, bare(found["predictors"][name]["loss"], 4)] for name, text in names.items()]
    return markdown(["predictor", f"loss, nats per symbol, {found['split']} split"], body, "lr")


def speed() -> str:
    """Forward and backward by length, and how many times as long as exact features the dense reference takes."""
    found = [row for row in read(CPU_SPEEDS)["rows"] if row["section"] == "speed"]
    body = []
    for n in sorted({row["n"] for row in found}):
        here = {row["name"]: row for row in found if row["n"] == n}
        body.append([str(n), *(_speed_cell(name, here.get(name)) for name in WAYS)])
    return markdown(["N", *WAYS], body, "rrrrrr")


def _speed_cell(name: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run (minutes)"
    times = f" ({row['times features']:.3g}x)" if "dense" in name else ""
    return f"{speeds.plain(row['ms'])} ms{times}"


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


def gpu_speed() -> str:
    """Every measurement of the attention on a GPU: milliseconds, memory, and times as long as exact features."""
    body = []
    other_lengths = [row for row in read(GPU_LENGTHS)["rows"] if "ms" in row and row["n"] != 1024]
    for row in [*read(GPU_SPEEDS)["rows"], *other_lengths]:
        if "ms" in row:
            times = f"{row['times features']:.3g}" if "times features" in row else ""
            body.append([row["name"], f"{row['n']:,}", speeds.plain(row["ms"]), speeds.plain(row["peak MB"]), times])
    return markdown(["forward and backward", "N", "ms", "MB", "times exact features"], body, "lrrrr")


def gpu_requirements() -> str:
    return speeds.requirements("gauge_attn", GPU_SPEEDS, "on one H200")[0]


def gpu_models() -> str:
    return speeds.table({"one H200": GPU_MODELS})


@cache
def _runs(grid: str) -> list[dict[str, Any]]:
    from gauge_attn.records import unpack

    return unpack(read(f"{RESULTS}/{grid}/results.json"))


def verdict_table(grid: str) -> str:
    """Each claim a grid bears on: what was measured, and what follows."""
    from gauge_attn.verdicts import verdicts

    body = [[v["claim"], v["measured"], f"**{v['status']}**"] for v in verdicts(_runs(grid))]
    return markdown(["claim", "measured", "verdict"], body)


def cell_table(grid: str) -> str:
    """Every cell of a grid: mean over seeds and half of its 95 % interval."""
    from gauge_attn.grid_tables import grid_rows

    header, body = grid_rows(_runs(grid))
    return markdown(header, body, "l".ljust(len(header), "r"))


def claims() -> list[Claim]:
    """The main job, the grids' verdicts, theory, speeds."""
    found = read(f"{QUICK}/evaluation.json")
    closed = read(f"{RESULTS}/theory.json")
    uniform, onehot = closed["row_std_uniform"], closed["row_std_onehot"]
    losses = {name: bare(row["loss"], 4) for name, row in found["predictors"].items()}
    head = next(h for h in found["diagnosis"]["heads"] if (h["layer"], h["head"]) == (0, 0))
    at_50 = next(
        row["L0.H0.row_std"] for row in read(f"{QUICK}/metrics.jsonl") if (row["step"], row["split"]) == (50, "heads")
    )
    dense_row = next(row for row in read(CPU_SPEEDS)["rows"] if row["name"] == WAYS[3] and row["n"] == 512)
    dense = dense_row["times features"]
    turns = "lowest" in dense_row
    spread = f" ({dense_row['lowest']:.0f} to {dense_row['highest']:.0f} in alternating rounds)" if turns else ""
    full = next(row for row in read(CPU_SPEEDS)["rows"] if row["name"] == WAYS[4] and row["n"] == 256)["times features"]
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
        Claim(
            "gauge_attn/speed-dense",
            f"At N = 512 on 2 cores exact features are {dense:.0f} times{spread} as fast as the dense reference's "
            f"diagonal approximation, required {_AS_FAST_AS_DENSE} times; at N = 256 {full:.0f} times as fast as its "
            "full covariance.",
            "dense milliseconds over those of exact features",
            [dense, full],
            "met" if dense >= _AS_FAST_AS_DENSE else "NOT met",
            [CPU_SPEEDS],
            test="median of ratios in alternating rounds" if turns else "ratio of medians",
            required=f"at least {_AS_FAST_AS_DENSE} times at N = 512",
        ),
        Claim(
            "gauge_attn/speed-other",
            _other_speeds(),
            "milliseconds; mean total variation",
            [],
            "measured",
            [CPU_SPEEDS],
        ),
    ]
    made += observed("gauge_attn", f"{RESULTS}/observed.json")
    if (ROOT / GPU_SPEEDS).is_file():
        made += speeds.requirements("gauge_attn", GPU_SPEEDS, "on one H200")[1]
    if (ROOT / GPU_MODELS).is_file():
        made.append(_models())
    precision = [row for row in read(GPU_LENGTHS)["rows"] if row["section"] == "precision"]
    made.append(
        Claim(
            "gauge_attn/precision-gpu",
            f"On one H200 the {_rounding(precision)} (generated data).",
            "mean total variation",
            [],
            "measured",
            [GPU_LENGTHS],
        )
    )
    for grid in _grids():
        made += _of_grid(grid)
    return made


def _models() -> Claim:
    """How much faster a dot-product model of as many parameters trains."""
    record = read(GPU_MODELS)
    *ours, gpt = record["rows"]
    slower = {row["name"]: gpt["tokens_per_s"] / row["tokens_per_s"] for row in ours}
    least, most = min(slower.values()), record["required"]
    said = ", ".join(f"{times:.2f} times as fast as {name}" for name, times in slower.items())
    return Claim(
        "gauge_attn/speed-models",
        f"A dot-product GPT of as many parameters trains {said} on one H200; required at most {most:g} times.",
        "tokens per second of the GPT over those of the practical model",
        list(slower.values()),
        verdict(least, most, at_most=True),
        [GPU_MODELS],
        test="ratio of medians",
        required=f"at most {most:g} times",
    )


def _other_speeds() -> str:
    """Long sequences, wide layouts and low precisions in one sentence."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for row in read(CPU_SPEEDS)["rows"]:
        sections.setdefault(row["section"], []).append(row)
    longer, layouts = (" / ".join(speeds.plain(row["ms"]) for row in sections[name]) for name in ("memory", "layouts"))
    return (
        f"With mean and covariance N = 1,024 / 2,048 / 4,096 take {longer} ms; layouts of "
        f"K = 64 / 108 / 128 at N = 256: {layouts} ms; {_rounding(sections['precision'])}."
    )


def _rounding(precision: list[dict[str, Any]]) -> str:
    """What the number formats cost, in the worst regime."""
    worst = {name: max(row[f"{name} TV"] for row in precision) for name in ("fp32", "fp16", "bf16x3")}
    return f"mean total variation against float64 in the worst of {len(precision)} regimes: " + ", ".join(
        f"{name} {x:.0e}" for name, x in worst.items()
    )


def _of_grid(grid: str) -> list[Claim]:
    from gauge_attn.verdicts import verdicts

    runs = _runs(grid)
    seeds = sorted({run["seed"] for run in runs})
    labels = ", ".join(sorted({run["summary"]["label"] for run in runs}))
    return [
        Claim(
            f"gauge_attn/{grid}-{i:02d}",
            f"{v['claim']} ({labels}): {v['status']}. {v['measured'].rstrip('.')}.",
            v["claim"],
            [],
            v["status"],
            [f"{RESULTS}/{grid}/results.json"],
            config=f"{RESULTS}/{grid}/results.json",
            seeds=seeds,
            test="Student's t over seeds, 95 %",
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
    "gauge_attn.speed": speed,
    "gauge_attn.theory": theory,
    **(
        {"gauge_attn.gpu-requirements": gpu_requirements, "gauge_attn.gpu-speed": gpu_speed}
        if (ROOT / GPU_SPEEDS).is_file()
        else {}
    ),
    **({"gauge_attn.gpu-models": gpu_models} if (ROOT / GPU_MODELS).is_file() else {}),
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
