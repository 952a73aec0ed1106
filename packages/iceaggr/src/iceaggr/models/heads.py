"""Output heads: what turns an event's CLS vector into an answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DirectionalHead(nn.Module):
    """Linear(d, H) - GELU - Linear(H, 3): the raw vector v. With K > 1 components Linear(H, 4 K): K vectors, each with
    the logit of its weight (`iceaggr.losses.mixture_parts`).

    v / |v| points to where the neutrino came from; kappa = |v| is the concentration of a von Mises-Fisher
    distribution when the loss trains it as one. Xavier-uniform weights, zero biases. Always in the
    parameters' type: bfloat16 would round directions to a quarter of a degree.
    """

    def __init__(self, d_model: int, d_hidden: int, components: int = 1) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_hidden)
        self.fc2 = nn.Linear(d_hidden, 3 if components == 1 else 4 * components)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_ED: Tensor) -> Tensor:
        """(E, d_model) of any float type -> v_E3 or (E, 4 K), float32 as the parameters."""
        with torch.autocast(x_ED.device.type, enabled=False):
            return self.fc2(nn.functional.gelu(self.fc1(x_ED.to(self.fc1.weight.dtype))))
