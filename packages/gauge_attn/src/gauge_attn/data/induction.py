"""A generated language in which only looking back pays, with its optimal loss in closed form.

A window is key value key value ...: keys are uniform over K symbols, and the value after a key is the one that this
window's table gives to it. Tables are drawn anew for every window, each entry uniform over K values. So a value whose
key has occurred before in the window is certain, for whoever finds the earlier occurrence and reads what follows it
(an induction head); everything else is a fair draw among K.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from lab_shared.errors import UserError
from torch import Tensor

TRAIN, VALIDATION, TEST = 0, 1, 2  # streams of random numbers


def vocabulary(keys: int) -> int:
    """Symbols: the keys are 0 .. keys - 1, the values keys .. 2 keys - 1."""
    return 2 * keys


def sample(keys: int, window: int, batch: int, *, seed: int, stream: int, index: int, device: torch.device) -> Tensor:
    """Windows (batch, window + 1) of int64, the same for the same arguments on the same kind of device.

    Raises UserError for an odd window (the language comes in pairs) or fewer than two keys.
    """
    if window % 2 or keys < 2:
        raise UserError(f"window={window}, keys={keys}: the induction language needs an even window and keys >= 2")
    state = np.random.SeedSequence((seed, stream, index)).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
    pairs = window // 2
    table_BK = torch.randint(keys, (batch, keys), generator=generator, device=device)
    key_BT = torch.randint(keys, (batch, pairs + 1), generator=generator, device=device)
    value_BT = table_BK.gather(1, key_BT) + keys
    return torch.stack([key_BT, value_BT], dim=2).flatten(1)[:, : window + 1]


def optimal_loss(keys: int, window: int) -> float:
    """Mean cross-entropy (nats) per token of the best possible predictor of a window.

    Of its window / 2 pairs, number t = 0, 1, ... has a key that is new with probability (1 - 1/K)^t; then its value
    costs log K, otherwise nothing. The next key always costs log K:
    (log K / window) (window / 2 + sum_t (1 - 1/K)^t).
    """
    pairs = window // 2
    new = sum((1 - 1 / keys) ** t for t in range(pairs))
    return math.log(keys) * (pairs + new) / window
