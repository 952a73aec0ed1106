"""Where slots look (postfix) or how much data looks at slots (prefix), layer by layer.

Weights are averaged over heads; distances count spacings back from the end of the context, 1 the newest.

Shapes: L layers, H heads, M slots, T spacings, G groups of windows.
"""

from __future__ import annotations

from typing import Any

import torch
from lab_shared.stats import bca_interval
from torch import Tensor

from rh_memory.diagnostics.golden import Golden

NEAR = (1, 8, 32)


def profiles(model: Any, golden: Golden, *, groups: int = 16, size: int = 16) -> Tensor:
    """(G, L, H, M, T): mean attention weights of groups of golden windows."""
    few = golden.few(groups * size)
    chunks = few.starts_W.split(size)
    return torch.stack(
        [model.attention_profile(few.data.window(s.to(few.device), few.width)).float().cpu() for s in chunks]
    )


def summary(profile_GLHMT: Tensor, memory: str = "postfix") -> list[dict[str, Any]]:
    """Per layer, for a prefix memory: how much of its attention the data pays to slots. For a postfix memory: mean
    distance, spread of it over slots, effective number of spacings looked at, weight on the newest.

    Weights are normalised over the spacings first; "weight on data" is what was there before. Intervals: bootstrap over
    groups of windows. A spread over slots of 0 means that all look at the same place.
    """
    weight_GLMT = profile_GLHMT.mean(2)
    on_data_GLM = weight_GLMT.sum(-1)
    share_GLMT = weight_GLMT / on_data_GLM[..., None].clamp_min(1e-12)
    t = share_GLMT.shape[-1]
    distance_T = torch.arange(t, 0, -1, dtype=torch.float32)
    mean_GLM = share_GLMT @ distance_T
    entropy_GLM = -(share_GLMT * share_GLMT.clamp_min(1e-12).log()).sum(-1)
    values = {"weight on slots": weight_GLMT.sum(2).mean(-1)}
    if memory == "postfix":
        values = {
            "weight on data": on_data_GLM.mean(-1),
            "mean distance": mean_GLM.mean(-1),
            "spread over slots": mean_GLM.std(-1) if mean_GLM.shape[-1] > 1 else torch.zeros_like(mean_GLM[..., 0]),
            "spacings looked at": entropy_GLM.exp().mean(-1),
            **{f"weight on newest {n}": share_GLMT[..., -n:].sum(-1).mean(-1) for n in NEAR if n < t},
        }
    rows = []
    for layer in range(share_GLMT.shape[1]):
        row: dict[str, Any] = {"layer": layer}
        for name, value_GL in values.items():
            x = value_GL[:, layer].double().numpy()
            low, high = bca_interval(x) if len(x) > 1 and x.std() > 0 else (None, None)
            row[name] = {"value": float(x.mean()), "low": low, "high": high}
        rows.append(row)
    return rows
