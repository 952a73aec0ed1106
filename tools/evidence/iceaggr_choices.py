"""Decisions of the seed that iceaggr takes differently, or takes over: whether its defaults are better at equal events.

A comparison's side of the package is the one whose model has the default of every field in which the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from evidence.iceaggr_ablations import (
    RESULTS,
    SEED_TABLE,
    SEEDS_HOLM,
    p_text,
    path_of,
    seed_means,
    studies,
    study_claim,
)
from evidence.record import Claim, markdown, read

CHOICES = "ablate-choices"
CURVES = f"{RESULTS}/{CHOICES}/curves.json"
TRAINED_BEFORE = {"base": "v2-linear-K16", "raw-rms": "v2-none-K41"}
"""Variants that are rows of the seed's table, under its names for them."""
WORDS = {"lower": "better", "higher": "worse", "not shown": "not shown"}
TURNED = {"lower": "higher", "higher": "lower", "not shown": "not shown"}


def verdicts() -> str:
    """Each default of the package against what it could be, the difference turned to default less other."""
    record = read(path_of(CHOICES))
    body = [
        [
            row["default"],
            f"{row['other']}: `{row['flags']}`",
            f"{row['difference']:+.2f}",
            f"{row['seeds'][0]:.2f} to {row['seeds'][1]:.2f}",
            " / ".join(f"{x:+.2f}" for x in row["by_seed"]),
            f"{row['p_holm']:.4f}",
            p_text(row["p_seeds"]),
            f"**{row['verdict']}**",
        ]
        for row in judged(record)
    ]
    header = ["default", "instead", f"default less other, degrees ({record['label']})", "over seeds", "by seed", "Holm"]
    return markdown([*header, SEEDS_HOLM, "the default is"], body, "llrrrrrl")


def claims() -> list[Claim]:
    """What the defaults win and lose, and how far the study can be trusted."""
    return [_verdicts(), _again(), _zeros_against_both(), _steps(), _falling()] if CHOICES in studies() else []


def judged(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The comparisons of the study from the package's side: {"default", "other", "flags", "difference", "seeds",
    "by_seed", "p_holm", "p_seeds", "verdict"}; flags turn the default into the other, p_seeds is Holm's over seeds."""
    from iceaggr.ablation_stats import holm_over_seeds

    means = {row["name"]: row["seed_means"] for row in record["rows"]}
    found = []
    for row, p_seeds in zip(record["contrasts"], holm_over_seeds(dict(record)), strict=True):
        default, other, flags = sides(row["treated"], row["control"])
        turned = default == row["control"]
        difference, low, high = row["difference"], row["seeds_low"], row["seeds_high"]
        finding = TURNED[row["finding"]] if turned else row["finding"]
        found.append({
            "default": default,
            "other": other,
            "flags": flags,
            "difference": -difference if turned else difference,
            "seeds": (-high, -low) if turned else (low, high),
            "by_seed": [a - b for a, b in zip(means[default], means[other], strict=True)],
            "p_holm": row["p_holm"],
            "p_seeds": p_seeds,
            "verdict": WORDS[finding],
        })  # fmt: skip
    return found


def sides(one: str, two: str) -> tuple[str, str, str]:
    """(variant with the package's defaults, the other, the flags of the other) of two variants of the study."""
    from iceaggr.ablations import study
    from iceaggr.config import ModelConfig

    models = {name: asdict(study("choices").variants[name].config.model) for name in (one, two)}
    usual = asdict(ModelConfig())
    differ = [field for field in usual if models[one][field] != models[two][field]]
    default = next(name for name in (one, two) if all(models[name][field] == usual[field] for field in differ))
    other = two if default == one else one
    flags = " ".join(f"--model.{field.replace('_', '-')} {models[other][field]}" for field in differ)
    return default, other, flags


def _verdicts() -> Claim:
    record = read(path_of(CHOICES))
    rows = judged(record)
    count = {word: sum(row["verdict"] == word for row in rows) for word in WORDS.values()}
    against = "".join(
        f"; {row['other']} ends {row['difference']:.2f} degrees lower, {row['seeds'][0]:.2f} to {row['seeds'][1]:.2f} "
        "over seeds"
        for row in rows
        if row["verdict"] == "worse"
    )
    return study_claim(
        CHOICES,
        "verdicts",
        f"Of {len(rows)} comparisons the package's default is better in {count['better']}, worse in {count['worse']} "
        f"and not shown to differ in {count['not shown']} at this budget ({record['label']}{against}).",
        "comparisons in which the default is better, worse, not shown to differ",
        list(count.values()),
        "measured",
        test="Holm's p over events below 0.05 and both intervals on one side of 0, that over seeds uncorrected",
    )


def _again() -> Claim:
    """How far the same model, seed and budget end apart in two studies."""
    said, values = [], []
    for name, before in TRAINED_BEFORE.items():
        moved = [a - b for a, b in zip(seed_means(CHOICES, name), seed_means(SEED_TABLE, before), strict=True)]
        said.append(f"{name} less {before} {' / '.join(f'{x:+.2f}' for x in moved)}")
        values += moved
    return study_claim(
        CHOICES,
        "again",
        "Two of its models had been trained with the same seeds and budget for the original's table: "
        f"{', '.join(said)} degrees by seed ({read(path_of(CHOICES))['label']}).",
        "difference of mean opening angles of the same training, degrees",
        values,
        "measured",
        raw=[path_of(CHOICES), path_of(SEED_TABLE)],
    )


def _zeros_against_both() -> Claim:
    """Zeros against the original's table's trainings of the same control."""
    from iceaggr.ablation_stats import over_seeds

    before, label = TRAINED_BEFORE["base"], read(path_of(CHOICES))["label"]
    pairs = zip(seed_means(CHOICES, "zero-padding"), seed_means(SEED_TABLE, before), strict=True)
    found = over_seeds([a - b for a, b in pairs])
    return study_claim(
        CHOICES,
        "zeros",
        f"Against {before}, the same control in the original's table, zero-padding differs by {found.mean:+.2f} "
        f"degrees ({found.low:+.2f} to {found.high:+.2f} over seeds; {label}; a comparison chosen afterwards).",
        "paired difference of mean opening angles, degrees",
        [found.mean],
        "measured",
        raw=[path_of(CHOICES), path_of(SEED_TABLE)],
        interval=(found.low, found.high),
        test="Student's t over seeds; exploratory",
    )


def _steps() -> Claim:
    """A batch holds so many tokens: fewer DOMs of an event are fewer steps."""
    record = read(path_of(CHOICES))
    of = {name: sorted(run["step"][-1] for run in _runs(name)) for name in ("cap-128-hlc", "base")}
    capped, whole = of.values()
    return study_claim(
        CHOICES,
        "steps",
        f"With at most 128 DOMs the same {record['budget']['events']:,} events are {capped[0]:,} to {capped[-1]:,} "
        f"steps, with all {whole[0]:,} to {whole[-1]:,} ({record['label']}).",
        "optimiser steps",
        [*capped, *whole],
        "measured",
        raw=[path_of(CHOICES), CURVES],
    )


def _falling() -> Claim:
    """Whether the trainings had ended: the training angle of the last tenth of the events less that of the tenth
    before."""
    falls = [_mean_angle(run, 0.8, 0.9) - _mean_angle(run, 0.9, 1.0) for run in read(CURVES)]
    return study_claim(
        CHOICES,
        "falling",
        f"Over the last tenth of its events the training angle of each of the {len(falls)} trainings was "
        f"{min(falls):.2f} to {max(falls):.2f} degrees below that of the tenth before "
        f"({read(path_of(CHOICES))['label']}).",
        "fall of the training angle, degrees",
        falls,
        "measured",
        raw=[CURVES],
    )


def _mean_angle(run: Mapping[str, Any], begin: float, end: float) -> float:
    """Training angle of a run over these shares of its steps, of the entries logged within."""
    total = angle = 0.0
    for since, step, value in zip([0, *run["step"]], run["step"], run["angle_deg"], strict=False):
        if begin < step / run["step"][-1] <= end:
            total, angle = total + step - since, angle + (step - since) * value
    return angle / total


def _runs(variant: str) -> list[Mapping[str, Any]]:
    return [run for run in read(CURVES) if run["variant"] == variant]


TABLES = {"iceaggr.ablate-choices-verdicts": verdicts} if CHOICES in studies() else {}
