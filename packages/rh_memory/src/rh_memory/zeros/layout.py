"""What all blocks of a range of heights share: nodes, the main sum's factors, and the matrices from nodes to pieces.

Shape suffixes: B blocks, M terms of the main sum, K nodes of a block, F few nodes for smooth functions, P pieces of a
block, D series terms of a piece, S samples of a piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rh_memory.zeros.chebyshev import basis, derivative, nodes, terms, values_to_pieces, values_to_series
from rh_memory.zeros.theta import log_turns, turns

WIDTH = 32
"""Width of a block in t."""
LOW = 3016
"""Blocks whose centre is below this use Euler-Maclaurin: five terms of Riemann-Siegel leave about 0.02 t^-2.75 in Z."""
_EULER_MACLAURIN_TERMS = 1536
_PIECES = 16
_FEW = 16


class Sum:
    """The factors of the main sum that blocks share: sum_n n^{-1/2} e^{-i (c + d) log n} at d = node_K."""

    def __init__(self, terms: int, node_K: Tensor) -> None:
        device = node_K.device
        high, low = log_turns(terms)
        self.high, self.low = torch.tensor(high, device=device), torch.tensor(low, device=device)
        self.n = torch.arange(1, terms + 1, device=device, dtype=torch.float64)
        self.node_MK = unit(-turns(node_K, self.high[:, None], self.low[:, None]))

    def __call__(self, centre_B: Tensor, terms_B: Tensor, top: int) -> Tensor:
        """(B, K) complex; block b sums n = 1..terms_B[b] <= top."""
        centre_BM = unit(-turns(centre_B[:, None], self.high[:top], self.low[:top]))
        # Terms of other blocks count zero, so that blocks with different m share the product.
        weight_BM = torch.where(self.n[:top] <= terms_B[:, None], self.n[:top].rsqrt(), 0.0)
        return (centre_BM * weight_BM) @ self.node_MK[:top]


@dataclass(frozen=True, eq=False)
class Layout:
    """The matrices that the blocks below a height share; d = t - c is the place in a block."""

    euler_maclaurin: bool
    node_K: Tensor  # d of the nodes
    main_sum: Sum
    few_F: Tensor  # d where the remainder of Riemann-Siegel is computed
    few_to_nodes_FK: Tensor
    to_pieces_KPD: Tensor  # (K, P*D): values at the nodes to the series of the pieces
    piece_P: Tensor  # d of the middle of each piece
    radius: float  # half-width that a piece's series covers: one sample more than the piece, on both sides
    to_samples_DS: Tensor
    derivative_DD: Tensor
    spacing: float  # of the samples, in units of radius


@lru_cache(maxsize=4)
def layout(top: float, euler_maclaurin: bool, samples_per_gap: float, device: torch.device) -> Layout:
    """The matrices for blocks below the height `top`, with at least `samples_per_gap` samples per mean gap."""
    width = WIDTH / _PIECES
    frequency = math.log(top / (2 * math.pi)) / 2  # theta': Z oscillates no faster
    samples = math.ceil(samples_per_gap * width * frequency / math.pi)
    step = width / samples
    reach, radius = WIDTH / 2 + step, width / 2 + step
    count, degree = terms(frequency * reach), terms(frequency * radius)
    with torch.device(device):
        piece_P = (torch.arange(_PIECES, dtype=torch.float64) + 0.5) * width - WIDTH / 2
        sample_S = (-width / 2 + step * torch.arange(samples, dtype=torch.float64)) / radius
        few_to_nodes_FK = (basis(nodes(count), _FEW) @ values_to_series(_FEW).T).T.contiguous()
        node_K = reach * nodes(count)
        return Layout(
            euler_maclaurin=euler_maclaurin,
            node_K=node_K,
            main_sum=Sum(_EULER_MACLAURIN_TERMS if euler_maclaurin else terms_at(top), node_K),
            few_F=(reach * nodes(_FEW)),
            few_to_nodes_FK=few_to_nodes_FK,
            to_pieces_KPD=values_to_pieces(count, piece_P / reach, radius / reach, degree),
            piece_P=piece_P,
            radius=radius,
            to_samples_DS=basis(sample_S, degree).T.contiguous(),
            derivative_DD=derivative(degree),
            spacing=step / radius,
        )


def terms_at(height: float) -> int:
    """m = floor(sqrt(t / 2 pi))."""
    return math.floor(math.sqrt(height / (2 * math.pi)))


def unit(turns: Tensor) -> Tensor:
    """e^{2 pi i turns}, complex128."""
    angle = turns * (2 * math.pi)
    return torch.complex(torch.cos(angle), torch.sin(angle))
