"""iceaggr's v3 study with smaller batches, which was stopped: four times the steps of v2 from as many events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence import iceaggr_oracle
from evidence.iceaggr_ablations import RESULTS, SEED_TABLE, path_of
from evidence.record import Claim, bare, markdown, read

FOLDER = f"{RESULTS}/ablate-v3-small-batches"
RUNS = f"{FOLDER}/runs.json"
SAME_MODEL = "v2-linear-K16"
"""v2 in the seed's table: the same model, seeds and events, in large batches."""
TRAINED, SEEDS = 10, 3
"""Variants of the study that are trained (the others score those), and the seeds asked for."""


def table() -> str:
    """Mean error of every finished variant by seed, and what it adds to v2 over the seeds that both have.

    Random directions and line fits are of the held-out events of the seed's table, which are as many.
    """
    record = read(RUNS)
    paired = {row["treated"]: row for row in record["contrasts"]}
    body = []
    for row in record["rows"]:
        runs = [run for run in record["runs"] if run["variant"] == row["name"]]
        less = paired.get(row["name"])
        body.append([
            row["name"],
            *_errors([run["mean_deg"] for run in runs], row),
            "" if less is None else f"{less['mean']:+.2f}",
            "" if less is None else _range(less, len(less["seeds"])),
            _each(run["left_plateau"] for run in runs),
            _steps(run["steps"] for run in runs),
        ])  # fmt: skip
    old, curves = _large()
    less = _more_steps()
    body.append([
        f"{SAME_MODEL} of the original's table",
        *_errors(old["seed_means"], {"mean": old["mean_deg"], "low": old["seeds_low"], "high": old["seeds_high"]}),
        f"{-less['mean']:+.2f}",
        _range({"low": -less["high"], "high": -less["low"]}, SEEDS),
        _each(_left(run) for run in curves),
        _steps(run["step"][-1] for run in curves),
    ])  # fmt: skip
    others = [(row["name"], row["mean_deg"]) for row in read(path_of(SEED_TABLE))["baselines"]]
    oracle = read(iceaggr_oracle.ORACLE)["all"]
    others.append((f"oracle, {oracle['n']:,} other events", oracle["mean_deg"]["value"]))
    body += [[name, "", f"{mean:.2f}", "", "", "", "", ""] for name, mean in others]
    header = [f"mean opening angle, degrees ({record['label']})", "by seed", "mean", "over seeds", "less base"]
    header += ["over seeds", "left the plateau after, thousand events", "steps"]
    return markdown(header, body, "lrrrrrrr")


def claims() -> list[Claim]:
    """What was finished, what four times the steps changed for v2, and which parts win again."""
    record = read(RUNS)
    label, runs = record["label"], record["runs"]
    base = [run for run in runs if run["variant"] == "base"]
    old, curves = _large()
    more = _more_steps()
    steps = [run["step"][-1] for run in curves]
    times = sum(run["steps"] for run in base) / sum(steps)
    new_left, old_left = (_each(values) for values in ((r["left_plateau"] for r in base), map(_left, curves)))
    new_at, old_at = (
        " / ".join(f"{round(left / run_events * n):,}" for left, run_events, n in found)
        for found in (
            [(run["left_plateau"], run["events"], run["steps"]) for run in base],
            [(_left(run), run["events"][-1], run["step"][-1]) for run in curves],
        )
    )
    wins = [row for row in record["contrasts"] if row["high"] < 0]
    corrected = _corrected()
    return [
        _claim(
            "finished",
            f"{len(runs)} of the study's {TRAINED * SEEDS} trainings were finished when it was stopped ({label}).",
            "finished trainings",
            [len(runs)],
        ),
        _claim(
            "more-steps",
            f"With {times:.1f} times the steps from the same 2,000,000 events v2 ends at "
            f"{_mean([run['mean_deg'] for run in base]):.1f} degrees instead of {old['mean_deg']:.1f}: "
            f"{more['mean']:+.2f} degrees ({more['low']:+.2f} to {more['high']:+.2f} over seeds; {label}), not shown.",
            "paired difference of mean opening angles, degrees",
            [more["mean"]],
            raw=[RUNS, path_of(SEED_TABLE)],
            interval=(more["low"], more["high"]),
            test="Student's t over seeds",
        ),
        _claim(
            "plateau",
            f"It leaves the plateau after {new_left} thousand events by seed, where large batches took {old_left} "
            f"thousand: earlier in events, later in steps ({new_at} against {old_at}; {label}; looked at every 20 "
            "steps).",
            "training events after which the training angle was first below 85 degrees",
            [run["left_plateau"] for run in base],
            raw=[RUNS, f"{RESULTS}/{SEED_TABLE}/curves.json"],
        ),
        _claim(
            "parts",
            "Lower than v2 over the seeds: "
            + ", ".join(
                f"{r['treated']} by {-r['mean']:.1f} degrees ({-r['high']:.1f} to {-r['low']:.1f})" for r in wins
            )
            + f" ({label}; three seeds, each interval at 95% by itself; Holm's p of the tests over seeds, over "
            f"{len(corrected)} comparisons: {', '.join(bare(corrected[r['treated']], 3) for r in wins)}).",
            "paired differences of mean opening angles, degrees",
            [row["mean"] for row in wins],
            test="Student's t over seeds, intervals not corrected for the number of comparisons",
        ),
    ]


def _claim(name: str, sentence: str, metric: str, values: list[float], **more: Any) -> Claim:
    raw = more.pop("raw", [RUNS])
    seeds = sorted({run["seed"] for run in read(RUNS)["runs"]})
    return Claim(f"iceaggr/small-batches-{name}", sentence, metric, values, "measured", raw, seeds=seeds, **more)


def _large() -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """The row of the same model in large batches, and the curves of its runs."""
    row = next(row for row in read(path_of(SEED_TABLE))["rows"] if row["name"] == SAME_MODEL)
    curves = read(f"{RESULTS}/{SEED_TABLE}/curves.json")
    return row, [run for run in curves if run["variant"] == SAME_MODEL]


def _more_steps() -> Mapping[str, Any]:
    """v2 in small batches minus v2 in large ones, seed by seed."""
    from iceaggr.ablation_stats import over_seeds

    small = [run["mean_deg"] for run in read(RUNS)["runs"] if run["variant"] == "base"]
    found = over_seeds([a - b for a, b in zip(small, _large()[0]["seed_means"], strict=True)])
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _corrected() -> dict[str, float]:
    """Variant -> Holm's p of its paired t-test against v2, over those that have all seeds."""
    from iceaggr.ablation_stats import holm_over_seeds

    record = read(RUNS)
    whole = [row for row in record["contrasts"] if len(row["seeds"]) == SEEDS]
    means = {
        row["name"]: [run["mean_deg"] for run in record["runs"] if run["variant"] == row["name"]]
        for row in record["rows"]
    }
    rows = [{"name": name, "seed_means": values} for name, values in means.items()]
    found = holm_over_seeds({"rows": rows, "contrasts": whole})
    return {row["treated"]: p for row, p in zip(whole, found, strict=True) if p is not None}


def _left(run: Mapping[str, Any]) -> Any:
    from iceaggr.ablation_curves import left_plateau

    return left_plateau(dict(run))


def _errors(by_seed: list[float], row: Mapping[str, Any]) -> list[str]:
    each = " / ".join(f"{value:.2f}" for value in by_seed)
    return [each, f"{row['mean']:.2f}", _range(row, len(by_seed))]


def _range(row: Mapping[str, Any], seeds: int) -> str:
    """Student's interval; of two seeds it says nothing."""
    return f"{row['low']:.2f} to {row['high']:.2f}" if seeds >= SEEDS else f"{seeds} seeds"


def _each(events: Any) -> str:
    return " / ".join("never" if n is None else f"{n / 1000:,.0f}" for n in events)


def _steps(steps: Any) -> str:
    found = sorted(steps)
    return f"{found[0]:,} to {found[-1]:,}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


TABLES = {"iceaggr.small-batches": table}
