"""What labels a slot? Its identity embedding, its position among the slots, and its weight in the readout.

Permuting only one of them proves nothing, since the others still tell the slots apart. So each is permuted alone and
all are permuted together, with the same seeded permutations, on the golden windows; contents stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rh_memory.diagnostics.golden import Golden, under_changes

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
    parts = {name: keys for name, keys in PARTS.items() if model.config.memory == "postfix" or name != "readout weight"}
    if model.config.memory != "postfix":
        parts["whole identity"] = [key for key in parts["whole identity"] if key != "weight_perm"]
    drawn = [p.to(golden.device) for p in permutations(model.n_memory, count, seed)]
    changes = [dict.fromkeys(keys, p) for keys in parts.values() for p in drawn]
    nll_VW = under_changes(model, golden, [{}, *changes], title="permuting")
    found = {}
    for name, cost_PW in zip(parts, (nll_VW[1:] - nll_VW[0]).split(count), strict=True):
        each = cost_PW.double().mean(1).tolist()
        estimate = golden.estimate(cost_PW.mean(0))
        found[name] = {**estimate.json(), "smallest": min(each), "largest": max(each), "permutations": count}
    return found


def content_test(model: Any, golden: Golden, marginal_nll: float) -> dict[str, Any]:
    """The two halves of a slot's token: content zeroed (identity only), and identities averaged (content only).

    content only: every slot gets the mean identity embedding, so that nothing in the embedding tells slots apart. Its
    cost is also given as a share of what the model gains over the i.i.d. marginal, `marginal_nll`: that gain has a zero
    point, which an NLL has not.
    """
    content_MD, id_MD = (x.detach() for x in model.slot_embeddings())
    own_M = torch.arange(model.n_memory, device=golden.device)
    zeroed = {"content": torch.zeros_like(content_MD)}
    # Slot i is given identity i on top of any content, so what differs between identities is taken out here.
    averaged = {"content": content_MD - id_MD + id_MD.mean(0), "id_perm": own_M}
    base_W, zeroed_W, averaged_W = under_changes(model, golden, [{}, zeroed, averaged], title="contents")
    identity_only, content_only = zeroed_W - base_W, averaged_W - base_W
    gain, lost = marginal_nll - float(base_W.mean()), float(content_only.mean())
    return {
        "identity_only": golden.estimate(identity_only).json(),
        "content_only": golden.estimate(content_only).json(),
        "content_only_share_of_gain": lost / gain if gain > 0 else None,
    }
