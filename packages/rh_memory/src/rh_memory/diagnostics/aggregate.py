"""Several seeds of one experiment: mean and spread of every headline figure, and the verdict on E4's own criteria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lab_shared.errors import UserError
from lab_shared.stats import SeedsTable, seeds_table

ABLATION, IDENTITY = 0.02, 0.02
"""E4's thresholds in nats: removing the most important slot, and zeroing the contents, must each cost at least this."""
CONTENT_SHARE = 0.3
"""Doing without identities may cost at most this share of the gain over the i.i.d. marginal."""


_LEGACY = {
    "nll": ("A ablation", "nll"),
    "largest_ablation": ("A ablation", "largest"),
    "gradient_correlation": ("C gradient correlation", "mean_abs_correlation"),
    "error_growth_slope": ("G error growth", "slope"),
    "relative_increase_permuted": ("J permutation", "relative_increase"),
    "gradient_rank_ratio": ("K gradient rank", "ratio"),
}
"""What the seed's own table over seeds held."""


def headlines(result: dict[str, Any]) -> dict[str, float]:
    """One number each from a `diagnose` result of a memory model, those it has; nats unless named otherwise.

    Of a result by the original formulas (`legacy`): what the seed put in its table over seeds.
    """
    if legacy := result.get("legacy"):
        values = {name: legacy[test][figure] for name, (test, figure) in _LEGACY.items()}
        return {name: value for name, value in values.items() if value is not None}
    found: dict[str, float | None] = {"nll_last": result["base"]["value"]}
    if removed := result.get("removed"):
        found["largest_removal_cost"] = max(row["value"] for row in removed)
    if content := result.get("content"):
        found["identity_only_cost"] = content["identity_only"]["value"]
        found["content_only_cost"] = content["content_only"]["value"]
        found["content_only_share_of_gain"] = content["content_only_share_of_gain"]
    if permuted := result.get("permutation"):
        found["whole_identity_cost"] = permuted["whole identity"]["value"]
    if gradient := result.get("gradient"):
        found["gradient_cosine"] = gradient["cosine_within_groups"]["value"]
        found["gradient_rank_share"] = gradient["effective_rank_share"]
    if rollout := result.get("rollout"):
        last = rollout["phase_errors"][-1]
        found["rollout_rms_minus_ar"] = last["model"]["value"] - last["AR"]["value"]
    return {name: value for name, value in found.items() if value is not None}


def check_different(seeds: Sequence[int]) -> None:
    """Raises UserError when a seed occurs twice."""
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds {list(seeds)}: one occurs twice; name runs of one experiment with different seeds")


def over_seeds(results: Sequence[dict[str, Any]]) -> SeedsTable:
    """The headlines all results have, by seed. Raises UserError when a seed occurs twice."""
    rows = [{"seed": float(result["seed"]), **headlines(result)} for result in results]
    check_different([int(row["seed"]) for row in rows])
    shared = set.intersection(*(set(row) for row in rows))
    return seeds_table([{name: row[name] for name in row if name in shared} for row in rows])


def e4_verdict(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """E4's success criteria over seeds: {"criteria": [...], "seeds", "met": bool or None with fewer than 3 seeds}.

    1. removing the most important slot costs >= .02 nats on at least two thirds of the seeds. A removal whose interval
       reaches below 0 does not count;
    2. identity only (contents zeroed) costs >= .02 nats in the mean over seeds: the content carries something;
    3. content only (identities averaged) costs at most 30 % of what the model gains over the i.i.d. marginal, in the
       mean over seeds. The original wanted at most 30 % of the NLL, which has no zero point; this has.
    """
    if not results:
        raise ValueError("no results to judge")
    passed = [
        any(row["value"] >= ABLATION and (row["low"] is None or row["low"] > 0) for row in result["removed"])
        for result in results
    ]
    identity = [result["content"]["identity_only"]["value"] for result in results]
    share = [result["content"]["content_only_share_of_gain"] for result in results]
    known = [x for x in share if x is not None]
    criteria = [
        {
            "criterion": f"removing one slot costs >= {ABLATION} nats on 2 of 3 seeds",
            "measured": f"{sum(passed)} of {len(passed)} seeds",
            "met": 3 * sum(passed) >= 2 * len(passed),
        },
        {
            "criterion": f"zeroed contents cost >= {IDENTITY} nats",
            "measured": f"{sum(identity) / len(identity):+.4f} nats",
            "met": sum(identity) / len(identity) >= IDENTITY,
        },
        {
            "criterion": f"averaged identities cost <= {CONTENT_SHARE:.0%} of the gain over the i.i.d. marginal",
            "measured": f"{sum(known) / len(known):.1%}" if known else "no gain over the marginal",
            "met": bool(known) and len(known) == len(share) and sum(known) / len(known) <= CONTENT_SHARE,
        },
    ]
    met = all(bool(row["met"]) for row in criteria) if len(results) >= 3 else None
    return {"criteria": criteria, "seeds": len(results), "met": met}
