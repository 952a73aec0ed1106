"""What the runs of a grid say about each claim: holds, fails, or undecided, computed from the records and nothing else.

A run is {"grid", "cell", "seed", "settings", "summary"} as `grid.train_cell` leaves it. Intervals are Student's t over
seeds; a claim is decided only where such an interval excludes the alternative, so that one seed decides nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from lab_shared.stats import Summary

from gauge_attn.comparisons import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Run,
    by_cell,
    of_l,
    paired,
    said,
    sign,
    summary,
    where,
)

Verdict = dict[str, Any]
SHARP = 0.10
_BOOTSTRAPS = 2000
_FREE = ",learnable,none"
"""The cells of the matrix whose layouts are compared."""


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """One record {"claim", "measured", "status"} per claim that any of the runs bears on."""
    checks: list[Callable[[Sequence[Run]], Verdict | None]] = [
        low_spin_cannot,
        order_is_capacity,
        lower_kappa_no_variation,
        tiny_kappa_unstable,
        closed_form,
        shared_kappa_makes_the_order,
        l_matters_once_standardised,
        alignment_is_harmless,
        taylor_changes_high_l,
        gauge_fixed_is_zero,
        diagonal_matters,
        frames_matter,
        curvature_matters,
        more_tensors_help,
        pure_tensors_help,
        low_spin_is_useless,
        threshold_is_reachable,
    ]
    return [verdict for check in checks if (verdict := check(runs)) is not None]


def low_spin_cannot(runs: Sequence[Run]) -> Verdict | None:
    """The seed's headline: heads of l = 0, 1 cannot be sharp, whatever the training or hyper-parameters.

    Runs can refute that; that it holds is said of their own cells only.
    """
    best: tuple[float, str, Summary, Run] | None = None
    for (_, cell), members in by_cell(runs).items():
        for l in (0, 1):
            values = [v for run in members if (v := of_l(run, l)) is not None]
            if values:
                s = summary(values)
                key = s.mean if s.low is None else s.low
                if best is None or key > best[0]:
                    best = (key, f"ℓ{l} in {cell}", s, members[0])
    if best is None:
        return None
    _, place, s, run = best
    if s.low is None:
        status = UNDECIDED
    else:
        status = FAILS if s.low > SHARP else HOLDS if s.high is not None and s.high < SHARP else UNDECIDED
    return {
        "claim": "Heads of l = 0, 1 cannot be sharp (row_std > 0.10), in whichever cell of this grid",
        "measured": f"sharpest low-spin heads: {place}, row_std {said(s)}{where(run)}",
        "status": status,
    }


def order_is_capacity(runs: Sequence[Run]) -> Verdict | None:
    """row_std rises with l in the seed's third row. Do random beliefs with its mu_dist and kappa do the same?"""
    members = [r for r in runs if r["cell"].startswith("seed-c") and r["summary"]["noise"]]
    if not members:
        return None
    ls = sorted({h["l"] for h in members[0]["summary"]["heads"]})
    measured = {l: summary([of_l(r, l) or 0.0 for r in members]) for l in ls}
    noise = {l: summary([r["summary"]["noise"][str(l)] for r in members]) for l in ls}
    rises = all(noise[a].mean < noise[b].mean for a, b in itertools.pairwise(ls))
    ratio = summary([of_l(r, ls[-1]) / r["summary"]["noise"][str(ls[-1])] for r in members])
    if ratio.low is None or ratio.high is None:
        status = UNDECIDED
    elif rises and ratio.low < 1.5:
        status = FAILS
    else:
        status = HOLDS if ratio.low >= 1.5 else UNDECIDED
    text = "; ".join(f"ℓ{l} {said(measured[l])} against noise {noise[l].mean:.4f}" for l in ls)
    return {
        "claim": "row_std grows with l because low-spin heads lack representational capacity",
        "measured": f"row_std at kappa 0.0086, alignment summed: {text}{where(members[0])}",
        "status": status,
    }


def lower_kappa_no_variation(runs: Sequence[Run]) -> Verdict | None:
    """KL_std at kappa 0.00043 and 0.43, alignment summed."""
    change = paired(runs, "seed-b", "seed-a", lambda r: r["summary"]["diversity"]["kl_std"])
    if change is None:
        return None
    return {
        "claim": "Lowering kappa does not increase the variation of KL (alignment summed)",
        "measured": f"KL_std at 0.00043 minus at 0.43: {said(change, 5)}{where(runs[0])}",
        "status": sign(change, claim=-1),
    }


def tiny_kappa_unstable(runs: Sequence[Run]) -> Verdict | None:
    """Largest gradient norms at the two ends of kappa."""
    change = paired(runs, "seed-b", "seed-a", lambda r: math.log10(r["summary"]["grad_norm_max"]))
    if change is None:
        return None
    status = UNDECIDED
    if change.low is not None and change.high is not None:
        status = HOLDS if change.low > 1 else FAILS if change.high < 1 else UNDECIDED
    return {
        "claim": "kappa = 0.00043 makes gradients explode (tenfold at least)",
        "measured": f"log10 of the largest gradient norm, at 0.00043 minus at 0.43: {said(change, 2)}{where(runs[0])}",
        "status": status,
    }


def closed_form(runs: Sequence[Run]) -> Verdict | None:
    """H1: at initialisation row_std follows from d, s and kappa alone, within 10%."""
    errors = [h["row_std"] / h["predicted"] - 1 for r in runs for h in r["summary"]["initial"]]
    if not errors:
        return None
    off = [abs(e) for e in errors]
    middle, worst = float(np.median(off)), float(np.max(off))
    return {
        "claim": "H1: before training, row_std is the closed form in d, s and kappa, within 10%",
        "measured": f"deviation: median {100 * middle:.1f}%, largest {100 * worst:.1f}%, "
        f"{len(off)} means over the heads of an l{where(runs[0])}",
        "status": HOLDS if worst <= 0.10 else FAILS if middle > 0.10 else UNDECIDED,
    }


def shared_kappa_makes_the_order(runs: Sequence[Run]) -> Verdict | None:
    """row_std of l = 2 minus that of l = 0 in the seed's trained layout, at one kappa for all and at kappa d."""

    def rise(run: Run) -> float:
        return (of_l(run, 2) or 0.0) - (of_l(run, 0) or 0.0)

    found = by_cell(runs)
    shared, dim = (
        [rise(r) for (_, cell), members in found.items() if cell == f"19,{mode},none" for r in members]
        for mode in ("shared", "dim")
    )
    fall = paired(runs, "19,dim,none", "19,shared,none", rise)
    if fall is None:
        return None
    left = summary(dim)
    if left.low is None or fall.high is None:
        status = UNDECIDED
    else:
        status = HOLDS if left.low > 0 else FAILS if fall.high < 0 else UNDECIDED
    return {
        "claim": "Trained row_std grows with l at whatever temperature, so l itself is the cause",
        "measured": f"row_std of ℓ2 minus ℓ0: one kappa for all {said(summary(shared))}, kappa times d "
        f"{said(left)}; the change {said(fall)}{where(runs[0])}",
        "status": status,
    }


def low_spin_is_useless(runs: Sequence[Run]) -> Verdict | None:
    """What making one head uniform costs, mean over the heads of each l, in the seed's layout without alignment."""
    members = [r for (_, cell), rs in by_cell(runs).items() if cell == "19,shared,none" for r in rs]
    costs = {
        l: summary([v for r in members if (v := of_l(r, l, "uniform")) is not None])
        for l in (0, 1, 2)
        if any(of_l(r, l, "uniform") is not None for r in members)
    }
    if not costs:
        return None
    low = [s.low for l, s in costs.items() if l <= 1]
    high = [s.high for l, s in costs.items() if l <= 1]
    if any(x is None for x in (*low, *high)):
        status = UNDECIDED
    else:
        worth, nothing = any(x > 0 for x in low if x is not None), all(x <= 0 for x in high if x is not None)
        status = FAILS if worth else HOLDS if nothing else UNDECIDED
    return {
        "claim": "The attention of l = 0, 1 heads is worth nothing: making it uniform does not raise the loss",
        "measured": "; ".join(f"ℓ{l} {said(s)}" for l, s in costs.items()) + f" nats a head{where(members[0])}",
        "status": status,
    }


def l_regression(runs: Sequence[Run]) -> dict[str, float] | None:
    """H/log n ~ a + b log(logit std) + c l over all heads of the runs; c with a 95% interval over resampled runs.

    Runs, not heads, are resampled (heads of a run share its training). None with fewer than two values of l.
    """
    rows = [
        [
            (1.0, math.log(max(h["logit_std"], 1e-12)), float(h["l"]), h["entropy_ratio"])
            for h in r["summary"]["heads"]
            if "logit_std" in h
        ]
        for r in runs
    ]
    rows = [r for r in rows if r]
    if len({x[2] for r in rows for x in r}) < 2 or len(rows) < 3:
        return None

    def fit(chosen: Iterable[int]) -> np.ndarray:
        table = np.array([x for i in chosen for x in rows[i]])
        return np.linalg.lstsq(table[:, :3], table[:, 3], rcond=None)[0]

    a, b, c = fit(range(len(rows)))
    rng = np.random.default_rng(0)
    resampled = [fit(rng.integers(len(rows), size=len(rows)))[2] for _ in range(_BOOTSTRAPS)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"intercept": a, "log_std": b, "l": c, "low": float(low), "high": float(high), "runs": len(rows)}


def l_matters_once_standardised(runs: Sequence[Run]) -> Verdict | None:
    """H2, on standardised and learnable temperatures without alignment loss."""
    free = [
        r for r in runs
        if r["settings"]["kappa_mode"] in ("standardised", "learnable") and not r["settings"]["alignment"]
    ]  # fmt: skip
    fit = l_regression(free)
    if fit is None:
        return None
    zero = fit["low"] <= 0 <= fit["high"]
    return {
        "claim": "Sharpness depends on l beyond the spread of the logits (H2 says it does not)",
        "measured": f"coefficient of l in H/log n ~ log(std logit) + l: {fit['l']:+.4f} "
        f"[{fit['low']:+.4f}, {fit['high']:+.4f}] over {int(fit['runs'])} runs{where(free[0])}",
        "status": FAILS if zero else HOLDS,
    }


def alignment_is_harmless(runs: Sequence[Run]) -> Verdict | None:
    """H3: entropy with the summed alignment loss and without, at kappa 0.43."""
    name = "kappa=0.43,alignment="
    entropy = paired(runs, f"{name}sum-1", f"{name}none", _entropy)
    loss = paired(runs, f"{name}sum-1", f"{name}none", lambda r: r["summary"]["loss"])
    if entropy is None or loss is None:
        return None
    return {
        "claim": "The alignment loss does not matter for uniformity (H3 says that it controls it)",
        "measured": f"summed minus none: H/log n {said(entropy, 3)}, loss {said(loss, 3)} nats{where(runs[0])}",
        "status": sign(entropy, claim=-1),
    }


def taylor_changes_high_l(runs: Sequence[Run]) -> Verdict | None:
    pairs = {l: paired(runs, "taylor4", "exact", partial(of_l, l=l)) for l in (0, 1, 2)}
    changes = {l: s for l, s in pairs.items() if s is not None}
    if not changes:
        return None
    apart = {l: s.low is not None and s.high is not None and not s.low <= 0 <= s.high for l, s in changes.items()}
    known = all(s.low is not None for s in changes.values())
    expected = apart == {l: l >= 2 for l in changes}
    return {
        "claim": "H4: four Taylor terms instead of the exponential change row_std of l >= 2 only",
        "measured": "; ".join(f"ℓ{l} {said(s)}" for l, s in changes.items()) + where(runs[0]),
        "status": UNDECIDED if not known else HOLDS if expected else FAILS,
    }


def gauge_fixed_is_zero(runs: Sequence[Run]) -> Verdict | None:
    fixed = [r for r in runs if r["settings"]["gauge_fixed"]]
    if not fixed:
        return None
    largest = max(max(abs(h["attended_kl"]) for h in r["summary"]["heads"]) for r in fixed)
    return {
        "claim": "H5: gauge-fixed beliefs have no divergence at all",
        "measured": f"largest attended KL {largest:.1e} nats over {len(fixed)} runs{where(fixed[0])}",
        "status": HOLDS if largest < 1e-4 else FAILS,
    }


def diagonal_matters(runs: Sequence[Run]) -> Verdict | None:
    return _loss_difference(runs, "H6: diagonal covariances cost perplexity", "diagonal", "full")


def frames_matter(runs: Sequence[Run]) -> Verdict | None:
    return _loss_difference(runs, "H7: learned frames are useful: freezing them costs perplexity", "frozen", "learned")


def curvature_matters(runs: Sequence[Run]) -> Verdict | None:
    return _loss_difference(runs, "H8: curved transport predicts worse than flat", "curved", "flat")


def more_tensors_help(runs: Sequence[Run]) -> Verdict | None:
    pairs = [(f"{k}-scalars{_FREE}", f"{k}{_FREE}") for k in (19, 28, 41, 108)]
    return _layouts(runs, "Layouts with more tensor heads predict better than as many scalars", pairs)


def pure_tensors_help(runs: Sequence[Run]) -> Verdict | None:
    return _layouts(
        runs, "Pure tensors predict better than as many scalars", [(f"25-scalars{_FREE}", f"25-pure-tensors{_FREE}")]
    )


def threshold_is_reachable(runs: Sequence[Run]) -> Verdict | None:
    from gauge_attn.diagnostics import row_std_onehot, row_std_uniform

    n = max(r["settings"]["window"] for r in runs)
    return {
        "claim": "row_std > 0.10 is a threshold for sharp attention at any length",
        "measured": f"one-hot attention itself scores {row_std_onehot(64):.4f} at N = 64, {row_std_onehot(99):.4f} at "
        f"N = 99 and {row_std_onehot(n):.4f} at these runs' N = {n}; uniform {row_std_uniform(n):.4f} (by definition)",
        "status": FAILS if row_std_onehot(99) < SHARP else HOLDS,
    }


def _entropy(run: Run) -> float:
    return float(np.mean([h["entropy_ratio"] for h in run["summary"]["heads"]]))


def _loss_difference(runs: Sequence[Run], claim: str, worse: str, better: str) -> Verdict | None:
    change = paired(runs, worse, better, lambda r: r["summary"]["loss"])
    if change is None:
        return None
    return {
        "claim": claim,
        "measured": f"loss of {worse} minus {better}: {said(change)} nats per token{where(runs[0])}",
        "status": sign(change),
    }


def _layouts(runs: Sequence[Run], claim: str, pairs: Sequence[tuple[str, str]]) -> Verdict | None:
    changes = {
        b.removesuffix(_FREE): s
        for a, b in pairs
        if (s := paired(runs, a, b, lambda r: r["summary"]["loss"])) is not None
    }
    if not changes:
        return None
    statuses = {sign(s) for s in changes.values()}
    return {
        "claim": claim,
        "measured": "; ".join(f"scalars minus {b}: {said(s)}" for b, s in changes.items()) + f" nats{where(runs[0])}",
        "status": statuses.pop() if len(statuses) == 1 else UNDECIDED,
    }
