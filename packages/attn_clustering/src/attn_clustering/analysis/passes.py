"""Runs of a trained model over probing sequences, one statistic after another, nothing of size L x T x T kept.

Shape suffixes: N sequences, B sequences of a batch, P pairs, L layers, H heads, T query positions, S key positions,
G probed places (the embedding, then after each block), D model width, C head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attn_clustering.analysis import heads, legacy, recurrence
from attn_clustering.analysis.attention import AttentionStats

ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Attention weights of one layer that a batch may have."""


def batches(model: Any, n: int, n_positions: int) -> Iterator[slice]:
    """Slices of n sequences whose attention weights of one layer fit."""
    size = max(1, ELEMENTS[next(model.parameters()).device.type] // (model.config.heads * n_positions**2))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def watch_patterns(model: Any, tokens_BT: Tensor, see: Callable[[int, Tensor], None]) -> None:
    """Call see(layer, pattern (B, H, T, S)) layer after layer: the model's own causal attention."""

    def hook(pattern_BHTS: Tensor, point: Any) -> None:
        see(point.layer(), pattern_BHTS)

    model.watch(tokens_BT, [(f"blocks.{i}.attn.hook_pattern", hook) for i in range(model.config.layers)])


def attention_pass(model: Any, tokens_NT: Tensor, topics_NT: Tensor, n_topics: int) -> dict[str, Tensor]:
    """`AttentionStats.result`, and the legacy metrics (L, H) with and without the causal mask."""
    layers, n_heads = model.config.layers, model.config.heads
    stats = AttentionStats(topics_NT, layers, n_heads)
    sums: dict[str, Tensor] = {}

    for rows in batches(model, *tokens_NT.shape):
        topics = topics_NT[rows]
        queries: dict[int, Tensor] = {}

        def keep_query(q_BTHC: Tensor, point: Any, queries: dict[int, Tensor] = queries) -> None:
            queries[point.layer()] = q_BTHC

        def legacy_sums(layer: int, name: str, pattern_BHTS: Tensor, topics: Tensor = topics) -> None:
            for metric, value_H in legacy.legacy_metrics(pattern_BHTS, topics, n_topics).items():
                total = sums.setdefault(metric + name, value_H.new_zeros(layers, n_heads))
                total[layer] += value_H * len(topics)

        def without_mask(k_BTGC: Tensor, point: Any, queries: dict[int, Tensor] = queries) -> None:
            q_BTHC = queries.pop(point.layer())
            pattern = legacy.noncausal_pattern(q_BTHC.transpose(1, 2), k_BTGC.transpose(1, 2))
            legacy_sums(point.layer(), "_noncausal", pattern)

        def with_mask(pattern_BHTS: Tensor, point: Any, rows: slice = rows) -> None:
            stats.add(point.layer(), rows, pattern_BHTS)
            legacy_sums(point.layer(), "_causal", pattern_BHTS)

        hooks: list[tuple[str, Callable[..., None]]] = []
        for i in range(layers):
            hooks += [(f"blocks.{i}.attn.hook_rot_q", keep_query), (f"blocks.{i}.attn.hook_rot_k", without_mask)]
            hooks.append((f"blocks.{i}.attn.hook_pattern", with_mask))
        model.watch(tokens_NT[rows].long(), hooks)
    return stats.result() | {name: (total / len(tokens_NT)).cpu() for name, total in sums.items()}


def recurrence_pass(model: Any, pairs: recurrence.ProbePairs) -> dict[str, Tensor]:
    """`recurrence.recurrence_score` over all pairs."""
    n, n_positions = pairs.recurring_PT.shape
    mass_PLH22 = torch.zeros(n, model.config.layers, model.config.heads, 2, 2, device=pairs.recurring_PT.device)
    for rows in batches(model, n, 2 * n_positions):

        def see(layer: int, pattern_BHTS: Tensor, rows: slice = rows) -> None:
            mass_PLH22[rows, layer] = recurrence.first_segment_mass(pattern_BHTS, pairs.segment)

        watch_patterns(model, pairs.tokens(rows), see)
    return recurrence.recurrence_score(mass_PLH22)


def head_kinds_pass(model: Any, repeated_NT: Tensor) -> dict[str, Tensor]:
    """The scores of `heads.KINDS`, each (L, H), on sequences from `heads.repeated_random`."""
    total_3LH = torch.zeros(len(heads.KINDS), model.config.layers, model.config.heads, device=repeated_NT.device)
    for rows in batches(model, *repeated_NT.shape):

        def see(layer: int, pattern_BHTS: Tensor) -> None:
            total_3LH[:, layer] += heads.head_scores(pattern_BHTS) * len(pattern_BHTS)

        watch_patterns(model, repeated_NT[rows], see)
    return dict(zip(heads.KINDS, (total_3LH / len(repeated_NT)).cpu(), strict=True))


def residuals(model: Any, tokens_NT: Tensor, positions: Tensor) -> Tensor:
    """(G, N, P, D) float32: the residual stream after the embedding and every block, at the probed positions."""
    config = model.config
    names = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(config.layers))]
    place = {name: i for i, name in enumerate(names)}
    out = torch.empty(len(names), len(tokens_NT), len(positions), config.d_model, device=tokens_NT.device)
    for rows in batches(model, *tokens_NT.shape):

        def keep(x_BTD: Tensor, point: Any, rows: slice = rows) -> None:
            out[place[point.name], rows] = x_BTD[:, positions].float()

        model.watch(tokens_NT[rows].long(), [(name, keep) for name in names])
    return out


SHOWN = 64
"""Largest side of an example pattern."""


def example_patterns(model: Any, tokens_T: Tensor) -> Tensor:
    """(L, H, t, t) uint8, t <= SHOWN: one sequence's attention to look at, averaged over blocks of tokens.

    Each row's largest weight is 255 and the scale is a square root, so that faint structure shows.
    """
    block = -(-len(tokens_T) // SHOWN)
    length = len(tokens_T) // block * block
    out: list[Tensor] = []

    def see(layer: int, pattern_BHTS: Tensor) -> None:
        mean = torch.nn.functional.avg_pool2d(pattern_BHTS[0].float(), block)
        out.append((255 * (mean / mean.amax(-1, keepdim=True)).sqrt()).round().to(torch.uint8).cpu())

    watch_patterns(model, tokens_T[None, :length].long(), see)
    return torch.stack(out)
