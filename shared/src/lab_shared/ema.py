"""A moving average of a model's weights, to evaluate with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lab_shared.errors import UserError


class Ema:
    """shadow <- d shadow + (1 - d) weights after each step, with d = min(decay, (1 + n) / (10 + n)) in step n.

    The growing d lets the first steps be forgotten. Averages live on the weights' device; `state_dict` belongs into the
    run's checkpoint. Give it the model itself, not what DDP or torch.compile put around it.

    Raises UserError for a decay outside (0, 1). Source: Polyak & Juditsky, SIAM J. Control Optim. 30 (1992) 838.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"optim.ema is {decay}; a decay lies between 0 and 1, for example 0.999")
        self.decay, self.steps = decay, 0
        self._weights = dict(model.named_parameters())
        self._shadow = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimiser step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(list(self._shadow.values()), list(self._weights.values()), 1 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Put the averages in the place of the weights, for good."""
        torch._foreach_copy_(list(self._weights.values()), list(self._shadow.values()))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages inside the block and its own weights again after it."""
        own = [p.detach().clone() for p in self._weights.values()]
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(self._weights.values()), own)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "shadow": self._shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the averages belong to other parameters."""
        shadow: dict[str, Tensor] = state["shadow"]
        if shadow.keys() != self._shadow.keys():
            odd = min(shadow.keys() ^ self._shadow.keys())
            raise ValueError(f"the saved averages are of other parameters ({odd!r} is in one only)")
        self.steps = int(state["steps"])
        for name, average in shadow.items():
            self._shadow[name].copy_(average)
