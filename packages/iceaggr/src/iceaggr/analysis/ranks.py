"""Rank correlation inside events, on packed rows: Spearman's rho of every event at once, without a loop over events.

Shape suffixes: R rows of all events in a row, E events, C, A and B columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranks_within(values_RC: Tensor, event_R: Tensor) -> Tensor:
    """Rank (from 0, float64) of each value among those of its column and event; equal values share their mean rank.

    event_R: int64, not decreasing. Source: Kendall, Rank Correlation Methods (1948), chapter 3 on ties.
    """
    if not values_RC.numel():
        return values_RC.to(torch.float64)
    order_RC = values_RC.argsort(dim=0, stable=True)
    order_RC = order_RC.gather(0, event_R[order_RC].argsort(dim=0, stable=True))
    sorted_RC = values_RC.gather(0, order_RC)
    new_RC = torch.ones_like(sorted_RC, dtype=torch.int64)
    # Sorted, every event keeps its own stretch of rows, so the events of sorted rows are event_R again.
    new_RC[1:] = (sorted_RC[1:] != sorted_RC[:-1]) | (event_R[1:] != event_R[:-1])[:, None]
    group_RC = new_RC.cumsum(0) - 1
    place_RC = torch.arange(len(event_R), device=event_R.device, dtype=torch.float64)[:, None].expand_as(group_RC)
    sums_RC = torch.zeros_like(place_RC).scatter_add(0, group_RC, place_RC)
    counts_RC = torch.zeros_like(place_RC).scatter_add(0, group_RC, torch.ones_like(place_RC))
    mean_RC = (sums_RC / counts_RC).gather(0, group_RC)
    first_R = torch.searchsorted(event_R, event_R)
    return torch.empty_like(mean_RC).scatter_(0, order_RC, mean_RC) - first_R[:, None]


def spearman_within(ranks_RA: Tensor, ranks_RB: Tensor, event_R: Tensor, n_events: int) -> Tensor:
    """Spearman's rho of every column of A with every column of B in each event, (E, A, B) float64.

    Takes ranks (`ranks_within`). NaN where an event has fewer than two rows or all its values in a column are equal.
    """
    rows_E1 = torch.bincount(event_R, minlength=n_events)[:, None]

    def sums(x: Tensor) -> Tensor:
        return x.new_zeros(n_events, *x.shape[1:]).index_add_(0, event_R, x)

    def centred(x_RC: Tensor) -> Tensor:
        return x_RC - (sums(x_RC) / rows_E1)[event_R]

    a_RA, b_RB = centred(ranks_RA), centred(ranks_RB)
    covariance_EAB = sums(a_RA[:, :, None] * b_RB[:, None, :])
    variance_EAB = sums(a_RA**2)[:, :, None] * sums(b_RB**2)[:, None, :]
    return torch.where(variance_EAB > 0, covariance_EAB / variance_EAB.sqrt(), torch.nan)
