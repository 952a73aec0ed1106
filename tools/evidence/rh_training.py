"""Zeta zeros: how the flagship trains and what it holds of that on the tail, and Muon beside AdamW."""

from __future__ import annotations

from typing import Any

from lab_shared.stats import seeds_table

from evidence.record import ROOT, Claim, bare, interval, markdown, read
from evidence.rh_runs import RESULTS, folders, runs, validations

FLAGSHIP = "explicit"
LAST_STEPS = 100
"""Over so many steps at the end of a run the logged training losses are averaged."""
MIN_SEEDS, TRAINED_ON = 3, 0.9
_MUON = {"e0-rope": "e0-rope, optimizer=muon", FLAGSHIP: "explicit, optimizer=muon, ema=0.999"}
FEW_ZEROS = {
    "zeros=40000": ("few", "the tail of the first 40,000 zeros"),
    "zeros=40000, split=interleaved": ("few-interleaved", "a held-out block inside the first 40,000 zeros"),
    "values=plain, zeros=40000": ("few-plain", "the tail of the first 40,000 zeros, with plain values,"),
    "zeros=200000": ("200000", "the tail of the first 200,000 zeros"),
}
"""Small models on so few zeros that they see each of them many times, as the flagship does two million."""


def _course(name: str, seed: int) -> dict[str, Any]:
    """Training loss at the end, best and last validation, score on the tail, of one run."""
    folder = folders()[name, seed]
    looks = validations(folder)
    logged = (row for row in read(f"{folder}/metrics.jsonl") if row["split"] == "train")
    losses = [row["nll"] for row in logged if row["step"] > max(looks) - LAST_STEPS]
    best = min(looks, key=lambda step: looks[step]["nll"])
    scores, config = read(f"{folder}/evaluation.json"), read(f"{folder}/config.json")
    train = sum(losses) / len(losses)
    spacings = config["steps"] * config["batch_size"] * config["model"]["context"]
    return {
        "steps": max(looks),
        "passes": spacings / (TRAINED_ON * config["data"]["zeros"]),
        "train": train,
        "best step": best,
        "best": looks[best]["nll"],
        "last": looks[max(looks)]["nll"],
        "gap": looks[max(looks)]["nll"] - train,
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
                    *(bare(row[key], 3) for key in ("last", "gap", "tail", "tail last")),
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
        "less training",
        "tail",
        "tail, nll_last",
    ]
    return markdown(header, body, "lrrrrrrrrr")


def few() -> str:
    """The small model on few zeros and on two million, with windows read downwards as well and without."""
    kept = {run.experiment for run in runs() if ", zeros=" in run.experiment and run.evaluation is not None}
    return _table([*sorted(kept, key=lambda name: (len(name), name)), "explicit-small", "explicit-small, mirror=True"])


def claims() -> list[Claim]:
    """What Muon gains, windows read downwards, and what bfloat16 costs on a CPU, seed by seed."""
    found = [*_mirrored(), _bfloat16(), _gaps(), _explicit_slots()]
    for plain, muon in _MUON.items():
        seeds = sorted(seed for name, seed in folders() if name == muon and (plain, seed) in folders())
        if not seeds:
            continue
        pairs = [(_course(muon, seed), _course(plain, seed)) for seed in seeds]
        tail = [a["tail last"] - b["tail last"] for a, b in pairs]
        train = [a["train"] - b["train"] for a, b in pairs]
        mean, less = over_seeds(seeds, tail) if len(seeds) >= MIN_SEEDS else ("", None)
        found.append(
            Claim(
                f"rh_memory/muon-{plain}",
                f"{muon}: nll_last on the tail less {plain}'s, by seed: {_signed(tail)}{mean and f' ({mean})'}; the "
                f"training loss at the end (mean over positions) less {plain}'s: {_signed(train)} nats.",
                "nll_last less that with AdamW, nats",
                tail,
                "measured",
                [path for pair in pairs for row in pair for path in row["paths"]],
                seeds=seeds,
                interval=less,
                test="differences by seed; Student's t over three or more, 95 %",
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
        pairs = [(_course(mirror, seed), _course(plain, seed)) for seed in seeds]
        for kind, key, text, metric in (
            ("mirror", "tail last", f"score on {where}", "nll_last"),
            (
                "mirror-training",
                "train",
                f"training loss (scored on {where.strip(',')})",
                "mean over positions at the end",
            ),
        ):
            values = [a[key] - b[key] for a, b in pairs]
            shown, less = over_seeds(seeds, values)
            found.append(
                Claim(
                    f"rh_memory/{kind}-{label}",
                    f"Windows read downwards as well change the small model's {text} by {shown} nats ({metric}, "
                    f"{len(seeds)} seeds).",
                    f"{metric}, less that of windows read upwards alone, nats",
                    values,
                    "measured",
                    [path for pair in pairs for row in pair for path in row["paths"]],
                    seeds=seeds,
                    interval=less,
                    test="Student's t over seeds, 95 %",
                )
            )
    return found


def over_seeds(seeds: list[int], values: list[float], digits: int = 2) -> tuple[str, tuple[float, float]]:
    """The mean with its interval, as text, and the interval, of three values or more."""
    rows = [{"seed": seed, "value": value} for seed, value in zip(seeds, values, strict=True)]
    less = seeds_table(rows).summary["value"]
    assert less.low is not None, "there are enough seeds for an interval"
    assert less.high is not None
    shown = interval({"value": less.mean, "low": less.low, "high": less.high}, digits, short=True)
    return shown, (less.low, less.high)


def _gaps() -> Claim:
    """How far validation ends above training: where zeros are few, and where they are too many to be known by heart."""
    names = {
        "explicit-small, values=plain, zeros=40000": "with plain values on the first 40,000 zeros",
        "explicit-small, values=plain, zeros=40000, mirror=True": "the same with windows read downwards as well",
        "explicit-small, values=plain": "with plain values on two million, read five times",
        "explicit-small": "with turned values on two million",
    }
    said, values, paths = [], [], []
    for name, where in names.items():
        found = [_course(name, seed) for known, seed in sorted(folders()) if known == name]
        gaps = [row["gap"] for row in found]
        said.append(f"{where} {bare(min(gaps), 2)} to {bare(max(gaps), 2)}")
        values += gaps
        paths += [path for row in found for path in row["paths"]]
    return Claim(
        "rh_memory/validation-above-training",
        f"The last validation of the small model less its training loss at the end: {'; '.join(said)} nats.",
        "nll_all at the last validation less the training loss, nats",
        values,
        "measured",
        paths,
        test="range over seeds",
    )


def _explicit_slots() -> Claim:
    """Postfix memory with explicit-formula attention, less the flagship without memory."""
    slots = "e3-explicit"
    seeds = sorted(seed for name, seed in folders() if name == slots and (FLAGSHIP, seed) in folders())
    paths = {name: [f"{folders()[name, seed]}/evaluation.json" for seed in seeds] for name in (slots, FLAGSHIP)}
    values = [read(a)["nll_last"]["value"] - read(b)["nll_last"]["value"] for a, b in zip(*paths.values(), strict=True)]
    shown, less = over_seeds(seeds, values)
    return Claim(
        f"rh_memory/{slots}-less-{FLAGSHIP}",
        f"On the tail nll_last of {slots} less that of {FLAGSHIP} is {shown} nats ({len(seeds)} seeds).",
        "difference of nll_last on the tail, nats",
        values,
        "measured",
        [*paths[slots], *paths[FLAGSHIP]],
        seeds=seeds,
        interval=less,
        test="Student's t over seeds, 95 %",
    )


def _bfloat16() -> Claim:
    """The small model trained in bfloat16 on CPU cores, less the same in float32."""
    small, pairs = "explicit-small", {}
    for known, seed in sorted(folders()):
        low = f"{RESULTS}/bfloat16-cpu/{small}-seed{seed}/evaluation.json"
        if known == small and (ROOT / low).is_file():
            pairs[seed] = low, f"{folders()[small, seed]}/evaluation.json"
    differences = {
        key: [read(a)[key]["value"] - read(b)[key]["value"] for a, b in pairs.values()]
        for key in ("nll_all", "nll_last")
    }
    shown = {key: over_seeds(list(pairs), values, 3) for key, values in differences.items()}
    low, high = (" and ".join(sorted({_torch(paths[i]) for paths in pairs.values()})) for i in (0, 1))
    return Claim(
        "rh_memory/bfloat16-cpu",
        f"Trained and scored in bfloat16 on two cores, the small model ends {shown['nll_all'][0]} nats above itself in "
        f"float32 (nll_all), {shown['nll_last'][0]} in nll_last ({len(pairs)} seeds; torch {low} against torch {high}, "
        "and another commit).",
        "nll_last less that in float32, nats",
        differences["nll_last"],
        "measured",
        [path for pair in pairs.values() for path in pair],
        seeds=list(pairs),
        interval=shown["nll_last"][1],
        test="Student's t over seeds, 95 %",
    )


def _torch(evaluation: str) -> str:
    """The release of torch that a run was made with: 2.15."""
    return ".".join(read(f"{evaluation.rpartition('/')[0]}/manifest.json")["versions"]["torch"].split(".")[:2])


def _signed(values: list[float]) -> str:
    return ", ".join(f"{'+' if x >= 0 else ''}{bare(x, 2)}" for x in values)


TABLES = {"rh_memory.courses": courses, "rh_memory.few": few}
