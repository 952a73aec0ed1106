"""`rh-memory verdicts DIR|GLOB...`: each claim about memory with the runs that test it, a statistic and a verdict.

holds, fails: the whole interval over seeds lies on one side of the claim's bound. undecided: it does not, or there are
fewer than three seeds, or no records. Intervals are Student's t over seeds, of a standard deviation chi-squared. E4's
own criteria go by numbers of seeds and means (`aggregate.e4_verdict`), and what is asked of scores by their mean.
"""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab_shared.files import atomic_write
from lab_shared.stats import Summary, seeds_table

from rh_memory.claims import CLAIMS, LAST, Claim
from rh_memory.diagnostics.aggregate import e4_verdict
from rh_memory.records import Record, finished, read
from rh_memory.targets import SEEDS, met, target, time_met, time_taken

REFERENCES = ("iid marginal", "AR(64), height", "prime phases")
Groups = Mapping[str, Sequence[Record]]


def verdicts(records: Sequence[Record]) -> dict[str, Any]:
    """{"experiments", "baselines", "controls", "claims", "stopped"}: rows for tables, ready for JSON."""
    groups = finished(records)
    return {
        "experiments": [_experiment_row(name, group) for name, group in groups.items()],
        "baselines": _baselines(records),
        "controls": _controls(groups),
        "claims": [judge(claim, groups) for claim in CLAIMS] + _e4_criteria(groups),
        "stopped": [
            {"run": r.name, "steps": r.steps_done, "of": r.config.steps, "last_validation": r.last_validation}
            for r in records
            if r.evaluation is None
        ],
    }


def judge(claim: Claim, groups: Groups) -> dict[str, Any]:
    """One claim: the runs used, the statistic by seed, over seeds with its interval, and the verdict."""
    tests = _tests(claim, groups)
    names, values = max(tests, key=lambda test: len(test[1]), default=([], {}))
    row: dict[str, Any] = {
        "claim": claim.claim,
        "said": claim.said,
        "statistic": claim.statistic,
        "needed": f"< {claim.below:g}" if claim.below is not None else f"> {claim.above:g}",
        "experiments": names,
        "by_seed": {str(seed): value for seed, value in sorted(values.items())},
    }
    if not values:
        wanted = " or ".join(claim.experiments) + (f", and {' or '.join(claim.minus)}" if claim.minus else "")
        there = any(name in groups for name in claim.experiments) and not claim.minus
        why = f"not diagnosed: {wanted}" if there else f"no records: {wanted}"
        return row | {"value": None, "low": None, "high": None, "verdict": "undecided", "why": why}
    summary = _over_seeds(values)
    value, low, high = _of_spread(summary) if claim.spread else (summary.mean, summary.low, summary.high)
    return row | {"value": value, "low": low, "high": high, **_decide(len(values), low, high, claim)}


def _tests(claim: Claim, groups: Groups) -> list[tuple[list[str], dict[int, float]]]:
    """(experiments, seed -> statistic) for each of the claim's alternatives, at every length they were trained for."""
    lengths = sorted({name[at:] for name in groups if (at := name.find(", steps=")) >= 0})
    found = []
    for length in ["", *lengths]:
        for name, other in zip(claim.experiments, claim.minus or claim.experiments, strict=True):
            values = _values(groups.get(name + length, ()), claim)
            if claim.minus:
                minus = _values(groups.get(other + length, ()), claim)
                values = {seed: values[seed] - minus[seed] for seed in values.keys() & minus.keys()}
            if values:
                found.append(([name + length, other + length] if claim.minus else [name + length], values))
    return found


def _values(group: Sequence[Record], claim: Claim) -> dict[int, float]:
    return {r.seed: value for r in group if (value := claim.value(r)) is not None}


def _over_seeds(values: Mapping[int, float]) -> Summary:
    summary = seeds_table([{"seed": seed, "value": value} for seed, value in sorted(values.items())]).summary["value"]
    return summary if len(values) >= SEEDS else summary._replace(low=None, high=None)


def _of_spread(summary: Summary) -> tuple[float | None, float | None, float | None]:
    """Standard deviation over seeds, None for one, with its chi-squared interval."""
    if summary.sd is None or summary.n < SEEDS:
        return summary.sd, None, None
    from scipy.stats import chi2

    scaled = summary.sd * math.sqrt(summary.n - 1)
    low, high = (scaled / math.sqrt(chi2.ppf(p, summary.n - 1)) for p in (0.975, 0.025))
    return summary.sd, low, high


def _decide(seeds: int, low: float | None, high: float | None, claim: Claim) -> dict[str, str]:
    if seeds < SEEDS or low is None or high is None:
        return {"verdict": "undecided", "why": f"{seeds} of {SEEDS} seeds"}
    # Whatever is wanted above a bound is wanted below it with all signs turned.
    sign, bound = (1, claim.below) if claim.below is not None else (-1, claim.above)
    assert bound is not None, "a claim has a bound"
    nearest, farthest = sorted((sign * low, sign * high))
    if farthest < sign * bound:
        return {"verdict": "holds", "why": ""}
    if nearest > sign * bound:
        return {"verdict": "fails", "why": ""}
    return {"verdict": "undecided", "why": "the interval holds the bound"}


def _e4_criteria(groups: Groups) -> list[dict[str, Any]]:
    """E4's own success criteria, and all of them together."""
    names = [name for name in groups if name.partition(",")[0] in ("e4", "e4-original")]
    runs = max(([r for r in groups[name] if r.diagnostics] for name in names), key=len, default=[])
    base = {"said": "success criterion of E4", "low": None, "high": None, "value": None}
    if not runs:
        why = "no records: e4 with diagnostics"
        empty = {"needed": "", "statistic": "", "experiments": [], "by_seed": {}, "verdict": "undecided", "why": why}
        return [{"claim": "E4's success criteria", **base, **empty}]
    result = e4_verdict([r.diagnostics for r in runs if r.diagnostics])
    said = {True: "holds", False: "fails"}
    few = len(runs) < SEEDS
    shared: dict[str, Any] = {**base, "needed": "", "experiments": [runs[0].experiment], "by_seed": {}}
    shared["why"] = f"{len(runs)} of {SEEDS} seeds" if few else ""
    rows = [
        {
            **shared,
            "claim": row["criterion"],
            "statistic": row["measured"],
            "verdict": "undecided" if few else said[row["met"]],
        }
        for row in result["criteria"]
    ]
    met = sum(bool(row["met"]) for row in result["criteria"])
    verdict = "undecided" if few else said[result["met"]]
    statistic = f"{met} of {len(result['criteria'])} met"
    return [*rows, {**shared, "claim": "E4 is a success", "statistic": statistic, "verdict": verdict}]


def _experiment_row(name: str, group: Sequence[Record]) -> dict[str, Any]:
    """Scores of one experiment over its seeds, less the baselines, and whether the mean reaches the target."""
    wanted = target(group[0])
    evaluations = {r.seed: r.evaluation for r in group if r.evaluation is not None}
    scores = {
        metric: _over_seeds({seed: e[metric]["value"] for seed, e in evaluations.items()})
        for metric in ("nll_last", "nll_all")
    }
    seconds = {str(r.seed): r.seconds for r in group if r.evaluation is not None}
    return {
        "experiment": name,
        "seeds": sorted(evaluations),
        "part": f"{group[0].evaluation['part']} of {group[0].evaluation['label']}" if group[0].evaluation else "",
        "nll_last": scores["nll_last"]._asdict(),
        # A postfix memory's is a mean over its readouts only, no score to stand in one column with the others'.
        "nll_all": None if group[0].config.model.memory == "postfix" else scores["nll_all"]._asdict(),
        "by_seed": {str(seed): e["nll_last"]["value"] for seed, e in sorted(evaluations.items())},
        "minus": {
            reference: _over_seeds({s: e["nll_last_minus"][reference]["value"] for s, e in evaluations.items()}).mean
            for reference in REFERENCES
            if all(reference in e["nll_last_minus"] for e in evaluations.values())
        },
        "seconds": seconds,
        "target": None if wanted is None else wanted.text,
        "target_metric": None if wanted is None else wanted.metric,
        "met": None if wanted is None else wanted.met_by(scores[wanted.metric].mean),
        "target_time": None if wanted is None else wanted.time,
        "in_time": None if wanted is None else wanted.in_time(seconds),
    }


def _baselines(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The baselines' own scores on the first data set that was scored with all of them."""
    known = [r.evaluation for r in records if r.evaluation is not None]
    most = max(known, key=lambda e: len(e["baselines"]["rows"]), default=None)
    if most is None:
        return []
    rows = [{"name": row["name"], "on": most["label"], **row["nll_last"]} for row in most["baselines"]["rows"]]
    gue = most["baselines"].get("gue")
    if gue is not None:
        rows += [{"name": name, "on": gue["data"], **value} for name, value in gue["nll_last"].items()]
    return rows


def _controls(groups: Groups) -> list[dict[str, Any]]:
    """What a model loses without the primes: nll_last of each control less that of its model, seed by seed."""
    rows = []
    for name, group in groups.items():
        model = group[0].control_of
        if model is None or model not in groups:
            continue
        claim = Claim(
            f"{name} is worse than {model}",
            "the primes are what helps",
            "nll_last less that of the model",
            LAST,
            (name,),
            minus=(model,),
            above=0.0,
        )
        if _tests(claim, groups):
            rows.append(judge(claim, groups))
    return rows


def _tables(result: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of cells with a header) of each table."""

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:+.4f}"

    def interval(x: Mapping[str, Any], value: str = "value") -> str:
        return number(x[value]) if x["low"] is None else f"{number(x[value])} [{number(x['low'])}, {number(x['high'])}]"

    def verdict(row: Mapping[str, Any]) -> str:
        return f"{row['verdict']} ({row['why']})" if row["why"] else row["verdict"]

    header = ["experiment", "seeds", "nll_last", "sd", "nll_all", *(f"less {name}" for name in REFERENCES)]
    experiments = [[*header, "target", "", "training", "at most", ""]] + [
        [
            row["experiment"],
            " ".join(map(str, row["seeds"])),
            interval(row["nll_last"], "mean"),
            number(row["nll_last"]["sd"]).lstrip("+"),
            number(row["nll_all"] and row["nll_all"]["mean"]),
            *(number(row["minus"].get(name)) for name in REFERENCES),
            row["target"] or "",
            met(row),
            time_taken(row),
            row["target_time"] or "",
            time_met(row),
        ]
        for row in result["experiments"]
    ]
    baselines = [["baseline", "on", "nll_last"]] + [[x["name"], x["on"], interval(x)] for x in result["baselines"]]
    claims = [["claim", "said", "measured", "runs", "value", "holds if", "verdict"]] + [
        [
            row["claim"],
            row["said"],
            row["statistic"],
            " - ".join(row["experiments"]) + (f", {len(row['by_seed'])} seeds" if row["by_seed"] else ""),
            interval(row),
            row["needed"],
            verdict(row),
        ]
        for row in result["claims"]
    ]
    controls = [["control", "seeds", "nll_last less that of its model", "worse without primes"]] + [
        [" - ".join(row["experiments"]), " ".join(row["by_seed"]), interval(row), verdict(row)]
        for row in result["controls"]
    ]
    stopped = [["run", "steps", "last validation"]] + [
        [
            row["run"],
            f"{row['steps']:,} of {row['of']:,}",
            "none"
            if row["last_validation"] is None
            else f"step {row['last_validation']['step']:,}: nll_last {row['last_validation']['nll_last']:+.4f}",
        ]
        for row in result["stopped"]
    ]
    named = [
        ("Scores: mean over seeds [95 % interval], nats per unfolded spacing, lower is better", experiments),
        ("Baselines [95 % block-bootstrap interval]", baselines),
        ("Controls", controls),
        ("Claims about memory", claims),
        ("Stopped before the end, not scored", stopped),
    ]
    return [(title, rows) for title, rows in named if len(rows) > 1]


def text(result: Mapping[str, Any]) -> str:
    """All tables as aligned columns."""
    parts = []
    for title, rows in _tables(result):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts)


def markdown(result: Mapping[str, Any]) -> str:
    """All tables as GitHub Markdown."""
    parts = []
    for title, (header, *rows) in _tables(result):
        lines = [header, ["---"] * len(header), *rows]
        parts.append("\n".join([f"### {title}", "", *("| " + " | ".join(line) + " |" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def main(paths: Sequence[str | Path], json: bool = False, markdown_file: Path | None = None) -> dict[str, Any]:
    """`rh-memory verdicts DIR|GLOB...`: print the tables (or one JSON object), and write them as Markdown."""
    result = verdicts(read(paths))
    if markdown_file is not None:
        atomic_write(markdown_file, markdown(result))
    print(json_module.dumps(result) if json else text(result))
    return result
