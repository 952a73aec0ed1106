"""Zeta zeros and memory slots: the claims judged, what slots carry, postfix beside prefix memory, stopped runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lab_shared.stats import seeds_table

from evidence.record import Claim, bare, interval, markdown
from evidence.rh_runs import folders, judged, runs, validations

SLOTTED = ("e2-rope", "e3, steps=3000", "e4, steps=3000", "e5, steps=3000")
TRAINED_ON_ALL = ("e0-rope", "e1-rope", "e2-rope")
"""Those that predict after every spacing; the others after every sixteenth."""
WITHOUT_POSTFIX = ("e0", *TRAINED_ON_ALL)
STEP, NONE, PREFIX = 3000, "e0-rope", "e2-rope"
"""Where postfix memory ended, and what it is held against: no memory, and strong prefix memory."""


def memory() -> str:
    """The claims about memory slots with the statistic that decides each."""
    body = [
        [
            row["claim"],
            row["said"],
            row["statistic"],
            " − ".join(row["experiments"]),
            "" if row["value"] is None else interval(row, 3, short=True),
            row["needed"],
            judgement(row),
        ]
        for row in judged()["claims"]
    ]
    return markdown(["claim", "as first stated", "measured", "runs", "value", "holds if", "verdict"], body, "llllrll")


def judgement(row: Mapping[str, Any]) -> str:
    """The verdict, and why where it is none."""
    return f"{row['verdict']} ({row['why']})" if row["why"] else f"**{row['verdict']}**"


def slots() -> str:
    """What is lost without a slot, or with slots mixed up, beside all that the model has gained."""
    from rh_memory.diagnostics.aggregate import headlines

    def largest(how: str) -> Callable[[Any], float | None]:
        return lambda run: max((row["value"] for row in run.diagnostics.get(how, ())), default=None)

    def permuted(part: str) -> Callable[[Any], float | None]:
        return lambda run: run.diagnostics["permutation"].get(part, {}).get("value")

    measures: dict[str, Callable[[Any], float | None]] = {
        "gain over the i.i.d. marginal": lambda run: -run.evaluation["nll_last_minus"]["iid marginal"]["value"],
        "a slot removed, the worst of eight": largest("removed"),
        "a slot's state replaced by its mean over windows, the worst": largest("mean"),
        "a slot's state taken from another window, the worst": largest("resampled"),
        "all contents zeroed": lambda run: headlines(run.diagnostics)["identity_only_cost"],
        "identity embeddings permuted": permuted("identity embedding"),
        "positions permuted": permuted("slot position"),
        "readout weights permuted": permuted("readout weight"),
    }
    diagnosed = {
        name: [run for run in runs() if run.experiment == name and run.diagnostics is not None] for name in SLOTTED
    }
    body = []
    for what, value in measures.items():
        cells = []
        for group in diagnosed.values():
            values = [value(run) for run in group]
            cells.append(", ".join("" if x is None else bare(round(x, 3) + 0.0, 3) for x in values))
        body.append([what, *cells])
    header = [f"{name} (seed{'s' * (len(group) > 1)} {_list(group)})" for name, group in diagnosed.items()]
    return markdown(["nats, by seed", *header], body, "lrrrr")


def _list(group: list[Any]) -> str:
    return ", ".join(str(run.seed) for run in group)


def _at_step() -> dict[str, dict[int, float]]:
    """experiment -> seed -> nll_last of the validation at STEP, of all runs about memory."""
    found: dict[str, dict[int, float]] = {}
    for (name, seed), folder in folders().items():
        if name in (*TRAINED_ON_ALL, *SLOTTED):
            found.setdefault(name, {})[seed] = validations(folder)[STEP]["nll_last"]
    return found


def _less(name: str, other: str) -> dict[str, Any]:
    """Validations at STEP of one experiment less those of another, seed by seed and over seeds."""
    by_seed, minus = _at_step()[name], _at_step()[other]
    rows = [{"seed": seed, "value": x - minus[seed]} for seed, x in by_seed.items()]
    summary = seeds_table(rows).summary["value"]
    return {"value": summary.mean, "low": summary.low, "high": summary.high, "rows": rows}


def midway() -> str:
    """Validations at step 3,000 of all experiments about memory, less those without and with prefix memory."""
    lengths = {run.experiment: run.config.steps for run in runs()}
    body = []
    for name, by_seed in _at_step().items():
        values = ", ".join(bare(x, 3) for x in by_seed.values())
        less = ["" if name == other else interval(_less(name, other), 3, short=True) for other in (NONE, PREFIX)]
        body.append([name.partition(",")[0], f"{STEP:,} of {lengths[name]:,}", values, *less])
    header = ["run", "step", "validation, nll_last, by seed", f"less {NONE}'s", f"less {PREFIX}'s"]
    return markdown(header, body, "llrrr")


def stopped() -> str:
    """Runs that were stopped before their end, with their last validation."""
    body = []
    for row in judged()["stopped"]:
        last = row["last_validation"]
        scores = (
            ["", "", ""] if last is None else [f"{last['step']:,}", bare(last["nll"], 3), bare(last["nll_last"], 3)]
        )
        body.append([row["run"], f"{row['steps']:,} of {row['of']:,}", *scores])
    return markdown(["run", "steps", "last validation at step", "nll_all", "nll_last"], body, "lrrrr")


def claims() -> list[Claim]:
    """Postfix less prefix memory at equal steps, and how far the tail lies above a last validation."""
    known, found = folders(), []
    for name in (name for name in _at_step() if name not in TRAINED_ON_ALL):
        for other, what in ((NONE, "no memory"), (PREFIX, "prefix memory")):
            less, short = _less(name, other), name.partition(",")[0]
            seeds = [row["seed"] for row in less["rows"]]
            found.append(
                Claim(
                    f"rh_memory/midway-{short}-{other}",
                    f"At step 3,000, its last, {short}'s validation is worse by {interval(less, 2, short=True)} nats "
                    f"than that of {other} ({what}), which had 1,000 steps to go ({len(seeds)} seeds).",
                    "difference of nll_last on the validation windows",
                    [row["value"] for row in less["rows"]],
                    "measured",
                    [f"{known[run, seed]}/metrics.jsonl" for run in (name, other) for seed in seeds],
                    seeds=seeds,
                    interval=(less["low"], less["high"]),
                    test="Student's t over seeds, 95 %",
                )
            )
    finished = [run for run in runs() if run.experiment in WITHOUT_POSTFIX and run.evaluation is not None]
    above = [run.evaluation["nll_all"]["value"] - run.last_validation["nll"] for run in finished]
    paths = [known[run.experiment, run.seed] for run in finished]
    found.append(
        Claim(
            "rh_memory/tail-above-validation",
            f"In the {len(finished)} finished runs of {', '.join(WITHOUT_POSTFIX)}, nll_all is "
            f"{bare(min(above), 2)} to {bare(max(above), 2)} nats higher on the whole tail than at the last "
            "validation.",
            "nll_all on the tail less that of the last validation, nats",
            above,
            "measured",
            [f"{path}/{file}" for path in paths for file in ("evaluation.json", "metrics.jsonl")],
            seeds=[run.seed for run in finished],
            test="range over runs",
        )
    )
    return [*found, _e5_less_e4()]


def _e5_less_e4() -> Claim:
    e5, e4 = ({run.seed: run for run in runs() if run.experiment == f"{name}, steps={STEP}"} for name in ("e5", "e4"))
    seeds = sorted(e5.keys() & e4.keys())
    values = [_scored(e5[seed]) - _scored(e4[seed]) for seed in seeds]
    less = seeds_table([{"seed": seed, "value": x} for seed, x in zip(seeds, values, strict=True)]).summary["value"]
    assert less.low is not None, "there are enough seeds for an interval"
    assert less.high is not None
    shown = interval({"value": less.mean, "low": less.low, "high": less.high}, 3, short=True)
    return Claim(
        "rh_memory/e5-less-e4",
        f"On the tail nll_last of e5 less that of e4 is {shown} nats after {STEP:,} steps ({len(seeds)} seeds).",
        "difference of nll_last on the tail, nats",
        values,
        "measured",
        [f"{folders()[run.experiment, run.seed]}/evaluation.json" for by in (e5, e4) for run in by.values()],
        seeds=seeds,
        interval=(less.low, less.high),
        test="Student's t over seeds, 95 %",
    )


def _scored(run: Any) -> float:
    return float(run.evaluation["nll_last"]["value"])


TABLES = {
    "rh_memory.memory": memory,
    "rh_memory.slots": slots,
    "rh_memory.midway": midway,
    "rh_memory.stopped": stopped,
}
