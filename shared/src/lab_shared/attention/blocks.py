"""FlexAttention block lists by arithmetic on intervals: no T x T tensor, no host synchronisation.

`create_block_mask` evaluates the mask on every pair of tokens (hundreds of ms at 230k tokens). Here each
block of 128 queries needs four numbers: with [lo, hi) the keys one query sees, the block sees nothing outside
[min lo, max hi), and every one of its queries sees all of [max lo, min hi). Key blocks inside the second
range are full (no mask is evaluated there), the rest of the first range is partial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from lab_shared.attention.masks import Spans

BLOCK = 128


class Blocks(NamedTuple):
    """The eight tensors of a BlockMask, int32, (1, 1, N) counts and (1, 1, N, N) indices. Entries of an index
    row past its count are in range and meaningless."""

    kv_num: Tensor
    kv_index: Tensor
    full_kv_num: Tensor
    full_kv_index: Tensor
    q_num: Tensor
    q_index: Tensor
    full_q_num: Tensor
    full_q_index: Tensor


def n_blocks(total: int) -> int:
    return -(-total // BLOCK)


def blocks_from_spans(spans: Spans, spans_by_key: Spans | None, total: int) -> Blocks:
    """Block lists for `total` tokens (any number; an incomplete last block is never full).

    spans_by_key gives the transposed lists, which the backward pass walks, by the same arithmetic; where the
    queries of a key are no interval (None) they come from a matrix of blocks, 1/16384 of T x T.
    """
    if spans_by_key is None:
        partial_NN, full_NN = _block_matrices(spans, total)
        kv = (*_ordered(partial_NN), *_ordered(full_NN))
        q = (*_ordered(partial_NN.mT), *_ordered(full_NN.mT))
    else:
        kv = _interval_lists(spans, total)
        q = kv if spans_by_key is spans else _interval_lists(spans_by_key, total)
    return Blocks(*(x[None, None] for x in (*kv, *q)))


def all_partial(n_query: int, n_key: int, device: torch.device) -> Blocks:
    """Every block visited, its mask evaluated: for dense masks, whose sparsity nobody knows."""
    rows, columns = n_blocks(n_query), n_blocks(n_key)

    def lists(n_rows: int, n_columns: int) -> tuple[Tensor, ...]:
        num = torch.full((1, 1, n_rows), n_columns, dtype=torch.int32, device=device)
        index = (
            torch.arange(n_columns, dtype=torch.int32, device=device).expand(1, 1, n_rows, -1).contiguous()
        )
        return num, index, torch.zeros_like(num), torch.zeros_like(index)

    return Blocks(*lists(rows, columns), *lists(columns, rows))


def _block_ranges(lo_T: Tensor, hi_T: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """first, last of the visible and of the full blocks of each row of blocks (half-open; may be empty)."""
    missing = n_blocks(total) * BLOCK - total
    # Rows past the end see nothing: that leaves min lo and max hi alone and makes their block not full.
    lo_NB = F.pad(lo_T, (0, missing), value=total).view(-1, BLOCK)
    hi_NB = F.pad(hi_T, (0, missing), value=0).view(-1, BLOCK)
    lo_min_N, lo_max_N = lo_NB.aminmax(dim=1)
    hi_min_N, hi_max_N = hi_NB.aminmax(dim=1)
    return (
        lo_min_N // BLOCK,
        (hi_max_N + BLOCK - 1) // BLOCK,
        (lo_max_N + BLOCK - 1) // BLOCK,
        hi_min_N // BLOCK,
    )


def _interval_lists(spans: Spans, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first_N, last_N, full_first_N, full_last_N = _block_ranges(spans.lo_T, spans.hi_T, total)
    n_full_N = (full_last_N - full_first_N).clamp_(min=0)
    n_partial_N = (last_N - first_N - n_full_N).clamp_(min=0)
    column_N = torch.arange(first_N.numel(), dtype=torch.int32, device=first_N.device)
    # The partial blocks are those left of the full range, then those right of it.
    skip_NN = torch.where(column_N >= (full_first_N - first_N)[:, None], n_full_N[:, None], 0)
    partial_NN = (skip_NN + column_N).add_(first_N[:, None]).clamp_(max=column_N.numel() - 1)
    full_NN = (full_first_N[:, None] + column_N).clamp_(max=column_N.numel() - 1)
    return n_partial_N, partial_NN, n_full_N, full_NN


def _block_matrices(spans: Spans, total: int) -> tuple[Tensor, Tensor]:
    """(partial, full) bool matrices of blocks for spans of two intervals; partial may include a few blocks
    that nobody sees, and a block covered only by both intervals together counts as partial: both are only
    slower."""
    column_N = torch.arange(n_blocks(total), dtype=torch.int32, device=spans.lo_T.device)
    seen_NN = full_NN = torch.zeros((), dtype=torch.bool, device=spans.lo_T.device)
    for lo_T, hi_T in spans.intervals():
        first_N, last_N, full_first_N, full_last_N = _block_ranges(lo_T, hi_T, total)
        seen_NN = seen_NN | ((column_N >= first_N[:, None]) & (column_N < last_N[:, None]))
        full_NN = full_NN | ((column_N >= full_first_N[:, None]) & (column_N < full_last_N[:, None]))
    return seen_NN & ~full_NN, full_NN


def _ordered(chosen_NN: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and leading column indices of the True entries of each row."""
    n_rows, n_columns = chosen_NN.shape
    column_NN = torch.arange(n_columns, dtype=torch.int32, device=chosen_NN.device).expand(n_rows, -1)
    # Unchosen columns are written to a spare place behind the row.
    place_NN = torch.where(chosen_NN, chosen_NN.cumsum(-1) - 1, n_columns)
    index_NN = column_NN.new_zeros(n_rows, n_columns + 1).scatter_(-1, place_NN, column_NN)
    return chosen_NN.sum(-1, dtype=torch.int32), index_NN[:, :n_columns].contiguous()
