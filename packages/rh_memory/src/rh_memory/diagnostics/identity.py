"""What labels a slot? Its identity embedding, its position among the slots, and its weight in the readout.

Permuting only one of them proves nothing, since the others still tell the slots apart. So each is permuted alone and
all are permuted together, with the same seeded permutations, on the golden windows; contents stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from lab_shared.progress import Counter
from torch import Tensor

from rh_memory.diagnostics.golden import Golden, window_nll

PARTS = {
    "identity embedding": ["id_perm"],
    "slot position": ["position_perm"],
    "readout weight": ["weight_perm"],
    "whole identity": ["id_perm", "position_perm", "weight_perm"],
}


def permutations(slots: int, count: int, seed: int) -> list[Tensor]:
    """`count` seeded permutations of the slots without the identity permutation."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while len(found) < count:
        permutation = torch.randperm(slots, generator=generator)
        if slots == 1 or not torch.equal(permutation, torch.arange(slots)):
            found.append(permutation)
    return found


def permutation_test(model: Any, golden: Golden, *, count: int = 8, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Cost in nats of permuting each part of the identity: mean over permutations with its interval, and their range.

    A prefix memory has no readout weights; its whole identity is embedding and position.
    """
    base_W = window_nll(model, golden)
    parts = {name: keys for name, keys in PARTS.items() if model.config.memory == "postfix" or name != "readout weight"}
    costs: dict[str, list[Tensor]] = {name: [] for name in parts}
    with Counter("permuting", count, "permutations") as counter:
        for done, p in enumerate(permutations(model.n_memory, count, seed), start=1):
            for name, keys in parts.items():
                used = keys if model.config.memory == "postfix" else [key for key in keys if key != "weight_perm"]
                changes = {key: p.to(golden.device) for key in used}
                costs[name].append(window_nll(model, golden, **changes) - base_W)
            counter.show(done)
    found = {}
    for name, rows in costs.items():
        each = [float(row.mean()) for row in rows]
        estimate = golden.estimate(torch.stack(rows).mean(0))
        found[name] = {**estimate.json(), "smallest": min(each), "largest": max(each), "permutations": count}
    return found


def content_test(model: Any, golden: Golden, marginal_nll: float) -> dict[str, Any]:
    """The two halves of a slot's token: content zeroed (identity only), and identities averaged (content only).

    content only: every slot gets the mean identity embedding, so that nothing in the embedding tells slots apart. Its
    cost is also given as a share of what the model gains over the i.i.d. marginal, `marginal_nll`: that gain has a zero
    point, which an NLL has not.
    """
    base_W = window_nll(model, golden)
    content_MD, id_MD = (x.detach() for x in model.slot_embeddings())
    own_M = torch.arange(model.n_memory, device=golden.device)
    identity_only = window_nll(model, golden, content=torch.zeros_like(content_MD)) - base_W
    # Slot i is given identity i on top of any content, so what differs between identities is taken out here.
    content_only = window_nll(model, golden, content=content_MD - id_MD + id_MD.mean(0), id_perm=own_M) - base_W
    gain, lost = marginal_nll - float(base_W.mean()), float(content_only.mean())
    return {
        "identity_only": golden.estimate(identity_only).json(),
        "content_only": golden.estimate(content_only).json(),
        "content_only_share_of_gain": lost / gain if gain > 0 else None,
    }
