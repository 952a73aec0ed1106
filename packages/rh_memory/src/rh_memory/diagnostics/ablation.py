"""Does a slot matter? Ablations that really take it away, singly and in every combination.

removed      the slot is neither attended to by other slots nor pooled;
mean         its final state is replaced by that state's mean over the windows: it says nothing about this window;
resampled    its final state comes from another window: a state of the right kind that says the wrong thing;
subsets      all 2^M - 1 ways to pool some of the slots, cheap because pooling comes last and is linear.

Every number is a paired difference in nats on the golden windows, positive where the ablation hurts.

Shapes: W windows, S subsets of slots, M slots, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from lab_shared.progress import Counter
from torch import Tensor

from rh_memory.diagnostics.golden import Golden, under_changes
from rh_memory.mdn import Mixture

_AT_ONCE = 1 << 16
"""Pooled states that are held at once, (W, S) of them."""


def removals(model: Any, golden: Golden) -> dict[str, Any]:
    """NLL as it is and the cost of removing each slot: {"base", "removed": one estimate per slot}."""
    gone_MM = torch.eye(model.n_memory, dtype=torch.bool, device=golden.device)
    base_W, *nll_MW = under_changes(model, golden, [{}, *({"remove": gone_M} for gone_M in gone_MM)], title="removing")
    rows = [{"slot": i, **golden.estimate(nll_W - base_W).json()} for i, nll_W in enumerate(nll_MW)]
    return {"base": golden.estimate(base_W).json(), "removed": rows}


@torch.inference_mode()
def replacements(model: Any, golden: Golden, h_WMD: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Cost of replacing each slot's final state by its mean, and by that of another window (postfix memory)."""
    y_W = golden.targets()
    pooled_WD, weight_M = model.pool(h_WMD), model.pooling_weights()
    base_W = -model.head.mixture(pooled_WD).log_prob(y_W)
    other_W = torch.randperm(len(y_W), generator=torch.Generator().manual_seed(seed)).to(h_WMD.device)
    states = {"mean": h_WMD.mean(0).expand_as(h_WMD), "resampled": h_WMD[other_W]}
    found: dict[str, Any] = {}
    for name, state_WMD in states.items():
        # Column i: the pooled state with slot i replaced.
        changed_WMD = pooled_WD[:, None] + weight_M[:, None] * (state_WMD - h_WMD)
        nll_WM = -model.head.mixture(changed_WMD).log_prob(y_W[:, None])
        costs = (nll_WM - base_W[:, None]).mT
        found[name] = [{"slot": i, **golden.estimate(cost_W).json()} for i, cost_W in enumerate(costs)]
    return found


def subset_readouts(model: Any, h_WMD: Tensor, keep_SM: Tensor) -> Mixture:
    """Densities (W, S) read from states when only some slots are pooled. float32, as the pooling of a prediction is."""
    with torch.autocast(h_WMD.device.type, enabled=False):
        return model.head.mixture(model.pooling_weights(keep=keep_SM) @ h_WMD.float())


@torch.inference_mode()
def subsets(model: Any, golden: Golden, h_WMD: Tensor) -> dict[str, Any]:
    """NLL of every non-empty subset of pooled slots, and by size the best, mean and worst of them.

    Choosing the best subset on the windows it is scored on flatters it: best and worst are picked on every other block
    of 256 spacings, and all three are scored on the rest.
    """
    y_W, slots = golden.targets(), h_WMD.shape[1]
    codes = torch.arange(1, 2**slots)
    keep_SM = (codes[:, None] >> torch.arange(slots)) & 1 == 1
    odd_W = torch.from_numpy(golden.spacing_W // 256 % 2 == 1)
    if not bool(odd_W.any()) or bool(odd_W.all()):
        odd_W = torch.arange(len(y_W)) % 2 == 1
    share_W2 = torch.stack([odd_W / odd_W.sum(), ~odd_W / (~odd_W).sum()], -1).double().to(h_WMD.device)
    sums_S2 = torch.zeros(len(codes), 2, dtype=torch.float64, device=h_WMD.device)
    device_keep_SM, few = keep_SM.to(h_WMD.device), max(1, _AT_ONCE // len(codes))
    with Counter("subsets", len(y_W), "windows") as counter:
        for first in range(0, len(y_W), few):
            some = slice(first, first + few)
            nll_WS = -subset_readouts(model, h_WMD[some], device_keep_SM).log_prob(y_W[some, None])
            sums_S2 += nll_WS.double().mT @ share_W2[some]
            counter.show(min(first + few, len(y_W)))
    odd, even = sums_S2.cpu().T
    n_odd = float(odd_W.sum()) / len(y_W)
    every = n_odd * odd + (1 - n_odd) * even
    by_size = []
    for size in range(1, slots + 1):
        index = torch.where(keep_SM.sum(1) == size)[0]
        best, worst = index[odd[index].argmin()], index[odd[index].argmax()]
        by_size.append(
            {
                "slots": size,
                "best": float(even[best]),
                "best_slots": torch.where(keep_SM[best])[0].tolist(),
                "mean": float(even[index].mean()),
                "worst": float(even[worst]),
            }
        )
    return {"nll": every.tolist(), "by_size": by_size}


@torch.inference_mode()
def effect_sizes(model: Any, h_WMD: Tensor) -> dict[str, Any]:
    """RMS change of the predicted mean when a slot is left out of the pooling, and its spread over slots in nats.

    The entropy of the normalised effects is log M when all slots matter alike.
    """
    slots = h_WMD.shape[1]
    all_but_one_MM = ~torch.eye(slots, dtype=torch.bool, device=h_WMD.device)
    full_W1 = model.readout(h_WMD).mean()[:, None]
    effect_M = (subset_readouts(model, h_WMD, all_but_one_MM).mean() - full_W1).square().mean(0).sqrt().double().cpu()
    share_M = (effect_M / effect_M.sum()).clamp_min(1e-12)
    return {"effect": effect_M.tolist(), "entropy": float(-(share_M * share_M.log()).sum())}
