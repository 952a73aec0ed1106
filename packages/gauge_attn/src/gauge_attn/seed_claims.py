"""What the runs of a grid say about the claims that started this: low-spin heads are uniform, by capacity.

A run is as `grid.train_cell` leaves it; None from a check means that no run bears on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from lab_shared.stats import Summary

from gauge_attn.comparisons import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Run,
    Verdict,
    by_cell,
    different,
    of_l,
    paired,
    said,
    sign,
    summary,
    where,
)

SHARP = 0.10


def low_spin_cannot(runs: Sequence[Run]) -> Verdict | None:
    """The seed's headline: heads of l = 0, 1 cannot be sharp, whatever the training or hyper-parameters.

    Runs can refute that; that it holds is said of their own cells only.
    """
    found: list[tuple[str, Summary, Run]] = []
    for (_, cell), members in by_cell(runs).items():
        for l in (0, 1):
            values = [v for run in members if (v := of_l(run, l)) is not None]
            if values:
                found.append((f"ℓ{l} in {cell}", summary(values), members[0]))
    if not found:
        return None
    shown = max(found, key=lambda f: f[1].mean if f[1].low is None else f[1].low)
    # That none is sharp is said of all of them, also of those that few or scattered seeds leave open.
    open_to = max(found, key=lambda f: (math.inf if f[1].high is None else f[1].high, f[1].mean))
    if shown[1].low is not None and shown[1].low > SHARP:
        status = FAILS
    elif open_to[1].high is not None and open_to[1].high < SHARP:
        status = HOLDS
    else:
        status, shown = UNDECIDED, open_to
    place, s, run = shown
    return {
        "claim": "Heads of l = 0, 1 cannot be sharp (row_std > 0.10), in whichever cell of this grid",
        "measured": f"sharpest low-spin heads: {place}, row_std {said(s)}{where(run)}",
        "status": status,
    }


def order_is_capacity(runs: Sequence[Run]) -> Verdict | None:
    """row_std rises with l in the seed's third row. Do random beliefs with its mu_dist and kappa do the same?"""
    members = [r for r in runs if r["cell"] == "seed-c" and r["summary"]["noise"]]
    if not members:
        return None
    ls = sorted({h["l"] for h in members[0]["summary"]["heads"]})
    measured = {l: summary([of_l(r, l) or 0.0 for r in members]) for l in ls}
    noise = {l: summary([r["summary"]["noise"][str(l)] for r in members]) for l in ls}
    rises = all(noise[a].mean < noise[b].mean for a, b in itertools.pairwise(ls))
    ratio = summary([of_l(r, ls[-1]) / r["summary"]["noise"][str(ls[-1])] for r in members])
    if ratio.low is None or ratio.high is None:
        status = UNDECIDED
    elif rises and ratio.high < 1.5:
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


def shared_kappa_makes_the_order(runs: Sequence[Run]) -> Verdict | None:
    """row_std of l = 2 minus that of l = 0 in the seed's trained layout, at one kappa for all and at kappa d."""

    def rise(run: Run) -> float:
        return (of_l(run, 2) or 0.0) - (of_l(run, 0) or 0.0)

    shared, dim = (
        [rise(r) for r in different(r for r in runs if r["cell"] == f"19,{mode},none")] for mode in ("shared", "dim")
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
    members = different(r for r in runs if r["cell"] == "19,shared,none")
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


def threshold_is_reachable(runs: Sequence[Run]) -> Verdict | None:
    from gauge_attn.diagnostics import row_std_onehot, row_std_uniform

    n = max(r["settings"]["window"] for r in runs)
    return {
        "claim": "row_std > 0.10 is a threshold for sharp attention at any length",
        "measured": f"one-hot attention itself scores {row_std_onehot(64):.4f} at N = 64, {row_std_onehot(99):.4f} at "
        f"N = 99 and {row_std_onehot(n):.4f} at these runs' N = {n}; uniform {row_std_uniform(n):.4f} (by definition)",
        "status": FAILS if row_std_onehot(99) < SHARP else HOLDS,
        "test": "by definition, no data",
    }
