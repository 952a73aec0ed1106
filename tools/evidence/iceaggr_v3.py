"""What the parts of iceaggr's v3 add to v2: which of them the rule keeps, and how much of the way to the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence import iceaggr_oracle
from evidence.iceaggr_ablations import (
    SEEDS_HOLM,
    corrected,
    p_text,
    path_of,
    range_text,
    seed_means,
    studies,
    study_claim,
)
from evidence.record import Claim, markdown, read, verdict

V3 = "ablate-v3"
BEST_PART = "aggregates"
"""The part that is set beside all of them."""


def parts() -> str:
    """Which parts of v3 the rule keeps: those that win their paired comparison with v2."""
    p_of = corrected(V3)
    body = [
        [
            name,
            f"{row['difference']:+.2f}",
            range_text(row, "seeds"),
            f"{row['p_holm']:.4f}",
            p_text(p_of[row["treated"], row["control"]]),
            "kept" if won else "not kept",
        ]
        for name, row, won in _judged()
    ]
    header = ["part", f"difference, degrees ({read(path_of(V3))['label']})", "over seeds", "Holm", SEEDS_HOLM]
    return markdown([*header, "by the rule"], body, "lrrrrl")


def claims() -> list[Claim]:
    """Which parts win, how far all of them go, and what the others add to the best one."""
    return [_kept(), _gap(), _all_and_best()] if V3 in studies() else []


def _judged() -> list[tuple[str, Mapping[str, Any], bool]]:
    """(part of v3, its comparison with v2, whether it won); Muon's is that of AdamW turned round."""
    from iceaggr.config import V3_PARTS

    found: list[tuple[str, Mapping[str, Any], bool]] = []
    for row in read(path_of(V3))["contrasts"]:
        if row["treated"] == "adamw":
            turned = {
                **row,
                "difference": -row["difference"],
                "seeds_low": -row["seeds_high"],
                "seeds_high": -row["seeds_low"],
            }
            found.append(("Muon instead of AdamW", turned, row["finding"] == "higher"))
        elif row["treated"] in V3_PARTS:
            found.append((row["treated"], row, row["finding"] == "lower"))
    return found


def _kept() -> Claim:
    judged = _judged()
    kept, lost = ([name for name, _, won in judged if won is which] for which in (True, False))
    return study_claim(
        V3,
        "kept",
        f"Of the parts of v3 {', '.join(kept)} win their paired comparison with v2 at this budget; "
        f"{', '.join(lost)} do not ({read(path_of(V3))['label']}).",
        "parts that win",
        [len(kept)],
        "measured",
        test="Holm's p over events below 0.05 and both intervals below 0, that over seeds uncorrected",
    )


def _gap() -> Claim:
    """Share of the distance from v2 to the oracle that v3 closes: what won, or all parts in a record without that."""
    from iceaggr.ablation_stats import over_seeds

    record = read(path_of(V3))
    budget = record["budget"]
    won = any(row["name"] == "kept" for row in record["rows"])
    variant, said = ("kept", "the parts of v3 that won") if won else ("all", "all parts of v3")
    oracle = read(iceaggr_oracle.ORACLE)["all"]["mean_deg"]["value"]
    base, reached = seed_means(V3, "base"), seed_means(V3, variant)
    closed = over_seeds([(b - a) / (b - oracle) for b, a in zip(base, reached, strict=True)])
    return study_claim(
        V3,
        "gap",
        f"After {budget['events']:,} events, each once, {said} together close {closed.mean:.1%} of the gap "
        f"between v2 and the oracle ({closed.low:.1%} to {closed.high:.1%} over seeds; {record['label']}; at equal "
        "events, not times).",
        "share of the gap between v2 and the oracle",
        [closed.mean],
        verdict(closed.mean, 0.5),
        raw=[path_of(V3), iceaggr_oracle.ORACLE],
        interval=(closed.low, closed.high),
        test="Student's t over seeds, with the oracle's mean taken as exact",
        required="v3 closes at least half of the gap between v2 and the oracle at equal training time",
    )


def _all_and_best() -> Claim:
    """All parts against the best single one, which nobody had asked before."""
    from iceaggr.ablation_stats import over_seeds

    best, everything = seed_means(V3, BEST_PART), seed_means(V3, "all")
    found = over_seeds([a - b for a, b in zip(everything, best, strict=True)])
    return study_claim(
        V3,
        "all-less-best",
        f"All parts together differ from {BEST_PART} alone by {found.mean:+.2f} degrees ({found.low:+.2f} to "
        f"{found.high:+.2f} over seeds; {read(path_of(V3))['label']}; a comparison chosen afterwards).",
        "paired difference of mean opening angles, degrees",
        [found.mean],
        "measured",
        interval=(found.low, found.high),
        test="Student's t over seeds; exploratory",
    )


TABLES = {"iceaggr.ablate-v3-parts": parts} if V3 in studies() else {}
