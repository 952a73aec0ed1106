"""What the runs of a grid say about H1 to H8, and about layouts of tensors beside layouts of scalars.

A run is as `grid.train_cell` leaves it; None from a check means that no run bears on it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from gauge_attn.comparisons import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Run,
    Verdict,
    different,
    of_l,
    paired,
    said,
    sign,
    summary,
    where,
)

_BOOTSTRAPS = 2000
_TOLERANCE = 0.10
"""Of H1, relative."""
_FREE = ",learnable,none"
"""The cells of the matrix whose layouts are compared."""


def closed_form(runs: Sequence[Run]) -> Verdict | None:
    """H1: at initialisation row_std follows from d, s and kappa alone, within 10% in every untrained model.

    Runs that differ in their training alone begin as the same model, which counts once.
    """
    found = {
        (r["seed"], r["settings"]["spec"], h["l"], h["row_std"], h["predicted"])
        for r in runs
        for h in r["summary"]["initial"]
    }
    if not found:
        return None
    off = sorted((abs(row_std / predicted - 1), l) for _, _, l, row_std, predicted in found)
    worst, at = off[-1]
    every, beyond = Counter(l for _, l in off), Counter(l for x, l in off if x > _TOLERANCE)
    by_l = f" ({', '.join(f'ℓ{l} {n} of {every[l]}' for l, n in sorted(beyond.items()))})" if beyond else ""
    return {
        "claim": "H1: before training, row_std is the closed form in d, s and kappa, within 10% in every model",
        "measured": f"deviation: median {100 * float(np.median([x for x, _ in off])):.1f}%, largest "
        f"{100 * worst:.1f}% at ℓ{at}; beyond 10% are {beyond.total()} of {len(off)} means over the heads of an l"
        f"{by_l}{where(runs[0])}",
        "status": HOLDS if worst <= _TOLERANCE else FAILS,
        "test": "the untrained model farthest off against 10 %",
    }


def l_regression(runs: Sequence[Run]) -> dict[str, float] | None:
    """H/log n ~ a + b log(logit std) + c l over all heads of the runs; c with a 95% interval over resampled runs.

    Runs, not heads, are resampled (heads of a run share its training), each different one counted once. None with
    fewer than two values of l.
    """
    rows = [
        [
            (1.0, math.log(max(h["logit_std"], 1e-12)), float(h["l"]), h["entropy_ratio"])
            for h in r["summary"]["heads"]
            if "logit_std" in h
        ]
        for r in different(runs)
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
        f"[{fit['low']:+.4f}, {fit['high']:+.4f}] over {int(fit['runs'])} different runs{where(free[0])}",
        "status": UNDECIDED if zero else HOLDS,  # an interval around 0 is no proof of 0
        "test": "least squares; percentile bootstrap over runs, 95 %",
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


def alignment_makes_uniform(runs: Sequence[Run]) -> Verdict | None:
    """H3 over the matrix: entropy with the summed alignment loss minus without, by layout and temperature mode."""
    names = {r["cell"] for r in runs}
    cells = [a for name in sorted(names) if (a := name.removesuffix(",sum-1")) != name and f"{a},none" in names]
    changes = {a: s for a in cells if (s := paired(runs, f"{a},sum-1", f"{a},none", _entropy)) is not None}
    if len(changes) < 2:
        return None
    entropy = {(r["cell"], r["seed"]): _entropy(r) for r in runs}
    seeds = [s for s in sorted({r["seed"] for r in runs}) if all((f"{a},sum-1", s) in entropy for a in changes)]
    every = summary(
        [float(np.mean([entropy[f"{a},sum-1", s] - entropy[f"{a},none", s] for a in changes])) for s in seeds]
    )
    up = sum(s.mean > 0 for s in changes.values())
    against = any(s.high is not None and s.high < 0 for s in changes.values())
    status = sign(every)
    if status == HOLDS and (against or up < len(changes)):
        status = FAILS if against else UNDECIDED
    return {
        "claim": "H3: the summed alignment loss makes heads more uniform in every layout and temperature mode",
        "measured": f"H/log n, summed minus none, mean over {len(changes)} pairs of cells: {said(every, 3)}; higher in "
        f"{up} of them{where(runs[0])}",
        "status": status,
    }


def taylor_changes_high_l(runs: Sequence[Run]) -> Verdict | None:
    pairs = {l: paired(runs, "taylor4", "exact", partial(of_l, l=l)) for l in (0, 1, 2)}
    changes = {l: s for l, s in pairs.items() if s is not None}
    if not changes:
        return None
    apart = {l: s.low is not None and s.high is not None and not s.low <= 0 <= s.high for l, s in changes.items()}
    if any(s.low is None for s in changes.values()):
        status = UNDECIDED
    elif any(apart[l] for l in changes if l < 2):
        status = FAILS
    else:
        status = HOLDS if all(apart[l] for l in changes if l >= 2) else UNDECIDED
    return {
        "claim": "H4: four Taylor terms instead of the exponential change row_std of l >= 2 only",
        "measured": "; ".join(f"ℓ{l} {said(s)}" for l, s in changes.items()) + where(runs[0]),
        "status": status,
    }


def gauge_fixed_is_zero(runs: Sequence[Run]) -> Verdict | None:
    fixed = different(r for r in runs if r["settings"]["gauge_fixed"])
    if not fixed:
        return None
    largest = max(max(abs(h["attended_kl"]) for h in r["summary"]["heads"]) for r in fixed)
    return {
        "claim": "H5: gauge-fixed beliefs have no divergence at all",
        "measured": f"largest attended KL {largest:.1e} nats over {len(fixed)} runs{where(fixed[0])}",
        "status": HOLDS if largest < 1e-4 else FAILS,
        "test": "the head farthest off against 0.0001 nats",
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
