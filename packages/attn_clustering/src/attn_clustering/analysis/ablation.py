"""Causal evidence: what is lost when heads are replaced by their average output.

Shape suffixes: N sequences, T positions, H heads, C head width, D model width, K topics, P probed positions.

Mean ablation sets a head's output z to its mean over sequences at each position: what it says regardless of content.
The heads that cluster most are compared with equally many other heads of the same layers, drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

HeadId = tuple[int, int]
"""(layer, head)."""


class Effect(NamedTuple):
    loss: float
    """Mean next-token cross-entropy in nats."""
    probe: float
    """Accuracy of the topic probe after the last block, trained on the whole model."""


def top_heads(score_LH: Tensor, n: int) -> list[HeadId]:
    """The n heads with the largest score, best first."""
    order = score_LH.flatten().argsort(descending=True, stable=True)[:n].tolist()
    return [divmod(i, score_LH.size(1)) for i in order]


def random_heads_like(chosen: Sequence[HeadId], heads: int, generator: torch.Generator) -> list[HeadId]:
    """As many heads of each layer as `chosen` has, drawn among the others; fewer where a layer has no more."""
    out = []
    for layer in sorted({layer for layer, _ in chosen}):
        taken = [head for other, head in chosen if other == layer]
        rest = torch.tensor([head for head in range(heads) if head not in taken], dtype=torch.long)
        picked = rest[torch.randperm(len(rest), generator=generator)[: len(taken)]]
        out += [(layer, int(head)) for head in picked]
    return out


def mean_outputs(model: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    """The mean of every layer's z over sequences: L tensors (T, H, C), float32."""
    sums: list[Any] = [0.0] * model.config.layers

    def add(z_BTHC: Tensor, point: Any) -> None:
        sums[point.layer()] = sums[point.layer()] + z_BTHC.float().sum(0)

    for tokens in batches:
        model.watch(tokens, [(f"blocks.{i}.attn.hook_z", add) for i in range(model.config.layers)])
    n = sum(len(tokens) for tokens in batches)
    return [total / n for total in sums]


def ablation_hooks(heads: Sequence[HeadId], means: Sequence[Tensor]) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks that replace these heads' outputs by the means."""

    def replace(z_BTHC: Tensor, point: Any, index: list[int]) -> Tensor:
        z = z_BTHC.clone()
        z[:, :, index] = means[point.layer()][:, index].to(z)
        return z

    layers = sorted({layer for layer, _ in heads})
    return [
        (f"blocks.{i}.attn.hook_z", partial(replace, index=[head for layer, head in heads if layer == i]))
        for i in layers
    ]


def effect(
    model: Any,
    batches: Sequence[tuple[Tensor, Tensor, Tensor]],
    weight_DK: Tensor,
    bias_K: Tensor,
    positions: Tensor,
    hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
) -> Effect:
    """Loss and probe accuracy under hooks. batches: (tokens, targets, topics), each (B, T)."""
    loss = correct = torch.zeros((), device=positions.device)
    kept: dict[str, Tensor] = {}

    def keep(x_BTD: Tensor, point: Any) -> None:
        kept["x"] = x_BTD[:, positions].float()

    last = (f"blocks.{model.config.layers - 1}.hook_resid_post", keep)
    for tokens, targets, topics in batches:
        loss = loss + model.run_with_hooks(tokens, [*hooks, last], targets) * len(tokens)
        named = (kept["x"] @ weight_DK + bias_K).argmax(-1) == topics[:, positions]
        correct = correct + named.float().mean() * len(tokens)
    n = sum(len(tokens) for tokens, _, _ in batches)
    return Effect(float(loss) / n, float(correct) / n)


def ablate(
    model: Any,
    batches: Sequence[tuple[Tensor, Tensor, Tensor]],
    score_LH: Tensor,
    weight_DK: Tensor,
    bias_K: Tensor,
    positions: Tensor,
    n_heads: int,
    *,
    draws: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Ablate the n_heads heads of largest score, and `draws` random sets of other heads of the same layers.

    Returns {"heads": [[layer, head], ...], "whole", "top", "random": {"loss", "probe"}, "random_draws": [...]}; random
    is the mean over draws, empty where the layers have no other heads.
    """
    means = mean_outputs(model, [tokens for tokens, _, _ in batches])
    run = partial(effect, model, batches, weight_DK, bias_K, positions)
    chosen = top_heads(score_LH, n_heads)
    generator = torch.Generator().manual_seed(seed)
    sets = [random_heads_like(chosen, score_LH.size(1), generator) for _ in range(draws)]
    effects = [run(ablation_hooks(heads, means)) for heads in sets if heads]
    mean = [sum(x) / len(effects) for x in zip(*effects, strict=True)] if effects else []
    return {
        "heads": [list(head) for head in chosen],
        "whole": run()._asdict(),
        "top": run(ablation_hooks(chosen, means))._asdict(),
        "random": dict(zip(Effect._fields, mean, strict=True)) if mean else {},
        "random_draws": [e._asdict() for e in effects],
    }
