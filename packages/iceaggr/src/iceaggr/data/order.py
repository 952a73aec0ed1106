"""The order in which events are trained on, and where the stream is cut into batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def rng(seed: int, *key: int) -> np.random.Generator:
    """An independent random stream for each key."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


class EventOrder:
    """The order of n events in each epoch, a pure function of (seed, epoch).

    Blocks of consecutive events are shuffled, then the events inside each window of blocks. Up to
    block * window events (a million) that is a uniform permutation. Beyond, a window is read from about 1 GB
    of the store in runs of about 4 MB, so that training from a disk larger than memory reads, not seeks,
    and no permutation of the whole of Kaggle's 132 million events is ever held.
    """

    def __init__(self, n: int, *, seed: int, block: int = 4096, window: int = 256) -> None:
        self.n, self.seed, self.block, self.window = n, seed, block, window

    def windows(self, epoch: int, skip: int = 0) -> Iterator[np.ndarray]:
        """The epoch's positions 0..n-1 in order, window by window, without the first `skip`."""
        blocks = rng(self.seed, 0, epoch).permutation(-(-self.n // self.block))
        for at in range(0, len(blocks), self.window):
            firsts = blocks[at : at + self.window] * self.block
            sizes = np.minimum(firsts + self.block, self.n) - firsts
            if skip >= sizes.sum():
                skip -= int(sizes.sum())
                continue
            events = np.concatenate([np.arange(f, f + s) for f, s in zip(firsts, sizes, strict=True)])
            yield rng(self.seed, 1, epoch, at).permutation(events)[skip:]
            skip = 0


@dataclass(frozen=True)
class Position:
    """How much of the stream was handed out; what is only prefetched does not count."""

    epoch: int = 0
    cursor: int = 0  # events of the epoch already used, by all ranks
    batch: int = 0  # batches already used, by all ranks

    def advanced(self, events: int, batches: int, n: int) -> Position:
        epoch, cursor = divmod(self.epoch * n + self.cursor + events, n)
        return Position(epoch, cursor, self.batch + batches)


def cut(tokens_E: np.ndarray, token_budget: int, event_capacity: int | None) -> list[int]:
    """Where to cut a row of events into batches: as many events as fit, again and again. Begins with 0."""
    ends_E = tokens_E.cumsum()
    cuts, used = [0], 0
    while cuts[-1] < len(ends_E):
        stop = int(np.searchsorted(ends_E, used + token_budget, side="right"))
        cuts.append(stop if event_capacity is None else min(stop, cuts[-1] + event_capacity))
        used = int(ends_E[cuts[-1] - 1])
    return cuts


def default_capacity(tokens_E: np.ndarray, token_budget: int) -> int:
    """Events of a batch: a quarter more than the average, which is rarely reached and wastes little."""
    return int(1.25 * token_budget / max(float(tokens_E.mean()), 1.0)) + 8 if tokens_E.size else 1
