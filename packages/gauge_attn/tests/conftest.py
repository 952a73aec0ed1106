"""Random beliefs for the tests of the mathematics, and models of a few hundred parameters for those of the models."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from gauge_attn.config import ModelConfig, OptimConfig
from gauge_attn.models import build_model
from gauge_attn.so3 import frames
from torch import Tensor, nn

VOCAB, WINDOW = 12, 10
SPEC = "2x0e+1x1e+1x2e"
TINY = {
    "faithful": ModelConfig(arch="faithful", spec=SPEC, layers=2, kappa=0.5),
    "practical": ModelConfig(
        arch="practical", spec=SPEC, layers=2, scalars=8, copies=2, hidden=12, value_scalars=2, kappa_mode="learnable"
    ),
    "gpt": ModelConfig(arch="gpt", layers=2, d_model=16, heads=2),
}
VARIANTS = {
    **TINY,
    "faithful-vfe": replace(TINY["faithful"], vfe_step=True),
    "practical-seeing-itself": replace(TINY["practical"], self_mask=False),
    "practical-scalars": replace(TINY["practical"], spec="3x0e"),
    "practical-no-scalar-heads": replace(TINY["practical"], spec="1x1e+1x2e"),
}


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


@pytest.fixture
def make() -> Iterator[Callable[..., nn.Module]]:
    """make(name, alignment="none", **changes of its ModelConfig): one of VARIANTS over VOCAB symbols and WINDOW places.

    On one thread: these models are smaller than the cost of sharing them.
    """

    def build(name: str, alignment: Any = "none", **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        optim = OptimConfig(alignment=1.0, alignment_reduction=alignment)
        return build_model(replace(VARIANTS[name], **changes), VOCAB, WINDOW, optim)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build
    torch.set_num_threads(threads)


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """tokens(batch, n, seed): the same symbols for the same arguments."""

    def sample(batch: int = 3, n: int = WINDOW, seed: int = 1) -> Tensor:
        return torch.randint(VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))

    return sample
