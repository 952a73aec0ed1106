"""All zeros of Z on a run of blocks: sample, bracket, look into near misses, polish.

Each block is cut into pieces 2 wide with a Chebyshev series of some 30 terms each; one matrix product takes Z from the
block's nodes to all those series, another one to equidistant samples, 8 or more per mean gap. Between neighbouring
samples of opposite sign lies a zero, which Newton's method inside that bracket finds. A pair of zeros can hide between
samples: then |Z| has a minimum among samples of one sign, and as |Z| has none above zero (it would contradict the
Riemann hypothesis), every such minimum is followed down and, where it crosses, gives the two zeros.

Shape suffixes: B blocks, Q pieces of all blocks, S samples of a piece, D series terms, N zeros or candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rh_memory.zeros.chebyshev import evaluate
from rh_memory.zeros.layout import LOW, WIDTH, Layout, layout, terms_at
from rh_memory.zeros.riemann_siegel import Blocks, hardy_z

_LEVEL = 1.6
"""Blocks whose heights lie within this ratio share a layout."""
_MOST_STEPS = 80


def find_zeros(
    lower: int, blocks: int, device: torch.device, samples_per_gap: float = 8.0
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """(centre_N, offset_N, counts): all zeros found between lower and lower + 32 blocks, ascending.

    lower: an integer >= 8. counts: `near_misses`, the minima of |Z| looked into, and `hidden_pairs`, those that
    crossed.
    """
    centres = lower + WIDTH * np.arange(blocks) + WIDTH / 2
    found = []
    for first, last, shared in _batches(centres, samples_per_gap, device):
        # One block more on either side: brackets and minima at the border need its samples.
        begin, end = max(first - 1, 0), min(last + 1, blocks)
        found.append(_zeros_of_batch(Blocks(centres[begin:end], device), shared, first - begin, last - begin))
    centre_N, offset_N, near_misses, hidden_pairs = zip(*found, strict=True)
    counts = {"near_misses": sum(near_misses), "hidden_pairs": sum(hidden_pairs)}
    return torch.cat(centre_N), torch.cat(offset_N), counts


def _batches(centres: np.ndarray, samples_per_gap: float, device: torch.device) -> Iterator[tuple[int, int, Layout]]:
    """(first, last, layout) of runs of blocks that share a layout and fit the device's cache or memory."""
    level = np.ceil(np.log(np.maximum((centres + 2 * WIDTH) / LOW, 1)) / math.log(_LEVEL)).astype(int)
    level[centres < LOW] = -1
    borders = [0, *(np.flatnonzero(np.diff(level)) + 1), len(centres)]
    for first, last in pairwise(borders):
        low = level[first] < 0
        top = LOW + 2.0 * WIDTH if low else LOW * _LEVEL ** int(level[first])
        shared = layout(top, bool(low), samples_per_gap, device)
        size = max(64, (1 << 25) // max(terms_at(top), 1024)) if device.type == "cuda" else 256
        for begin in range(first, last, size):
            yield begin, min(begin + size, last), shared


def _zeros_of_batch(blocks: Blocks, shared: Layout, first: int, last: int) -> tuple[Tensor, Tensor, int, int]:
    """(centre_N, offset_N, near misses, hidden pairs) of blocks first..last-1; the others only lend their samples."""
    degree, samples = shared.to_samples_DS.shape
    series_QD = (hardy_z(blocks, shared) @ shared.to_pieces_KPD).view(-1, degree)
    z = (series_QD @ shared.to_samples_DS).view(-1)
    positive = z > 0
    per_block = len(shared.piece_P) * samples
    core = slice(first * per_block, last * per_block)

    crosses = positive.clone()
    crosses[:-1] ^= positive[1:]
    crosses[-1] = False
    cell = crosses[core].nonzero().squeeze(1) + core.start

    size = z.abs()
    lowest = torch.zeros_like(positive)
    lowest[1:-1] = (size[1:-1] < size[:-2]) & (size[1:-1] <= size[2:])
    lowest[1:-1] &= ~(crosses[:-2] | crosses[1:-1])
    candidate = lowest[core].nonzero().squeeze(1) + core.start

    def piece_and_place(sample: Tensor) -> tuple[Tensor, Tensor]:
        """Piece, and the sample's place in it in units of radius."""
        place = (sample % samples) * shared.spacing - 1 / (1 + 2 / samples)
        return sample // samples, place

    piece, left = piece_and_place(cell)
    right, start = left + shared.spacing, left + shared.spacing * _cubic_root(z, cell)
    below = positive[cell]

    miss, place = piece_and_place(candidate)
    series_ND = series_QD.index_select(0, miss)
    series_DN, slope_DN = series_ND.T.contiguous(), (series_ND @ shared.derivative_DD).T.contiguous()
    lowest_x = newton(slope_DN, place - shared.spacing, place + shared.spacing, place, ~positive[candidate])
    least, _ = evaluate(series_DN, lowest_x)
    pair = ((least > 0) != positive[candidate]).nonzero().squeeze(1)
    miss, place, lowest_x, side = miss[pair], place[pair], lowest_x[pair], positive[candidate[pair]]

    piece = torch.cat([piece, miss, miss])
    left = torch.cat([left, place - shared.spacing, lowest_x])
    right = torch.cat([right, lowest_x, place + shared.spacing])
    start = torch.cat([start, lowest_x - 0.25 * shared.spacing, lowest_x + 0.25 * shared.spacing])
    below = torch.cat([below, side, ~side])
    x = newton(series_QD.index_select(0, piece).T.contiguous(), left, right, start, below)

    block = piece // len(shared.piece_P)
    offset = shared.piece_P[piece % len(shared.piece_P)] + shared.radius * x
    order = torch.argsort(block * WIDTH + offset)
    return blocks.centre[block][order], offset[order], len(candidate), len(pair)


def _cubic_root(z: Tensor, cell: Tensor) -> Tensor:
    """Where in [0, 1] the cubic through samples cell-1..cell+2 vanishes between cell and cell+1, roughly."""
    last = len(z) - 1
    a, b, c, d = (z.index_select(0, (cell + i).clamp(0, last)) for i in (-1, 0, 1, 2))
    c1, c2, c3 = (-2 * a - 3 * b + 6 * c - d) / 6, (a - 2 * b + c) / 2, (d - a + 3 * (b - c)) / 6
    u = line = b / (b - c)
    for _ in range(3):
        u = u - (((c3 * u + c2) * u + c1) * u + b) / ((3 * c3 * u + 2 * c2) * u + c1)
    return torch.where((u > 0) & (u < 1), u, line)


def newton(series_DN: Tensor, left_N: Tensor, right_N: Tensor, start_N: Tensor, positive_N: Tensor) -> Tensor:
    """The zero of each series inside its bracket: Newton's method, bisection where that would leave the bracket.

    positive_N: whether the series is positive at the left end (and not at the right one). Zeros that have converged
    drop out, so the last steps of the few slow ones cost little.
    """
    result, todo = start_N.clone(), None
    left, right, x, positive = left_N, right_N, start_N, positive_N
    x = torch.where((x > left) & (x < right), x, (left + right) / 2)
    before = torch.full_like(x, math.inf)
    for i in range(_MOST_STEPS):
        value, slope = evaluate(series_DN, x)
        at_left = (value > 0) == positive
        left, right = torch.where(at_left, x, left), torch.where(at_left, right, x)
        new = x - value / slope
        new = torch.where((new >= left) & (new <= right), new, (left + right) / 2)
        moved = (new - x).abs()
        x = new
        if i == 0:
            before = moved
            continue
        # Convergence is quadratic: the error left is about moved^2 (moved / before^2).
        going = ~((moved**3 < 1e-16 * before**2) | (moved < 4e-16))
        before = moved
        result = x.clone() if todo is None else result.index_copy(0, todo, x)
        still = going.nonzero().squeeze(1)
        if not len(still):
            break
        todo = still if todo is None else todo[still]
        left, right, x, before, positive = (v.index_select(0, still) for v in (left, right, x, before, positive))
        series_DN = series_DN.index_select(1, still)
    return result
