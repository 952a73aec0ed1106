"""Diagnostics A to K by the original formulas and thresholds, each with the reason where it cannot say what it claims.

Kept so that old figures can be compared. The rebuilt tests beside this file answer the same questions. Windows are
drawn at random as they were then, but from a seed.

Shapes: M slots, D channels, T spacings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rh_memory.data.windows import SpacingData
from rh_memory.diagnostics.geometry import content_gradients, cosines, off_diagonal
from rh_memory.diagnostics.golden import Golden, under_changes, window_nll
from rh_memory.diagnostics.rollout import roll, true_future

VACUOUS = {
    "A ablation": "slot_off zeroes the slot's input only: it keeps its position, is attended to and, behind the data, "
    "sees all of it and is pooled, so about nothing need change; 500 windows leave noise of the size of the threshold, "
    "and the largest of 8 is biased upwards",
    "A' k-slot curve": "it adds up single-slot differences: no two slots are ever off together",
    "B similarity": "cosines of inputs: slots with different inputs can end in the same state, and the reverse",
    "C gradient correlation": "ten batches with dropout on: the correlation of noise is counted with that of the slots",
    "D uniformity": "equal readout weights say nothing about equal use: the states they weigh may be equal",
    "E effect entropy": "effects of slot_off (see A) are about 0; their entropy is that of normalised noise",
    "F norms": "a norm has no meaning without the scale of what it is added to",
    "G error growth": "the error of one later gap is bounded by the marginal's mean absolute error, .33, so the slope "
    "cannot pass about .1 and the threshold .5 never fires",
    "H cross-block": "per-window NLLs vary by about 1.1, so 100 windows a block give a CV of about .4 from noise, "
    "a CV is undefined where the mean may be 0, and where it is negative every CV passes",
    "I attention": "one layer of one batch without an interval; the threshold depends on the context length",
    "J permutation": "identity embeddings only: position, readout weight and causal order still label every slot; with "
    "permute_per_batch the unpermuted reference is itself a random permutation. The increase is in percent of an NLL, "
    "which has no zero point",
    "K gradient rank": "rows are batches times slots, so the ratio to 8 slots can pass 1 (it counts noise directions)",
}


def run(
    model: Any,
    data: SpacingData,
    starts_N: Tensor,
    long_N: Tensor,
    *,
    width: int,
    has_heights: bool,
    batch: int = 64,
    rollouts: int = 100,
    steps: int = 200,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """All tests on windows drawn from these starts: {"A ablation": {figures, "passes": bool or None, "vacuous"}}.

    long_N: the starts whose window is followed by `steps` more spacings, for the rollouts.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(windows: int, from_N: Tensor = starts_N) -> Golden:
        return Golden(data, from_N[torch.randint(len(from_N), (windows,), generator=generator)], batch, width)

    model.eval()
    found: dict[str, dict[str, Any]] = {}
    found |= _ablation(model, draw(500))
    content_MD, id_MD = (x.detach() for x in model.slot_embeddings())
    token_MD = content_MD + id_MD
    largest = float(off_diagonal(cosines(token_MD)).max())
    colour = "red" if largest > 0.8 else "yellow" if largest > 0.5 else "green"
    found["B similarity"] = {"largest_cosine": largest, "colour": colour, "passes": largest <= 0.8}
    model.train()
    gradient_GMD = content_gradients(model, draw(10 * batch), batch)
    model.eval()
    rows_MN = gradient_GMD.transpose(0, 1).flatten(1)
    correlation = float(off_diagonal(torch.corrcoef(rows_MN)).abs().mean())
    found["C gradient correlation"] = {"mean_abs_correlation": correlation, "passes": correlation < 0.7}
    if model.config.memory == "postfix":
        weight_M = model.readout_M.detach().softmax(-1)
        uniformity = float(-(weight_M * weight_M.log()).sum()) / math.log(max(2, model.n_memory))
        found["D uniformity"] = {"uniformity": uniformity, "passes": uniformity > 0.5}
    found["E effect entropy"] = _effects(model, draw(500))
    found["F norms"] = {"norm": token_MD.norm(dim=-1).tolist(), "passes": None}
    found["G error growth"] = _error_growth(model, draw(rollouts, long_N), steps, has_heights=has_heights)
    found["H cross-block"] = _cross_block(model, [draw(100, quarter) for quarter in starts_N.tensor_split(4)])
    found["I attention"] = _attention(model, draw(batch))
    found["J permutation"] = _permutation(model, draw(200), generator)
    found["K gradient rank"] = _gradient_rank(model, draw(20 * batch))
    for name, result in found.items():
        result["vacuous"] = VACUOUS[name]
    return found


def _ablation(model: Any, golden: Golden) -> dict[str, dict[str, Any]]:
    nll_V = under_changes(model, golden, _as_is_and_slots_off(model), title="slots off").double().mean(1)
    base, deltas = nll_V[0], (nll_V[1:] - nll_V[0]).tolist()
    curve = torch.tensor(sorted(deltas, reverse=True)).cumsum(0).tolist()
    return {
        "A ablation": {"nll": float(base), "delta": deltas, "largest": max(deltas), "passes": max(deltas) > 0.01},
        "A' k-slot curve": {"sum_of_deltas": curve, "passes": None},
    }


def _as_is_and_slots_off(model: Any) -> list[dict[str, int]]:
    return [{}, *({"legacy_slot_off": i} for i in range(model.n_memory))]


def _effects(model: Any, golden: Golden) -> dict[str, Any]:
    mean_VW = under_changes(model, golden, _as_is_and_slots_off(model), lambda p, y: p.mean(), title="effects")
    effect_M = (mean_VW[1:] - mean_VW[0]).square().mean(1).sqrt().double().cpu()
    share_M = effect_M / effect_M.sum().clamp_min(1e-12) + 1e-12
    entropy = float(-(share_M * share_M.log()).sum())
    return {"effect": effect_M.tolist(), "entropy": entropy, "passes": entropy > 1.5}


def _error_growth(model: Any, golden: Golden, steps: int, *, has_heights: bool) -> dict[str, Any]:
    rolled = roll(model, golden, steps, has_heights=has_heights)
    error_S = (rolled - true_future(golden, steps)).abs().mean(0).double().cpu()
    horizons = [h for h in (1, 10, 50, 200) if h <= steps]
    errors = torch.stack([error_S[h - 1] for h in horizons])
    x = torch.tensor(horizons, dtype=torch.float64).log()
    x, y = x - x.mean(), errors.log() - errors.log().mean()
    slope = float((x * y).sum() / x.square().sum()) if len(horizons) > 1 else None
    passes = None if slope is None else slope < 0.5
    mae = dict(zip(map(str, horizons), errors.tolist(), strict=True))
    return {"starts": len(golden), "mae": mae, "slope": slope, "passes": passes}


def _cross_block(model: Any, quarters: Sequence[Golden]) -> dict[str, Any]:
    nll = [float(window_nll(model, golden).mean()) for golden in quarters]
    values = torch.tensor(nll, dtype=torch.float64)
    cv = float(values.std(correction=0) / values.mean())
    return {"nll": nll, "cv": cv, "passes": cv <= 0.1}


def _attention(model: Any, golden: Golden) -> dict[str, Any]:
    weight_MT = model.attention_profile(next(golden.windows()))[-1].float().mean(0).cpu()
    share_MT = weight_MT / weight_MT.sum(-1, keepdim=True).clamp_min(1e-12)
    t = share_MT.shape[-1]
    centre_M = share_MT @ torch.arange(t, dtype=torch.float32)
    field_M = (share_MT > 0.05 * share_MT.amax(-1, keepdim=True)).sum(-1)
    spread = float(centre_M.std()) if len(centre_M) > 1 else 0.0
    return {
        "centre_of_mass": centre_M.tolist(),
        "receptive_field": field_M.tolist(),
        "std_centre_of_mass": spread,
        "passes": spread > 0.1 * t,
    }


def _permutation(model: Any, golden: Golden, generator: torch.Generator) -> dict[str, Any]:
    drawn = [torch.randperm(model.n_memory, generator=generator).to(golden.device) for _ in range(5)]
    nll_VW = under_changes(model, golden, [{}, *({"id_perm": p} for p in drawn)], title="identities dealt anew")
    base, *nll = nll_VW.double().mean(1).tolist()
    increase = (sum(nll) / len(nll) - base) / abs(base)
    return {"nll": base, "permuted": nll, "relative_increase": increase, "passes": increase <= 0.1}


def _gradient_rank(model: Any, golden: Golden) -> dict[str, Any]:
    rows = content_gradients(model, golden, golden.batch).flatten(0, 1).double()
    power = torch.linalg.svdvals(rows - rows.mean(0)).square()
    if float(power.sum()) == 0:
        return {"r90": 0, "r50": 0, "effective_rank": 0.0, "ratio": 0.0, "passes": False}
    share = power / power.sum()
    r90, r50 = (int((share.cumsum(0) < level).sum()) + 1 for level in (0.9, 0.5))
    entropy = float(-(share * share.clamp_min(1e-300).log()).sum())
    ratio = r90 / model.n_memory
    return {"r90": r90, "r50": r50, "effective_rank": math.exp(entropy), "ratio": ratio, "passes": ratio > 0.5}
