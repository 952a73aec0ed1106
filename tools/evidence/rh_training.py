"""Zeta zeros: how the flagship trains and what it holds of that on the tail, and Muon beside AdamW."""

from __future__ import annotations

from typing import Any

from lab_shared.stats import seeds_table

from evidence.record import ROOT, Claim, bare, interval, markdown, read
from evidence.rh_runs import RESULTS, folders, runs, validations

FLAGSHIP = "explicit"
LOGGED = 25
"""Logged losses averaged at the end of a run."""
MIN_SEEDS, TRAINED_ON = 3, 0.9
_MUON = {"e0-rope": "e0-rope, optimizer=muon", FLAGSHIP: "explicit, optimizer=muon, ema=0.999"}
FEW_ZEROS = {
    "zeros=40000": ("few", "the tail of the first 40,000 zeros"),
    "zeros=40000, split=interleaved": ("few-interleaved", "held-out blocks of the first 40,000 zeros"),
    "values=plain, zeros=40000": ("few-plain", "the tail of the first 40,000 zeros, with plain values,"),
    "zeros=200000": ("200000", "the tail of the first 200,000 zeros"),
}
"""Small models on so few zeros that they see each of them many times, as the flagship does two million."""


def _course(name: str, seed: int) -> dict[str, Any]:
    """Training loss at the end, best and last validation, score on the tail, of one run."""
    folder = folders()[name, seed]
    losses = [row["nll"] for row in read(f"{folder}/metrics.jsonl") if row["split"] == "train"][-LOGGED:]
    looks = validations(folder)
    best = min(looks, key=lambda step: looks[step]["nll"])
    scores, config = read(f"{folder}/evaluation.json"), read(f"{folder}/config.json")
    spacings = config["steps"] * config["batch_size"] * config["model"]["context"]
    return {
        "steps": max(looks),
        "passes": spacings / (TRAINED_ON * config["data"]["zeros"]),
        "train": sum(losses) / len(losses),
        "best step": best,
        "best": looks[best]["nll"],
        "last": looks[max(looks)]["nll"],
        "tail": scores["nll_all"]["value"],
        "tail last": scores["nll_last"]["value"],
        "paths": [f"{folder}/metrics.jsonl", f"{folder}/evaluation.json"],
    }


def _names() -> list[str]:
    """The flagship at other lengths and with other optimisers, in the order of their names."""
    kept = {run.experiment for run in runs() if run.preset == FLAGSHIP and run.evaluation is not None}
    return sorted(kept, key=lambda name: (len(name), name))


def courses() -> str:
    """Every run of the flagship: where its training and its validation end."""
    return _table(_names())


def _table(names: list[str]) -> str:
    body = []
    for name in names:
        for seed in sorted(seed for known, seed in folders() if known == name):
            row = _course(name, seed)
            body.append(
                [
                    name,
                    str(seed),
                    f"{row['steps']:,}",
                    f"{row['passes']:,.0f}",
                    bare(row["train"], 3),
                    f"{bare(row['best'], 3)} at {row['best step']:,}",
                    *(bare(row[key], 3) for key in ("last", "tail", "tail last")),
                ]
            )
    header = [
        "run",
        "seed",
        "steps",
        "passes",
        "training",
        "best validation",
        "last validation",
        "tail",
        "tail, nll_last",
    ]
    return markdown(header, body, "lrrrrrrrr")


def few() -> str:
    """The small model on few zeros and on two million, with windows read downwards as well and without."""
    kept = {run.experiment for run in runs() if ", zeros=" in run.experiment and run.evaluation is not None}
    return _table([*sorted(kept, key=lambda name: (len(name), name)), "explicit-small", "explicit-small, mirror=True"])


def claims() -> list[Claim]:
    """What Muon gains, windows read downwards, and what bfloat16 costs on a CPU, seed by seed."""
    found = [*_mirrored(), _bfloat16()]
    for plain, muon in _MUON.items():
        seeds = sorted(seed for name, seed in folders() if name == muon and (plain, seed) in folders())
        if not seeds:
            continue
        pairs = [(_course(muon, seed), _course(plain, seed)) for seed in seeds]
        tail = [a["tail last"] - b["tail last"] for a, b in pairs]
        train = [a["train"] - b["train"] for a, b in pairs]
        found.append(
            Claim(
                f"rh_memory/muon-{plain}",
                f"{muon}: nll_last on the tail less {plain}'s, by seed: {_signed(tail)}; the training loss at the end "
                f"(mean over positions) less {plain}'s: {_signed(train)} nats.",
                "nll_last less that with AdamW, nats",
                tail,
                "measured",
                [path for pair in pairs for row in pair for path in row["paths"]],
                seeds=seeds,
                test="differences by seed",
            )
        )
    return found


def _mirrored() -> list[Claim]:
    """Windows read downwards as well, less those read upwards alone."""
    found = []
    for fields, (label, where) in FEW_ZEROS.items():
        plain = f"explicit-small, {fields}"
        mirror = f"{plain}, mirror=True"
        seeds = sorted(seed for name, seed in folders() if name == mirror and (plain, seed) in folders())
        if len(seeds) < MIN_SEEDS:
            continue
        pairs = {seed: (_course(mirror, seed), _course(plain, seed)) for seed in seeds}
        rows = [{"seed": seed, "value": a["tail last"] - b["tail last"]} for seed, (a, b) in pairs.items()]
        less = seeds_table(rows).summary["value"]
        assert less.low is not None, "there are enough seeds for an interval"
        assert less.high is not None
        shown = interval({"value": less.mean, "low": less.low, "high": less.high}, 2, short=True)
        found.append(
            Claim(
                f"rh_memory/mirror-{label}",
                f"Windows read downwards as well change the small model's score on {where} by {shown} nats (nll_last, "
                f"{len(seeds)} seeds).",
                "nll_last less that of windows read upwards alone, nats",
                [row["value"] for row in rows],
                "measured",
                [path for pair in pairs.values() for row in pair for path in row["paths"]],
                seeds=seeds,
                interval=(less.low, less.high),
                test="Student's t over seeds, 95 %",
            )
        )
    return found


def _bfloat16() -> Claim:
    """The small model trained in bfloat16 on CPU cores, less the same in float32."""
    small, pairs = "explicit-small", {}
    for known, seed in sorted(folders()):
        low = f"{RESULTS}/bfloat16-cpu/{small}-seed{seed}/evaluation.json"
        if known == small and (ROOT / low).is_file():
            pairs[seed] = low, f"{folders()[small, seed]}/evaluation.json"
    shown, rows, bounds = {}, [], (0.0, 0.0)
    for key in ("nll_all", "nll_last"):
        rows = [{"seed": s, "value": read(a)[key]["value"] - read(b)[key]["value"]} for s, (a, b) in pairs.items()]
        less = seeds_table(rows).summary["value"]
        assert less.low is not None, "there are enough seeds for an interval"
        assert less.high is not None
        bounds = less.low, less.high
        shown[key] = interval({"value": less.mean, "low": less.low, "high": less.high}, 3, short=True)
    return Claim(
        "rh_memory/bfloat16-cpu",
        f"Trained and scored in bfloat16 on two cores, the small model ends {shown['nll_all']} nats above itself in "
        f"float32 (nll_all), {shown['nll_last']} in nll_last ({len(pairs)} seeds).",
        "nll_last less that in float32, nats",
        [row["value"] for row in rows],
        "measured",
        [path for pair in pairs.values() for path in pair],
        seeds=list(pairs),
        interval=bounds,
        test="Student's t over seeds, 95 %",
    )


def _signed(values: list[float]) -> str:
    return ", ".join(f"{'+' if x >= 0 else ''}{bare(x, 2)}" for x in values)


TABLES = {"rh_memory.courses": courses, "rh_memory.few": few}
