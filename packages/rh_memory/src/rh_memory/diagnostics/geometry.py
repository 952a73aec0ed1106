"""How the slots lie to each other: contents, identities, final states, readout weights and gradients.

Everything in eval mode on the golden windows. The rank of the gradients is that of one M x D matrix (slots by
channels), averaged over windows first: at most M, so effective rank / M is 1 when the slots are pulled in independent
directions. (Stacking batches of gradients, as the seed's test did, measures the noise between batches instead.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from lab_shared.stats import bca_interval
from torch import Tensor

from rh_memory.diagnostics.golden import Golden

_WINDOWS = 256
"""Windows of a pass with gradients, whose activations are all kept."""


def cosines(x_MD: Tensor) -> Tensor:
    """(M, M) cosines; rows of zeros give 0."""
    unit = torch.nn.functional.normalize(x_MD.double(), dim=-1)
    return unit @ unit.mT


def off_diagonal(matrix_MM: Tensor) -> Tensor:
    """The M (M - 1) entries off the diagonal."""
    m = matrix_MM.shape[-1]
    return matrix_MM[..., ~torch.eye(m, dtype=torch.bool, device=matrix_MM.device)]


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the normalised squared singular values; 1 for rank one, M for M equal ones, 0 for zeros."""
    power = torch.linalg.svdvals(matrix.double()).square()
    if float(power.sum()) == 0:
        return 0.0
    share = (power / power.sum()).clamp_min(1e-300)
    return float(torch.exp(-(share * share.log()).sum()))


def slot_geometry(model: Any, golden: Golden, h_WMD: Tensor) -> dict[str, Any]:
    """Cosines and norms of contents, tokens (content + identity) and final states."""
    content_MD, id_MD = (x.detach() for x in model.slot_embeddings())
    state_MM = torch.einsum("wmd,wnd->wmn", *2 * [torch.nn.functional.normalize(h_WMD.float(), dim=-1)])
    mean_W = off_diagonal(state_MM).mean(-1)
    token_MD = content_MD + id_MD
    deviation_MD = (h_WMD - h_WMD.mean(0)).float()
    return {
        "content_cosine": cosines(content_MD).tolist(),
        "token_cosine": cosines(token_MD).tolist(),
        "content_norm": content_MD.norm(dim=-1).tolist(),
        "identity_norm": id_MD.norm(dim=-1).tolist(),
        "token_effective_rank": effective_rank(token_MD),
        "state_cosine": golden.estimate(mean_W).json(),
        # How much of a state's length depends on the window at all.
        "state_variable_share": (
            deviation_MD.square().sum(-1).mean(0) / h_WMD.float().square().sum(-1).mean(0)
        ).tolist(),
    }


def readout_weights(model: Any) -> dict[str, Any]:
    """Pooling weights softmax(w) of a postfix memory; their entropy over log M is 1 when all slots count alike."""
    weight_M = model.readout_M.detach().double().softmax(-1).cpu()
    entropy = float(-(weight_M * weight_M.log()).sum())
    return {"weight": weight_M.tolist(), "uniformity": entropy / math.log(len(weight_M)) if len(weight_M) > 1 else 1.0}


def content_gradients(model: Any, golden: Golden, size: int) -> Tensor:
    """(G, M, D): d NLL / d content, mean over every `size` golden windows in turn, in the mode the model is in.

    Windows of many groups go through one pass, in which every group has a copy of the contents for its gradient.
    """
    content_MD = model.slot_embeddings()[0].detach()
    rows = []
    for window in replace(golden, batch=max(1, _WINDOWS // size) * size).windows():
        groups = -(-len(window) // size)
        content_GMD = content_MD.repeat(groups, 1, 1).requires_grad_(True)
        content_BMD = content_GMD.repeat_interleave(size, 0)[: len(window)]
        nll_B = -model.predict(window, "last", content=content_BMD).log_prob(window.s_BW[:, -1])
        sum_GMD = torch.autograd.grad(nll_B.sum(), content_GMD)[0]
        count_G = torch.full((groups, 1, 1), float(size), device=golden.device)
        count_G[-1] = len(window) - (groups - 1) * size
        rows.append(sum_GMD / count_G)
    return torch.cat(rows)


def gradients(model: Any, golden: Golden, *, groups: int = 32, size: int = 32) -> Tensor:
    """(G, M, D): content gradients of groups of `size` golden windows, in eval mode."""
    model.eval()
    return content_gradients(model, golden.few(groups * size), size)


def gradient_geometry(gradient_GMD: Tensor) -> dict[str, Any]:
    """Cosines between the slots' gradients over groups of windows with an interval, and the rank of their mean."""
    unit = torch.nn.functional.normalize(gradient_GMD.double(), dim=-1)
    per_group = off_diagonal(unit @ unit.mT).mean(-1).cpu().numpy()
    mean_MD = gradient_GMD.mean(0)
    low, high = bca_interval(per_group) if len(per_group) > 1 else (None, None)
    slots = gradient_GMD.shape[1]
    rank = effective_rank(mean_MD)
    return {
        "cosine_within_groups": {"value": float(per_group.mean()), "low": low, "high": high},
        "cosine_of_means": float(off_diagonal(cosines(mean_MD)).mean()),
        "effective_rank": rank,
        "effective_rank_share": rank / slots,
    }
