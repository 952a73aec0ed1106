"""Random numbers of one block: a generator of its own, so that no block depends on another."""

from __future__ import annotations

import math

import torch
from lab_shared.errors import UserError
from torch import Tensor

_SEEDS = 1 << 31
_MASK = (1 << 64) - 1


def mix_seed(*words: int) -> int:
    """A 63-bit seed from several integers, by splitmix64: neighbouring inputs give unrelated seeds."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def check_seed(seed: int) -> None:
    """Raise UserError for a seed outside those that simulated events can have: each has event ids of its own."""
    if not 0 <= seed < _SEEDS:
        raise UserError(f"seed {seed} is outside 0 to {_SEEDS - 1}")


class Rng:
    """float32 draws on one device from `torch.Generator` seeded with `mix_seed(*words)`.

    torch's generator of a CPU takes the lower 32 bits of a seed, that of a GPU all: of n blocks that a CPU simulates
    about n^2 / 2^33 are one of the others again, of the 300,000 blocks of 132 million events ten.
    """

    def __init__(self, device: torch.device, *words: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(mix_seed(*words))

    def uniform(self, *shape: int) -> Tensor:
        """In (0, 1]: the logarithm is finite."""
        return 1.0 - torch.rand(shape, generator=self.generator, device=self.device)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * self.uniform(*shape)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def exponential(self, *shape: int) -> Tensor:
        return -self.uniform(*shape).log()

    def poisson(self, mean: Tensor) -> Tensor:
        return torch.poisson(mean, generator=self.generator)

    def gamma(self, shape: Tensor) -> Tensor:
        return torch._standard_gamma(shape, generator=self.generator)

    def direction(self, n: int) -> Tensor:
        """(n, 3) isotropic unit vectors."""
        z = self.between(-1.0, 1.0, n)
        phi = self.between(0.0, 2 * math.pi, n)
        rho = (1 - z * z).clamp(min=0).sqrt()
        return torch.stack((rho * phi.cos(), rho * phi.sin(), z), dim=1)
