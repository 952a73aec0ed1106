"""Statistics of an ablation study: intervals, paired tests, and verdicts on what the seed found.

Two things are uncertain in a difference between variants: which events were held out, and which seed a training began
with. Each has its own interval here, and a difference counts only where both exclude 0. Holm's correction for the
number of comparisons is in the test over events; what it would leave of the test over seeds is `holm_over_seeds`, which
no verdict needs. Suffixes: S seeds, N events.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lab_shared.errors import UserError
from lab_shared.stats import Summary, bca_interval, holm, paired_sign_flip, seeds_table, student_t_cdf

Record = dict[str, Any]
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
MARGIN_DEG = 1.0
"""Differences the seed calls none are below this: its own four v2 rows span 0.8 degrees."""
RESAMPLES = 2000


class Contrast(NamedTuple):
    """A question a study asks: how much lower is the error of `treated` than that of `control`?"""

    treated: str
    control: str
    question: str


def row(name: str, error_SN: np.ndarray, summaries: Sequence[Record]) -> Record:
    """One line of the table: mean error with its interval over events and its interval over seeds, and what it cost."""
    seeds = over_seeds(error_SN.mean(1))
    rates = [s.get("train_events_per_s") for s in summaries]
    return {
        "name": name,
        **over_events(error_SN.mean(0)),
        "seed_means": error_SN.mean(1).tolist(),
        "seeds_low": seeds.low,
        "seeds_high": seeds.high,
        "median_deg": float(np.median(error_SN)),
        "p90": float(np.percentile(error_SN, 90)),
        "parameters": summaries[0]["parameters"],
        "train_events_per_s": None if None in rates else float(np.mean([r for r in rates if r is not None])),
        "predict_events_per_s": float(np.mean([s["predict_events_per_s"] for s in summaries])),
        **{f"head_rank{x}": float(np.mean([s[f"head_rank{x}"] for s in summaries])) for x in ("", "_untrained")},
        "head_rank_limit": summaries[0]["head_rank_limit"],
    }


def contrasts(asked: Sequence[Contrast], errors: Mapping[str, np.ndarray]) -> list[Record]:
    """Every question of the study: the difference in mean error with both intervals, and Holm's p over all of them.

    p is of the sign-flip test over events of the errors averaged over seeds. "finding" is lower or higher where Holm's
    p is below 0.05 and both intervals lie on that side of 0, otherwise not shown; one seed shows nothing.
    """
    found: list[Record] = [{**c._asdict(), **paired(errors[c.treated], errors[c.control])} for c in asked]
    for record, p in zip(found, holm([record["p"] for record in found]), strict=True):
        record["p_holm"] = p
        low, high = outer(record)
        record["finding"] = "lower" if p < 0.05 and high < 0 else "higher" if p < 0.05 and low > 0 else "not shown"
    return found


def paired(treated_SN: np.ndarray, control_SN: np.ndarray) -> Record:
    """Mean of treated - control in degrees, on the same events and seed by seed.

    Raises UserError for arrays of other seeds or events.
    """
    if treated_SN.shape != control_SN.shape:
        raise UserError(f"errors of shapes {treated_SN.shape} and {control_SN.shape} are not of the same runs")
    treated_N, control_N = (x.mean(0, dtype=np.float64) for x in (treated_SN, control_SN))
    difference_N = treated_N - control_N
    seeds = over_seeds(treated_SN.mean(1, dtype=np.float64) - control_SN.mean(1, dtype=np.float64))
    events = bca_interval(difference_N)
    return {
        "difference": float(difference_N.mean()),
        "events_low": events.low,
        "events_high": events.high,
        "seeds_low": seeds.low,
        "seeds_high": seeds.high,
        "p": paired_sign_flip(treated_N, control_N, resamples=RESAMPLES).p,
    }


def p_over_seeds(differences_S: Sequence[float]) -> float | None:
    """Two-sided p of Student's paired t-test over seeds; None for one seed."""
    found = over_seeds(differences_S)
    if found.sd is None:
        return None
    if found.sd == 0:
        return 0.0 if found.mean else 1.0
    return 2 * (1 - student_t_cdf(abs(found.mean) / found.sd * math.sqrt(found.n), found.n - 1))


def holm_over_seeds(result: Record) -> list[float | None]:
    """Holm's p of the t-tests over seeds, of each comparison of a study's record; None for each where it has one seed.

    From the mean errors by seed in the rows of the record.
    """
    means = {r["name"]: r["seed_means"] for r in result["rows"]}
    found = [
        p_over_seeds([a - b for a, b in zip(means[c["treated"]], means[c["control"]], strict=True)])
        for c in result["contrasts"]
    ]
    known = [p for p in found if p is not None]
    return [*holm(known)] if len(known) == len(found) else [None] * len(found)


def outer(contrast: Record) -> tuple[float, float]:
    """The wider of the two intervals on each side; without bounds for one seed."""
    if contrast["seeds_low"] is None:
        return -np.inf, np.inf
    return (
        min(contrast["events_low"], contrast["seeds_low"]),
        max(contrast["events_high"], contrast["seeds_high"]),
    )


def verdicts(result: Record) -> list[Record]:
    """{"claim", "status", "measured"} of the seed's five key findings, from the contrasts of its table alone.

    "Better" holds where both intervals exclude 0 on its side and fails where they lie on the other or within
    `MARGIN_DEG` of 0. "The same" holds where both lie within that margin and fails where they lie outside.
    """
    by_pair = {(c["treated"], c["control"]): c for c in result["contrasts"]}

    def better(claim: str, treated: str, control: str, note: str = "") -> Record:
        c = by_pair.get((treated, control))
        if c is None:
            return {"claim": claim, "status": UNDECIDED, "measured": f"{treated} and {control} were not both run"}
        low, high = outer(c)
        within = low > -MARGIN_DEG and high < MARGIN_DEG
        status = HOLDS if high < 0 else FAILS if low > 0 or within else UNDECIDED
        return {"claim": claim, "status": status, "measured": _said(c, result) + note}

    def same(claim: str, *pairs: tuple[str, str]) -> Record:
        found = [c for pair in pairs if (c := by_pair.get(pair)) is not None]
        if len(found) < len(pairs):
            return {"claim": claim, "status": UNDECIDED, "measured": "not all of its rows were run"}
        bounds = [outer(c) for c in found]
        if all(low > -MARGIN_DEG and high < MARGIN_DEG for low, high in bounds):
            status = HOLDS
        elif any(low > MARGIN_DEG or high < -MARGIN_DEG for low, high in bounds):
            status = FAILS
        else:
            status = UNDECIDED
        return {"claim": claim, "status": status, "measured": "; ".join(_said(c, result) for c in found)}

    rows = {r["name"]: r for r in result["rows"]}
    rank = ""
    if "5M" in rows:
        r = rows["5M"]
        rank = (
            f"; effective rank of the head {r['head_rank']:.0f} of {r['head_rank_limit']}, untrained "
            f"{r['head_rank_untrained']:.0f}: rank alone does not tell use from initialisation"
        )
    return [
        better("1. v2 is better than v1 (the seed: by 5 degrees)", "v2-linear-K16", "v1"),
        same(
            "2. The input mode does not matter: none, linear and MLP are the same",
            ("v2-mlp-K16", "v2-linear-K16"),
            ("v2-none-K41", "v2-linear-K41"),
        ),
        same("3. 41 slots are the same as 16", ("v2-linear-K41", "v2-linear-K16")),
        better("4. More data helps (the seed: 1.2 degrees from 13 times the events)", "5M", "5M-less-data"),
        better("5. At scale the head of 1024 is used: it is better than 128", "5M", "5M-head-128", rank),
    ]


def over_events(error_N: np.ndarray) -> Record:
    """Mean of the errors (degrees) and its BCa interval."""
    events = bca_interval(error_N)
    return {"mean_deg": float(error_N.mean()), "events_low": events.low, "events_high": events.high}


def over_seeds(values_S: Sequence[float] | np.ndarray) -> Summary:
    """Mean over seeds and its Student's t interval of 95%, without bounds for one seed."""
    return seeds_table([{"seed": i, "value": float(v)} for i, v in enumerate(values_S)]).summary["value"]


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    """`[1.23, 4.56]`, or a dash where there is none."""
    return "–" if low is None or high is None else f"[{low:.{digits}f}, {high:.{digits}f}]"


def _said(c: Record, result: Record) -> str:
    return (
        f"{c['treated']} minus {c['control']} {c['difference']:+.2f} degrees, events "
        f"{interval(c['events_low'], c['events_high'])}, seeds {interval(c['seeds_low'], c['seeds_high'])} "
        f"on {result['label']}"
    )
