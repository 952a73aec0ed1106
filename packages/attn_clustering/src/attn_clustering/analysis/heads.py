"""Known kinds of heads, scored on repeated random sequences.

Shape suffixes: B sequences, H heads, T query positions, S key positions; T = 2 n.

A random sequence of n tokens is followed by itself. In the second half a previous-token head looks 1 back, a
duplicate-token head n back (the same token), an induction head n - 1 back (the token that followed it).
Source: Olsson et al., In-context Learning and Induction Heads (2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("previous_token", "duplicate_token", "induction")


def repeated_random(tokens_NT: Tensor, length: int, n_sequences: int, seed: int = 0) -> Tensor:
    """(n_sequences, 2 length) tokens drawn independently from those of held-out sequences, then repeated."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(tokens_NT.numel(), (n_sequences, length), generator=generator)
    first = tokens_NT.reshape(-1)[index.to(tokens_NT.device)].long()
    return torch.cat([first, first], 1)


def head_scores(pattern_BHTS: Tensor) -> Tensor:
    """(3, H) mean attention of the second half's queries at the lags of `KINDS`; uniform causal attention has about
    ln 2 / n of each."""
    n = pattern_BHTS.size(-1) // 2
    scores = [
        pattern_BHTS.float().diagonal(-lag, dim1=-2, dim2=-1)[..., n - lag :].mean((0, 2)) for lag in (1, n, n - 1)
    ]
    return torch.stack(scores)
