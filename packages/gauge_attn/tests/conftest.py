"""Random beliefs for the tests of the mathematics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from gauge_attn.so3 import frames
from torch import Tensor


class Beliefs(NamedTuple):
    mu: Tensor
    sigma: Tensor
    frames: Tensor
    phi: Tensor


@pytest.fixture
def beliefs() -> Callable[..., Beliefs]:
    """beliefs(l, "variances" | "covariances" | "isotropic", n_batch=, n_heads=, n_tokens=, dtype=, seed=)."""

    def make(
        l: int,
        kind: str = "variances",
        *,
        n_batch: int = 2,
        n_heads: int = 2,
        n_tokens: int = 13,
        spread: float = 1.0,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> Beliefs:
        generator = torch.Generator().manual_seed(seed)
        d = 2 * l + 1
        shape = (n_batch, n_heads, n_tokens)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        mu = spread * torch.randn(*shape, d, **options)
        if kind == "covariances":
            root = torch.randn(*shape, d, d, **options)
            sigma = root @ root.mT / d + 0.3 * torch.eye(d, dtype=torch.float64)
        else:
            sigma = 0.3 + torch.rand(*shape, *([d] if kind == "variances" else []), **options)
        phi = torch.randn(n_batch, n_tokens, 3, **options)
        return Beliefs(mu.to(dtype), sigma.to(dtype), frames(phi, l).to(dtype), phi.to(dtype))

    return make
