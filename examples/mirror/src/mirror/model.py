"""One attention head over letters and positions. Shapes: B lines, N letters of a line, D channels, V letters."""

import torch
from lab_shared.attention import attend
from torch import Tensor, nn

from mirror.config import TrainConfig


class Head(nn.Module):
    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.letters, config.width)
        self.position = nn.Parameter(torch.randn(config.length, config.width) * config.positions)
        self.position.requires_grad_(config.positions)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.readout = nn.Linear(config.width, config.letters)

    def forward(self, x_BN: Tensor) -> Tensor:
        """Logits (B, N, V) of the letter that stands at the mirrored position."""
        q, k, v = self.qkv(self.embed(x_BN) + self.position)[:, None].chunk(3, dim=-1)  # each (B, 1, N, D)
        return self.readout(attend(q, k, v).squeeze(1))
