"""What the parts of iceaggr's v3 add to v2: which of them the rule keeps, and how much of the way to the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evidence import iceaggr_oracle
from evidence.iceaggr_ablations import path_of, range_text, studies, study_claim
from evidence.record import Claim, markdown, read, verdict

if TYPE_CHECKING:
    from lab_shared.stats import Summary

V3 = "ablate-v3"
BEST_PART = "aggregates"
"""The part that is set beside all of them."""


def parts() -> str:
    """Which parts of v3 the rule keeps: those that win their paired comparison with v2."""
    body = [
        [
            name,
            f"{row['difference']:+.2f}",
            range_text(row, "seeds"),
            f"{row['p_holm']:.4f}",
            "kept" if won else "not kept",
        ]
        for name, row, won in _judged()
    ]
    label = read(path_of(V3))["label"]
    return markdown(["part", f"difference, degrees ({label})", "over seeds", "Holm", "by the rule"], body, "lrrrl")


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
                "difference": -row["difference"],
                "seeds_low": -row["seeds_high"],
                "seeds_high": -row["seeds_low"],
                "p_holm": row["p_holm"],
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
        test="Holm's p below 0.05 and both intervals below 0",
    )


def _gap() -> Claim:
    """Share of the distance from v2 to the oracle that v3 closes: what won, or all parts in a record without that."""
    record = read(path_of(V3))
    budget = record["budget"]
    won = any(row["name"] == "kept" for row in record["rows"])
    variant, said = ("kept", "the parts of v3 that won") if won else ("all", "all parts of v3")
    oracle = read(iceaggr_oracle.ORACLE)["all"]["mean_deg"]["value"]
    base, reached = _seed_means("base"), _seed_means(variant)
    closed = _over_seeds([(b - a) / (b - oracle) for b, a in zip(base, reached, strict=True)])
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
    best, everything = _seed_means(BEST_PART), _seed_means("all")
    found = _over_seeds([a - b for a, b in zip(everything, best, strict=True)])
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


def _seed_means(variant: str) -> list[float]:
    return next(row["seed_means"] for row in read(path_of(V3))["rows"] if row["name"] == variant)


def _over_seeds(values: list[float]) -> Summary:
    from lab_shared.stats import seeds_table

    return seeds_table([{"seed": i, "x": value} for i, value in enumerate(values)]).summary["x"]


TABLES = {"iceaggr.ablate-v3-parts": parts} if V3 in studies() else {}
