"""Zeta zeros: scores of every experiment, controls, which primes a model knows, speeds; memory: rh_memory_slots.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evidence import rh_calibration, rh_frequencies, rh_memory_slots, rh_training, speeds
from evidence.drawing import Drawing
from evidence.record import bare, columns, interval, markdown, read, verdict
from evidence.rh_memory_slots import judgement
from evidence.rh_runs import RESULTS, judged, runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = f"{RESULTS}/runs/explicit-small-cpu-seed0"
GPU_SPEEDS, CPU_SPEEDS = f"{RESULTS}/bench/rh-memory-cuda.json", f"{RESULTS}/bench/rh-memory-cpu.json"
ZEROS = {"one H200": f"{RESULTS}/bench/zeros-cuda.json", "2 shared cores": f"{RESULTS}/bench/zeros-cpu.json"}
_ZEROS_WITHIN_S = {
    "one H200": {2_001_052: 1, 20_000_000: 20, 100_000_000: 180},
    "2 shared cores": {100_000: 1, 2_001_052: 8},
}
PEAK_MB = 500
_BASELINES = {
    "iid marginal": None,
    "sine-process gap": None,
    "sine process, 8 gaps": None,
    "AR(64), height": -0.38,
    "prime phases": -0.65,
}
"""Predictors without a network, and the score each has to reach."""


def _baselines() -> dict[str, Any]:
    """Scores of the predictors without a network on the zeta zeros, by name."""
    zeta = read(f"{SMALL}/evaluation.json")["label"]
    return {row["name"]: row for row in judged()["baselines"] if row["on"] == zeta}


def _mean(row: Mapping[str, Any], metric: str = "nll_last", digits: int = 3) -> str:
    summary = row[metric]
    return interval({"value": summary["mean"], "low": summary["low"], "high": summary["high"]}, digits, short=True)


def scores() -> str:
    """Every experiment over its seeds, below the predictors without a network."""
    known = _baselines()
    windows = {run.experiment: f"{run.evaluation['windows']:,}" for run in runs() if run.evaluation is not None}
    without = f"{read(f'{SMALL}/evaluation.json')['windows']:,}"
    body = [[f"*{name}*", "", without, interval(known[name], 3, short=True), "", ""] for name in _BASELINES]
    for row in judged()["experiments"]:
        by_seed = ", ".join(bare(x, 3) for x in row["by_seed"].values())
        sd = "" if row["nll_last"]["sd"] is None else bare(row["nll_last"]["sd"], 3)
        seeds = ", ".join(map(str, row["seeds"]))
        body.append([row["experiment"], seeds, windows[row["experiment"]], _mean(row), sd, by_seed])
    return markdown(["predictor", "seeds", "windows", "nll_last", "sd", "by seed"], body, "llrrrl")


def requirements() -> str:
    """What scores and times of training have to reach, beside what they do."""
    from rh_memory.targets import met, time_met, time_taken

    known = _baselines()
    body = [
        [f"*{name}*", f"nll_last <= {limit}", interval(known[name], 3, short=True), _met(known[name]["value"], limit)]
        + ["", "", ""]
        for name, limit in _BASELINES.items()
        if limit is not None
    ]
    for row in judged()["experiments"]:
        if row["target"]:
            time = [row["target_time"], time_taken(row), _bold(time_met(row))] if row["target_time"] else ["", "", ""]
            measured = _mean(row, row["target_metric"], 3 if "<=" in row["target"] else 4)  # ranges are narrow
            body.append([row["experiment"], row["target"], measured, _bold(met(row)), *time])
    return markdown(["predictor", "required", "mean over seeds", "", "within", "training took", ""], body, "llrllrl")


def _bold(word: str) -> str:
    return word.replace("NOT met", "**NOT met**")


def headline() -> str:
    """Baselines and the two flagships: one line each."""
    known = _baselines()
    names = {
        "iid marginal": "the spacings' own distribution",
        "sine process, 8 gaps": "random-matrix theory given 8 gaps",
        "AR(64), height": "64 gaps, weights by height",
    }
    body = [[text, "", interval(known[name], 3, short=True)] for name, text in names.items()]
    rows = {row["experiment"]: row for row in judged()["experiments"]}
    steps = {run.experiment: run.config.steps for run in runs()}
    named = {
        "e0-rope": "transformer, rotary positions, {:,} steps",
        "explicit": "transformer with explicit-formula attention, told the heights, {:,} steps",
    }
    for name, text in named.items():
        if name in rows:
            shown, what = _mean(rows[name]), text.format(steps[name])
            body.append([what, str(len(rows[name]["seeds"])), f"**{shown}**" if name == "explicit" else shown])
    return markdown(["nats per unfolded spacing, lower is better", "seeds", "nll_last"], body, "lrr")


def controls() -> str:
    """What a model loses without the primes, seed by seed."""
    body = [
        [" − ".join(row["experiments"]), ", ".join(row["by_seed"]), interval(row, 3, short=True), judgement(row)]
        for row in judged()["controls"]
    ]
    return markdown(["control", "seeds", "nll_last less its model's", "worse without the primes"], body, "llrl")


def primes() -> str:
    """Which prime powers the small model has learned (one seed)."""
    found = read(f"{SMALL}/physics.json")
    learned, law, variance = found["learned"], found["law"], found["number_variance_near_20"]
    share = f"{100 * learned['power_predicted']:.1f} %"
    near = interval({"value": variance["variance"], **{k: variance[k] for k in ("low", "high")}}, 4, short=True)
    theory = f"with primes {bare(variance['primes'], 4)}, GUE {bare(variance['GUE'], 4)}"
    first = "explicit formula, first order"
    amplitude = f"amplitude of the lines A sin(log p / 2D) / p^b, {law['zeros']['lines']} primes: A ({first}: 2/pi)"
    body = [
        [
            "lines of prime powers that stand out; share of their power predicted",
            str(learned["lines_that_stand_out"]),
            share,
        ],
        [amplitude, *(interval(law[of]["prefactor"], 3, short=True) for of in ("zeros", "model"))],
        [
            f"b ({first}: 1/2)",
            *(interval(law[of]["exponent"], 3, short=True) for of in ("zeros", "model")),
        ],
        [f"number variance at L = 20 ({theory})", near, ""],
    ]
    return markdown(["what", "zeros", "model"], body, "lrr")


def zeros() -> str:
    """Time to compute, verify and write the first N zeros, beside what is asked."""
    body = [
        [f"{row['count']:,} zeros, {where}", f"<= {limit} s", f"{row['seconds']:.2f} s", _met(row["seconds"], limit)]
        for where, row, limit in timed_zeros()
    ]
    peak = peak_mb()
    body.append(["memory, 2,001,052 zeros, 2 shared cores", f"<= {PEAK_MB} MB", f"{peak:.0f} MB", _met(peak, PEAK_MB)])
    return markdown(["what", "required", "measured", ""], body, "lrrl")


def peak_mb() -> float:
    """Peak of the resident set for two million zeros on a CPU, torch itself included."""
    rows = read(ZEROS["2 shared cores"])["rows"]
    return float(next(row["peak_rss_mb"] for row in rows if row["count"] == 2_001_052))


def timed_zeros() -> list[tuple[str, dict[str, Any], float]]:
    """(machine, row, limit in seconds) of what something is asked of."""
    return [
        (where, row, limits[row["count"]])
        for where, path in ZEROS.items()
        for limits in [_ZEROS_WITHIN_S[where]]
        for row in read(path)["rows"]
        if row["count"] in limits
    ]


def _met(measured: float, limit: float) -> str:
    return _bold(verdict(measured, limit, at_most=True))


def speed() -> str:
    """Whole training steps."""
    return speeds.table({"one H200": GPU_SPEEDS, "2 shared cores": CPU_SPEEDS})


def form_factor() -> Figure:
    from rh_memory import figures

    return figures.form_factor(columns(f"{SMALL}/form_factor.csv"))


def lines() -> Figure:
    from rh_memory import figures

    return figures.lines(columns(f"{SMALL}/lines.csv"))


def number_variance() -> Figure:
    from rh_memory import figures

    labels = {"xlabel": "interval L (mean gaps)", "ylabel": "number variance"}
    theory = {"GUE": "GUE", "primes": "with primes"}
    return figures.measured(columns(f"{SMALL}/number_variance.csv"), "L", "variance", theory, labels)


TABLES = {
    **rh_memory_slots.TABLES,
    **rh_training.TABLES,
    **rh_frequencies.TABLES,
    **rh_calibration.TABLES,
    "rh_memory.scores": scores,
    "rh_memory.requirements": requirements,
    "rh_memory.headline": headline,
    "rh_memory.controls": controls,
    "rh_memory.primes": primes,
    "rh_memory.zeros": zeros,
    "rh_memory.speed": speed,
}
DRAWINGS = [
    Drawing(f"{SMALL}/{draw.__name__}.png", [f"{SMALL}/{draw.__name__}.csv"], draw)
    for draw in (form_factor, lines, number_variance)
]
