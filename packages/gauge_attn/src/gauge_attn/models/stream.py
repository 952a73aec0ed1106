"""Equivariant layers on a residual stream of irreps, and what can be read from it without choosing a gauge.

A stream maps l to a tensor: x[0] (B, N, S) are S scalars per token, x[l] (B, N, d, C_l) are C_l copies of the irrep l,
d = 2l + 1, side by side, so that maps between copies are plain matrix products. A rotation g_i of token i's frame sends
x[l] to D^l(g_i) x[l] and leaves x[0]; every function here commutes with that, or does not change under it where it says
invariant.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lab_shared.norms import rms_norm
from torch import Tensor, nn
from torch.nn import functional as F

from gauge_attn.models.layers import constant, matrix

Stream = dict[int, Tensor]


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class EquivariantNorm(nn.Module):
    """x[l] / sqrt(mean over its copies and components of x^2 + eps), times a gain per copy.

    channels: l -> number of copies, S for l = 0.
    """

    def __init__(self, channels: Mapping[int, int]) -> None:
        super().__init__()
        self.gains = nn.ParameterDict({str(l): constant(c, value=1.0, role="vector") for l, c in channels.items()})

    def forward(self, x: Stream) -> Stream:
        normed = {0: rms_norm(wide(x[0])) * self.gains["0"]}
        for l, x_BNdC in x.items():
            if l:
                normed[l] = rms_norm(wide(x_BNdC).flatten(-2)).view_as(x_BNdC) * self.gains[str(l)]
        return normed


def mix(x: Tensor, weight: Tensor) -> Tensor:
    """Linear maps between copies, the same for every component (Schur's lemma leaves no others).

    x (B, N, d, C) and weight (C', C) give (B, N, d, C').
    """
    return F.linear(x, weight)


class Invariants(nn.Module):
    """All that is gauge-invariant and at most quadratic, as one vector: (B, N, S + sum_l C_l).

    The scalars, and for every copy c of l > 0 its inner product with a learned mixture, <x_c, sum_c' M_cc' x_c'> /
    sqrt(d). M starts at the identity, which makes them squared lengths.
    """

    def __init__(self, channels: Mapping[int, int]) -> None:
        super().__init__()
        self.width = sum(channels.values())
        self.mixtures = nn.ParameterDict({str(l): matrix(c, c, gain=0.0) for l, c in channels.items() if l})
        with torch.no_grad():
            for weight in self.mixtures.values():
                weight.copy_(torch.eye(len(weight)))

    def forward(self, x: Stream) -> Tensor:
        parts = [x[0]]
        for l, x_BNdC in x.items():
            if l:
                mixed = mix(x_BNdC, self.mixtures[str(l)])
                parts.append((x_BNdC * mixed).sum(-2) / (2 * l + 1) ** 0.5)
        return torch.cat([part.to(x[0].dtype) for part in parts], -1)


class GatedMLP(nn.Module):
    """Scalars through a GELU layer; copies of l > 0 mixed among each other and multiplied by invariant gates.

    hidden: width between the two matrices, whose second one starts near zero.
    """

    def __init__(self, channels: Mapping[int, int], hidden: int) -> None:
        super().__init__()
        self.widths = dict(channels)
        self.invariants = Invariants(channels)
        self.up = matrix(hidden, self.invariants.width)
        self.down = matrix(sum(channels.values()), hidden, gain=0.1)
        self.mixers = nn.ParameterDict({str(l): matrix(c, c) for l, c in channels.items() if l})

    def forward(self, x: Stream) -> Stream:
        out = F.linear(F.gelu(F.linear(self.invariants(x), self.up)), self.down)
        parts = dict(zip(self.widths, out.split(list(self.widths.values()), -1), strict=True))
        update = {0: parts[0]}
        for l, gate_BNC in parts.items():
            if l:
                update[l] = gate_BNC.unsqueeze(-2) * mix(x[l], self.mixers[str(l)])
        return update


def add(x: Stream, update: Mapping[int, Tensor]) -> Stream:
    """The residual connection."""
    return {l: value + update[l] if l in update else value for l, value in x.items()}
