"""FlexAttention block lists by arithmetic on intervals: no T x T tensor, no host synchronisation.

`create_block_mask` evaluates the mask on every pair of tokens (hundreds of ms at 230k tokens). Here each
block of queries needs four numbers: with [lo, hi) the keys one query sees, the block sees nothing outside
[min lo, max hi), and every one of its queries sees all of [max lo, min hi). Key blocks inside the second
range are full (no mask is evaluated there), the rest of the first range is partial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from lab_shared.attention.masks import Spans

BLOCK = 128
FINE_BLOCK = 64
"""For packed segments: they are shorter than 128 more often than not, and half of a larger block is wasted (on an
H200 forward and backward took 2.0 instead of 3.3 ms at 2^18 tokens, 8 heads of 32: results/bench)."""
FINE_MAX_DIM = 64
"""Heads of this size or more get kernels whose tiles are larger than a fine block."""
FINE_KERNEL: Any = {
    "BLOCK_M": 64,
    "BLOCK_N": 64,
    "BLOCK_M1": 32,
    "BLOCK_N1": 64,
    "BLOCK_M2": 64,
    "BLOCK_N2": 32,
}
"""FlexAttention's tile sizes that go with FINE_BLOCK: forward, then the two halves of the backward pass."""


class Blocks(NamedTuple):
    """The eight tensors of a BlockMask, int32: counts (1, 1, N) and indices (1, 1, N, W), W <= N being the most that a
    row needs. Entries of an index row past its count are in range and meaningless.

    fine: blocks of FINE_BLOCK tokens instead of BLOCK. A bool and not the size, because torch.compile would make a
    changing integer symbolic.
    """

    kv_num: Tensor
    kv_index: Tensor
    full_kv_num: Tensor
    full_kv_index: Tensor
    q_num: Tensor
    q_index: Tensor
    full_q_num: Tensor
    full_q_index: Tensor
    fine: bool = False

    @property
    def size(self) -> int:
        return FINE_BLOCK if self.fine else BLOCK


def n_blocks(total: int, size: int = BLOCK) -> int:
    return -(-total // size)


def blocks_from_spans(
    spans: Spans, spans_by_key: Spans | None, total: int, *, fine: bool = False, max_span: int | None = None
) -> Blocks:
    """Block lists for `total` tokens (any number; an incomplete last block is never full).

    max_span: no token's interval is longer than this and none reaches past its own segment; it bounds the length of
    the lists, which are otherwise as long as there are blocks.

    spans_by_key gives the transposed lists, which the backward pass walks, by the same arithmetic; where the
    queries of a key are no interval (None) they come from a matrix of blocks, 1/16384 of T x T.
    """
    size = FINE_BLOCK if fine else BLOCK
    # A block of queries touches segments that begin before it and others that end behind it.
    width = n_blocks(total, size)
    if max_span is not None:
        width = min(width, 2 * n_blocks(max_span, size) + 1)
    if spans_by_key is None:
        partial_NN, full_NN = _block_matrices(spans, total, size)
        kv = (*_ordered(partial_NN), *_ordered(full_NN))
        q = (*_ordered(partial_NN.mT), *_ordered(full_NN.mT))
    else:
        kv = _interval_lists(spans, total, size, width)
        q = kv if spans_by_key is spans else _interval_lists(spans_by_key, total, size, width)
    lists: Any = {name: x[None, None] for name, x in zip(Blocks._fields, (*kv, *q), strict=False)}
    return Blocks(**lists, fine=fine)


def all_partial(n_query: int, n_key: int, device: torch.device) -> Blocks:
    """Every block visited, its mask evaluated: for dense masks, whose sparsity nobody knows."""
    rows, columns = n_blocks(n_query), n_blocks(n_key)

    def lists(n_rows: int, n_columns: int) -> tuple[Any, ...]:
        num = torch.full((1, 1, n_rows), n_columns, dtype=torch.int32, device=device)
        index = torch.arange(n_columns, dtype=torch.int32, device=device).expand(1, 1, n_rows, -1).contiguous()
        return num, index, torch.zeros_like(num), torch.zeros_like(index)

    return Blocks(*lists(rows, columns), *lists(columns, rows))


def _block_ranges(lo_T: Tensor, hi_T: Tensor, total: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """first, last of the visible and of the full blocks of each row of blocks (half-open; may be empty)."""
    missing = n_blocks(total, size) * size - total
    # Rows past the end see nothing: that leaves min lo and max hi alone and makes their block not full.
    lo_NB = F.pad(lo_T, (0, missing), value=total).view(-1, size)
    hi_NB = F.pad(hi_T, (0, missing), value=0).view(-1, size)
    lo_min_N, lo_max_N = lo_NB.aminmax(dim=1)
    hi_min_N, hi_max_N = hi_NB.aminmax(dim=1)
    return (
        lo_min_N // size,
        (hi_max_N + size - 1) // size,
        (lo_max_N + size - 1) // size,
        hi_min_N // size,
    )


def _interval_lists(spans: Spans, total: int, size: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first_N, last_N, full_first_N, full_last_N = _block_ranges(spans.lo_T, spans.hi_T, total, size)
    n_full_N = (full_last_N - full_first_N).clamp_(min=0)
    n_partial_N = (last_N - first_N - n_full_N).clamp_(min=0)
    final = first_N.numel() - 1
    column_W = torch.arange(width, dtype=torch.int32, device=first_N.device)
    # The partial blocks are those left of the full range, then those right of it.
    skip_NW = torch.where(column_W >= (full_first_N - first_N)[:, None], n_full_N[:, None], 0)
    partial_NW = (skip_NW + column_W).add_(first_N[:, None]).clamp_(max=final)
    full_NW = (full_first_N[:, None] + column_W).clamp_(max=final)
    return n_partial_N, partial_NW, n_full_N, full_NW


def _block_matrices(spans: Spans, total: int, size: int) -> tuple[Tensor, Tensor]:
    """(partial, full) bool matrices of blocks for spans of two intervals; partial may include a few blocks
    that nobody sees, and a block covered only by both intervals together counts as partial: both are only
    slower."""
    column_N = torch.arange(n_blocks(total, size), dtype=torch.int32, device=spans.lo_T.device)
    seen_NN = full_NN = torch.zeros((), dtype=torch.bool, device=spans.lo_T.device)
    for lo_T, hi_T in spans.intervals():
        first_N, last_N, full_first_N, full_last_N = _block_ranges(lo_T, hi_T, total, size)
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
