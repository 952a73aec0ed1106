"""Where the pulse model finds each pulse: rows of whole DOMs, laid out without a loop over DOMs or events.

Shape suffixes: P pulses in grouped order, D hit DOMs, R rows, B mini-batches, C rows of a mini-batch.

Attention sees a DOM's pulses only, so that DOMs need no padding between them: those with two or more pulses stand one
after the other, in at most `max_batch_size` x 512 rows at a time, and a DOM of more than 512 pulses is several equal
chunks. Behind them come the DOMs with a single pulse, most of all DOMs, for which attention does nothing: the softmax
over one key is 1. The first B x C rows are for attention; singles that stand there are segments of one row, and all
rows behind are singles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from lab_shared.errors import UserError
from torch import Tensor

from iceaggr.data.grouping import Doms

SEQUENCE = 512
"""Pulses that attend to each other at most: the length of the seed's packed sequences."""


@dataclass(frozen=True)
class RowPlan:
    """Numbers in host memory, from which all shapes follow."""

    batches: int
    """B, mini-batches for attention."""
    batch_rows: int
    """C."""
    rows: int
    """R, at least B C."""


def plan_rows(n_pulses: int, n_attended: int, max_batch_size: int | None) -> RowPlan:
    """The layout for at most n_pulses pulses, at most n_attended of them in DOMs with two or more.

    Mini-batch b takes the chunks that begin in [b s, (b + 1) s) of the attended pulses with s = C - 511, so that any
    chunk fits: of its C = 512 max_batch_size rows about 511 stay empty. One mini-batch has no empty rows. There is
    always a row for attention, so that every parameter has a gradient.

    Raises:
        UserError: max_batch_size is below 2.
    """
    if max_batch_size is not None and max_batch_size < 2:
        raise UserError(f"model.max_batch_size is {max_batch_size}; it must be at least 2, or None for no limit")
    n_attended = max(n_attended, 1)
    if max_batch_size is None or n_attended <= SEQUENCE * max_batch_size:
        return RowPlan(1, n_attended, max(n_pulses, n_attended))
    batch_rows = SEQUENCE * max_batch_size
    empty = SEQUENCE - 1
    batches = -(-n_attended // (batch_rows - empty))
    return RowPlan(batches, batch_rows, max(batches * batch_rows, n_pulses + empty * (batches - 1)))


def attended_bound(n_pulses_E: np.ndarray, n_doms_E: np.ndarray) -> np.ndarray:
    """(E,) int64, most pulses that each event can have in DOMs with two or more: min(P, 2 (P - D)).

    Every such DOM takes two pulses of the P - D that are not the first of their DOM, or more. Known without looking at
    the pulses, and exact where no DOM has more than two.
    """
    pulses_E = n_pulses_E.astype(np.int64)
    return np.minimum(pulses_E, 2 * (pulses_E - n_doms_E.astype(np.int64)))


def count_attended(doms: Doms) -> int:
    """Pulses in DOMs with two or more; reads a number from the pulses' device."""
    return int((doms.count_D * (doms.count_D > 1)).sum())


def lay_out(doms: Doms, plan: RowPlan) -> tuple[Tensor, Tensor]:
    """row_P (int64), the row of each pulse in grouped order, and offsets_BK (int32, K = C + 1).

    Row b of offsets_BK are the offsets of mini-batch b's segments, as `Mask.segments` takes them; they end in repeats
    of the mini-batch's used rows. No host synchronisation.
    """
    count_P = doms.count_D.index_select(0, doms.dom_of_pulse_P)
    several_P = count_P > 1
    several_D = torch.where(doms.count_D > 1, doms.count_D, 0)
    first_P = (several_D.cumsum(0) - several_D).index_select(0, doms.dom_of_pulse_P)
    # Chunk j of n is slots ceil(j count / n) to ceil((j + 1) count / n): within one of each other in length.
    chunks_P = torch.div(count_P + (SEQUENCE - 1), SEQUENCE, rounding_mode="floor")
    chunk_P = torch.div(doms.slot_P * chunks_P, count_P, rounding_mode="floor")
    head_P = torch.div(chunk_P * count_P + chunks_P - 1, chunks_P, rounding_mode="floor")
    # Where the pulse's chunk begins among the attended pulses; a single has the place of what follows it.
    begin_P = first_P + head_P

    stride = plan.batch_rows - (SEQUENCE - 1) if plan.batches > 1 else plan.batch_rows
    batch_P = torch.div(begin_P, stride, rounding_mode="floor").clamp(max=plan.batches - 1)
    border_B = torch.arange(plan.batches, device=begin_P.device) * stride
    lowest_B = begin_P.index_select(0, torch.searchsorted(begin_P, border_B).clamp(max=begin_P.numel() - 1))
    row_P = batch_P * plan.batch_rows + first_P + doms.slot_P - lowest_B.index_select(0, batch_P)
    behind = torch.where(several_P, row_P, -1).amax() + 1
    row_P = torch.where(several_P, row_P, behind + several_P.logical_not().cumsum(0) - 1)

    marks_2R = torch.zeros(2, plan.rows, dtype=torch.int32, device=row_P.device)
    marks_2R[0].index_fill_(0, row_P, 1)
    marks_2R[1].index_copy_(0, row_P, (head_P == doms.slot_P).to(torch.int32))
    used_BC, heads_BC = marks_2R[:, : plan.batches * plan.batch_rows].view(2, plan.batches, plan.batch_rows)
    # Rows that head no segment write to a spare place that is cut off.
    place_BC = torch.where(heads_BC > 0, heads_BC.cumsum(1) - 1, plan.batch_rows + 1)
    row_C = torch.arange(plan.batch_rows, dtype=torch.int32, device=row_P.device)
    offsets_BK = used_BC.sum(1, dtype=torch.int32)[:, None].repeat(1, plan.batch_rows + 2)
    offsets_BK.scatter_(1, place_BC, row_C.expand(plan.batches, -1))
    return row_P, offsets_BK[:, :-1]
