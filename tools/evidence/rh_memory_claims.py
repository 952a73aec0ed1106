"""Claims about zeta zeros: scores, controls, memory, the primes a model knows, times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence import rh_memory_slots, rh_training, speeds
from evidence.record import Claim, bare, interval, observed, read, slug, verdict
from evidence.rh_memory import CPU_SPEEDS, GPU_SPEEDS, PEAK_MB, SMALL, ZEROS, peak_mb, timed_zeros
from evidence.rh_runs import RESULTS, folders, judged

ONCE_ABOVE = 10_000_000
"""`bench_zeros` computes more zeros than these once."""


def claims() -> list[Claim]:
    """Scores of experiments, controls, claims about memory, the primes a model knows, zeros, speeds."""
    unit = "nats per unfolded spacing"
    found = []
    known = folders()
    for row in judged()["experiments"]:
        seeds, metric = row["seeds"], row["target_metric"] or "nll_last"
        summary, raw = row[metric], [f"{known[row['experiment'], seed]}/evaluation.json" for seed in seeds]
        sd = "one seed" if summary["sd"] is None else f"{len(seeds)} seeds, sd {bare(summary['sd'], 2)}"
        required = f"; required {row['target']}" if row["target"] else ""
        found.append(
            Claim(
                f"rh_memory/score-{slug(row['experiment'])}",
                f"{row['experiment']} scores {bare(summary['mean'], 2)} nats on held-out zeros ({metric}, {sd})"
                f"{required}.",
                f"{metric}, {unit}",
                [read(path)[metric]["value"] for path in raw],
                {None: "measured", True: "met", False: "NOT met"}[row["met"]],
                raw,
                config=f"{known[row['experiment'], seeds[0]]}/config.json",
                seeds=seeds,
                interval=None if summary["low"] is None else (summary["low"], summary["high"]),
                test="mean over seeds; Student's t, 95 %",
                required=row["target"],
            )
        )
        if row["in_time"] is not None:
            found.append(_training_time(row))
    for kind, judgements in (("control", judged()["controls"]), ("memory", judged()["claims"])):
        for row in judgements:
            found.append(_judgement(kind, row))
    for row in judged()["baselines"]:
        found.append(
            Claim(
                f"rh_memory/baseline-{slug(row['name'] + ' ' + row['on'])}",
                f"{row['name']} scores {bare(row['value'], 2)} nats on {row['on']}.",
                f"nll_last, {unit}",
                [row["value"]],
                "measured",
                [f"{SMALL}/evaluation.json"],
                interval=None if row.get("low") is None else (row["low"], row["high"]),
                test="block bootstrap, 95 %",
            )
        )
    return [*found, *rh_memory_slots.claims(), *rh_training.claims(), *_small(), *_times()]


def _training_time(row: Mapping[str, Any]) -> Claim:
    from rh_memory.targets import time_met, time_taken

    return Claim(
        f"rh_memory/training-time-{slug(row['experiment'])}",
        f"{row['experiment']} trains in {time_taken(row)}, loading of the zeros, compilation and validations included; "
        f"required at most {row['target_time']}: {time_met(row)}.",
        "seconds",
        list(row["seconds"].values()),
        time_met(row),
        [f"{folders()[row['experiment'], seed]}/metrics.jsonl" for seed in row["seeds"]],
        seeds=row["seeds"],
        test="the slowest run",
        required=f"at most {row['target_time']}",
    )


def _judgement(kind: str, row: Mapping[str, Any]) -> Claim:
    known = folders()
    # E4's own criteria are about all of its runs at once, and list none by seed.
    seeds = [int(seed) for seed in row["by_seed"]] or [s for name, s in known if name in row["experiments"]]
    measured = "" if row["value"] is None else f": {row['statistic']} {interval(row, 3, short=True)}"
    raw = [
        f"{known[name, seed]}/{'evaluation' if 'nll' in row['statistic'] else 'diagnostics'}.json"
        for name in row["experiments"]
        for seed in seeds
    ]
    why = f" ({row['why']})" if row["why"] else ""
    return Claim(
        f"rh_memory/{kind}-{slug(row['claim'])}",
        f"{row['claim']}{measured}; {row['verdict']}{why}.",
        row["statistic"],
        list(row["by_seed"].values()),
        row["verdict"],
        raw,
        seeds=seeds,
        interval=None if row["low"] is None else (row["low"], row["high"]),
        test="Student's t over seeds, of a spread chi-squared, 95 %",
        required=row["needed"] or None,
    )


def _small() -> list[Claim]:
    """The model that two cores train: its score, its calibration, its primes."""
    scored, found = read(f"{SMALL}/evaluation.json"), read(f"{SMALL}/physics.json")
    learned, pit = found["learned"], scored["pit_last"]["mean"]
    within = next(row["observed"] for row in scored["coverage_last"] if row["nominal"] == 0.9)
    shared: dict[str, Any] = {"config": f"{SMALL}/config.json", "seeds": [scored["seed"]]}
    return [
        Claim(
            "rh_memory/small-score",
            f"With explicit-formula attention a model of {scored['parameters']:,} parameters scores "
            f"{bare(scored['nll_last']['value'], 2)} nats on zeros above those it was trained on (one seed).",
            "nll_last, nats per unfolded spacing",
            [scored["nll_last"]["value"]],
            verdict(scored["nll_last"]["value"], -1.1, at_most=True),
            [f"{SMALL}/evaluation.json"],
            interval=(scored["nll_last"]["low"], scored["nll_last"]["high"]),
            test="block bootstrap, 95 %",
            required="nll_last <= -1.1",
            **shared,
        ),
        Claim(
            "rh_memory/small-calibration",
            f"The small model's PIT has mean {bare(pit['value'], 3)} (ideal .5) and its central 90 % intervals hold "
            f"{100 * within['value']:.1f} % (one seed).",
            "mean of the probability integral transform; coverage",
            [pit["value"], within["value"]],
            "measured",
            [f"{SMALL}/evaluation.json"],
            interval=(pit["low"], pit["high"]),
            test="block bootstrap, 95 %",
            **shared,
        ),
        Claim(
            "rh_memory/small-primes",
            f"What the small model predicts holds the lines of {learned['lines_that_stand_out']} prime powers with "
            f"{100 * learned['power_predicted']:.1f} % of their power (one seed).",
            "share of the power of the lines at log q that is predicted",
            [learned["power_predicted"]],
            "measured",
            [f"{SMALL}/physics.json"],
            **shared,
        ),
    ]


def _times() -> list[Claim]:
    found = [
        Claim(
            f"rh_memory/zeros-{slug(where)}-{row['count']}",
            f"{row['count']:,} zeros on {where} take {row['seconds']:.2g} s; required at most {limit} s.",
            "seconds",
            [row["seconds"]],
            verdict(row["seconds"], limit, at_most=True),
            [ZEROS[where]],
            test="median of repeats" if row["count"] <= ONCE_ABOVE else "one run",
            required=f"at most {limit} s",
        )
        for where, row, limit in timed_zeros()
    ]
    peak = peak_mb()
    found.append(
        Claim(
            "rh_memory/zeros-memory",
            f"2,001,052 zeros on 2 shared cores take {peak:.0f} MB at the peak, torch included; required at most "
            f"{PEAK_MB} MB.",
            "peak resident set, MB",
            [peak],
            verdict(peak, PEAK_MB, at_most=True),
            [ZEROS["2 shared cores"]],
            required=f"at most {PEAK_MB} MB",
        )
    )
    found += observed("rh_memory", f"{RESULTS}/observed.json")
    for where, path in (("on one H200", GPU_SPEEDS), ("on 2 shared cores", CPU_SPEEDS)):
        found += speeds.claims("rh_memory", path, where, "random spacings")
    return found
