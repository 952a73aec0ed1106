"""Does a slot matter? Ablations that really take it away, singly and in every combination.

removed      the slot is neither attended to by other slots nor pooled;
mean         its final state is replaced by that state's mean over the windows: it says nothing about this window;
resampled    its final state comes from another window: a state of the right kind that says the wrong thing;
subsets      all 2^M - 1 ways to pool some of the slots, cheap because pooling comes last.

Every number is a paired difference in nats on the golden windows, positive where the ablation hurts.
"""

from __future__ import annotations

from typing import Any

import torch
from lab_shared.progress import Counter
from torch import Tensor

from rh_memory.diagnostics.golden import Golden, readout_nll, window_nll


def removals(model: Any, golden: Golden) -> dict[str, Any]:
    """NLL as it is and the cost of removing each slot: {"base", "removed": one estimate per slot}."""
    base_W, slots = window_nll(model, golden), model.n_memory
    rows = []
    with Counter("removing", slots, "slots") as counter:
        for i in range(slots):
            gone_M = torch.arange(slots, device=golden.device) == i
            cost_W = window_nll(model, golden, remove=gone_M) - base_W
            rows.append({"slot": i, **golden.estimate(cost_W).json()})
            counter.show(i + 1)
    return {"base": golden.estimate(base_W).json(), "removed": rows}


def replacements(model: Any, golden: Golden, h_WMD: Tensor, *, seed: int = 0) -> dict[str, Any]:
    """Cost of replacing each slot's final state by its mean, and by that of another window (postfix memory)."""
    y_W = golden.targets()
    base_W = readout_nll(model, h_WMD, y_W)
    other_W = torch.randperm(len(y_W), generator=torch.Generator().manual_seed(seed)).to(h_WMD.device)
    found: dict[str, Any] = {"mean": [], "resampled": []}
    for i in range(h_WMD.shape[1]):
        states = {"mean": h_WMD[:, i].mean(0).expand(len(y_W), -1), "resampled": h_WMD[other_W, i]}
        for name, state_WD in states.items():
            changed = h_WMD.clone()
            changed[:, i] = state_WD
            cost_W = readout_nll(model, changed, y_W) - base_W
            found[name].append({"slot": i, **golden.estimate(cost_W).json()})
    return found


def subsets(model: Any, golden: Golden, h_WMD: Tensor) -> dict[str, Any]:
    """NLL of every non-empty subset of pooled slots, and by size the best, mean and worst of them.

    Choosing the best subset on the windows it is scored on flatters it: it is picked on every other block of 256
    spacings and scored on the rest.
    """
    y_W, slots = golden.targets(), h_WMD.shape[1]
    masks = [[bool(code >> i & 1) for i in range(slots)] for code in range(1, 2**slots)]
    odd_W = torch.from_numpy(golden.spacing_W // 256 % 2 == 1).to(h_WMD.device)
    if not bool(odd_W.any()) or bool(odd_W.all()):
        odd_W = torch.arange(len(y_W), device=h_WMD.device) % 2 == 1
    rows: list[Tensor] = []
    with Counter("subsets", len(masks), "subsets") as counter:
        for mask in masks:
            nll_W = readout_nll(model, h_WMD, y_W, keep=torch.tensor(mask, device=h_WMD.device))
            rows.append(torch.stack([nll_W[odd_W].mean(), nll_W[~odd_W].mean(), nll_W.mean()]))
            counter.show(len(rows))
    odd, even, every = torch.stack(rows).double().cpu().T
    by_size = []
    for size in range(1, slots + 1):
        index = torch.tensor([k for k, mask in enumerate(masks) if sum(mask) == size])
        best = index[odd[index].argmin()]
        by_size.append(
            {
                "slots": size,
                "best": float(even[best]),
                "best_slots": [i for i in range(slots) if masks[int(best)][i]],
                "mean": float(every[index].mean()),
                "worst": float(every[index].max()),
            }
        )
    return {"nll": every.tolist(), "by_size": by_size}


def effect_sizes(model: Any, h_WMD: Tensor) -> dict[str, Any]:
    """RMS change of the predicted mean when a slot is left out of the pooling, and its spread over slots in nats.

    The entropy of the normalised effects is log M when all slots matter alike.
    """
    slots = h_WMD.shape[1]
    with torch.inference_mode():
        full_W = model.readout(h_WMD).mean()
        effects = []
        for i in range(slots):
            keep_M = torch.arange(slots, device=h_WMD.device) != i
            effects.append((model.readout(h_WMD, keep=keep_M).mean() - full_W).square().mean().sqrt())
        effect_M = torch.stack(effects).double().cpu()
    share_M = (effect_M / effect_M.sum()).clamp_min(1e-12)
    return {"effect": effect_M.tolist(), "entropy": float(-(share_M * share_M.log()).sum())}
