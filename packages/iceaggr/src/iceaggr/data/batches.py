"""Which events make up each step: an endless shuffled stream for training, one ordered pass for evaluation.

Training takes events in an order that depends only on (seed, epoch), and cuts the stream wherever the next
event would exceed the token budget. Epochs follow each other without a seam, so that no event is ever
dropped. Of every `world` consecutive batches, rank r trains on the r-th: all ranks take equally many steps,
and one position describes them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from lab_shared.errors import UserError

from iceaggr.config import ModelConfig
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables
from iceaggr.data.order import EventOrder, Position, cut, default_capacity, rng
from iceaggr.data.packing import PackedPulses
from iceaggr.data.prefetch import default_depth, handed_over, on_device, prefetched, with_index
from iceaggr.data.pulses import TokenBatch
from iceaggr.data.storefiles import checksum
from iceaggr.data.tokens import build_tokens, tokens_per_event

# A store goes onto the GPU when it takes at most this share of the memory that is free there.
_RESIDENT_SHARE = 0.25


class BatchError(UserError):
    """An event that exceeds the token budget, or a saved position that belongs to another stream."""


@dataclass(frozen=True)
class Gathered:
    """A batch as it comes out of the store."""

    index_E: np.ndarray  # positions in the store
    packed: PackedPulses
    number: int  # in the stream of all ranks
    after: Position  # of the stream, once all ranks have their batches of this step


class TokenBatches:
    """The training stream, an endless iterator of TokenBatch on the tables' device.

    For a GPU a background thread makes batches ahead, on a CUDA stream of its own: a small model's step is no longer
    than the launches of its batch take. From a store that fits easily into the GPU's memory, events are gathered
    there; otherwise into page-locked memory, and 6 bytes per pulse cross the bus. On a CPU batches are made on
    demand.

    Args:
        cache: the event store.
        events: positions in the store to train on.
        token_budget: most tokens (CLS + DOMs) of a batch.
        event_capacity: most events of a batch; default a quarter more than an average batch has.
        rotate: turn every event about the vertical axis by its own random angle.
        static: give all batches the shapes of a full one, for compiled models.
        prefetch: batches to make ahead; default 2 on a GPU and 0 (no thread) on a CPU.

    Raises:
        BatchError: an event has more tokens than the budget.
    """

    def __init__(
        self,
        cache: EventCache,
        events: np.ndarray,
        config: ModelConfig,
        tables: Tables,
        *,
        token_budget: int,
        event_capacity: int | None = None,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str | None = None,
        rotate: bool = False,
        static: bool = False,
        prefetch: int | None = None,
    ) -> None:
        self.device = with_index(device or tables.device)
        self.cache, self.events = near(cache, self.device), np.asarray(events, dtype=np.int64)
        self.config, self.tables, self.token_budget, self.seed = config, tables, token_budget, seed
        self.rank, self.world, self.rotate, self.static = rank, world, rotate, static
        if not self.events.size:
            raise BatchError("no events to train on")
        tokens_E = checked_tokens(cache, self.events, config, token_budget)
        self.event_capacity = event_capacity or default_capacity(tokens_E, token_budget)
        self._order = EventOrder(self.events.size, seed=seed)
        self._depth = default_depth(self.device) if prefetch is None else prefetch
        self._position = Position()
        self._source: Generator[tuple[TokenBatch, Position], None, None] | None = None

    @property
    def epoch(self) -> int:
        """The epoch that the next batch begins in."""
        return self._position.epoch

    @property
    def events_seen(self) -> int:
        """Events handed out so far, by all ranks."""
        return self._position.epoch * self.events.size + self._position.cursor

    @cached_property
    def steps_per_epoch(self) -> float:
        """Steps of each rank per pass over the events, counted on the first million events of epoch 0."""
        batches = events = 0
        for index_E in self._cut(Position()):
            batches, events = batches + 1, events + len(index_E)
            if events >= min(self.events.size, 1 << 20):
                break
        return self.events.size * batches / events / self.world

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenBatch:
        if self._source is None:
            self._source = prefetched(self._build(self._position), depth=self._depth, device=self.device)
        batch, self._position = next(self._source)
        return handed_over(batch)

    def state_dict(self) -> dict[str, int | str]:
        """The position behind the last batch handed out, the same on every rank, and what it depends on."""
        return asdict(self._position) | self._identity

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position. Raises BatchError if it was saved from another stream."""
        for name, value in self._identity.items():
            if state[name] != value:
                raise BatchError(f"the saved position is for {name} = {state[name]}, this stream has {value}")
        self.close()
        self._position = Position(int(state["epoch"]), int(state["cursor"]), int(state["batch"]))

    def close(self) -> None:
        """Stops the background thread; the next batch starts it again."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _identity(self) -> dict[str, int | str]:
        return {
            "seed": self.seed,
            "token_budget": self.token_budget,
            "event_capacity": self.event_capacity,
            "dom_cap": -1 if self.config.dom_cap is None else self.config.dom_cap,
            "events": checksum(self.events),
        }

    def _cut(self, position: Position) -> Iterator[np.ndarray]:
        """The global batches from a position on, endlessly, as positions in `events`."""
        pool = np.empty(0, np.int64)
        epoch, skip = position.epoch, position.cursor
        while True:
            for window in self._order.windows(epoch, skip):
                pool = np.concatenate([pool, window])
                cuts = self._cuts(self.events[pool])
                for first, last in pairwise(cuts[:-1]):
                    yield pool[first:last]
                # The last batch of the pool may go on in the next window.
                pool = pool[cuts[-2] :]
            epoch, skip = epoch + 1, 0

    def _cuts(self, index_E: np.ndarray) -> list[int]:
        """Where to cut this row of events (positions in the store) into batches."""
        tokens_E = tokens_per_event(self.cache.n_doms[index_E], self.config.dom_cap)
        return cut(tokens_E, self.token_budget, self.event_capacity)

    def _gather(self, position: Position) -> Generator[Gathered, None, None]:
        pin = self.device.type == "cuda" and self.cache.device.type == "cpu"
        batches = self._cut(position)
        while True:
            group = list(itertools.islice(batches, self.world))
            index_E = self.events[group[self.rank]]
            number = position.batch + self.rank
            position = position.advanced(sum(map(len, group)), len(group), self.events.size)
            yield Gathered(index_E, self.cache.gather_packed(index_E, pin=pin), number, position)

    def _build(self, position: Position) -> Generator[tuple[TokenBatch, Position], None, None]:
        """Each batch, and where the stream stands once all ranks have theirs of this step."""
        for gathered in self._gather(position):
            rotation_E = None
            if self.rotate:
                turns_E = rng(self.seed, 2, gathered.number).random(len(gathered.index_E))
                rotation_E = (turns_E * (2 * np.pi)).astype(np.float32)
            yield self._batch(gathered, rotation_E), gathered.after

    def _batch(self, gathered: Gathered, rotation_E: np.ndarray | None) -> TokenBatch:
        capacity = (self.token_budget, self.event_capacity) if self.static else (None, None)
        return _tokens(gathered, self.cache, self.config, self.tables, self.device, capacity, rotation_E)


def one_pass(
    cache: EventCache,
    events: np.ndarray,
    config: ModelConfig,
    tables: Tables,
    *,
    token_budget: int,
    event_capacity: int | None = None,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str | None = None,
    sort: bool | None = None,
    static: bool = False,
    prefetch: int | None = None,
    angle: float = 0.0,
) -> Generator[TokenBatch, None, None]:
    """Every event exactly once, over all ranks together; `index_E` of a batch says which they are.

    Args:
        sort: longest events first, so that events of a batch are of similar length; default unless static.
        angle: turn every event about the vertical axis by this much, rad.

    Raises:
        BatchError: an event has more tokens than the budget.
    """
    device = with_index(device or tables.device)
    cache, events = near(cache, device), np.asarray(events, dtype=np.int64)
    tokens_E = checked_tokens(cache, events, config, token_budget)
    if sort or (sort is None and not static):
        order = np.argsort(-tokens_E, kind="stable")
        events, tokens_E = events[order], tokens_E[order]
    if static:
        event_capacity = event_capacity or default_capacity(tokens_E, token_budget)
    spans = list(pairwise(cut(tokens_E, token_budget, event_capacity)))[rank::world]
    pin = device.type == "cuda" and cache.device.type == "cpu"
    capacity = (token_budget, event_capacity) if static else (None, None)

    def build() -> Generator[TokenBatch, None, None]:
        for number, (a, b) in enumerate(spans):
            gathered = Gathered(events[a:b], cache.gather_packed(events[a:b], pin=pin), number, Position())
            rotation_E = np.full(b - a, angle, dtype=np.float32) if angle else None
            yield _tokens(gathered, cache, config, tables, device, capacity, rotation_E)

    source = prefetched(build(), depth=default_depth(device) if prefetch is None else prefetch, device=device)
    try:
        yield from map(handed_over, source)
    finally:
        source.close()


def checked_tokens(cache: EventCache, events: np.ndarray, config: ModelConfig, token_budget: int) -> np.ndarray:
    tokens_E = tokens_per_event(cache.n_doms[events], config.dom_cap)
    if tokens_E.size and (most := int(tokens_E.max())) > token_budget:
        event_id = cache.event_id[events[tokens_E.argmax()]]
        raise BatchError(
            f"event {event_id} has {most:,} tokens (CLS and its DOMs), but a batch has {token_budget:,}: "
            "raise tokens_per_batch, or limit the DOMs with model.dom_cap"
        )
    return tokens_E


def near(cache: EventCache, device: torch.device) -> EventCache:
    """The store itself, or its copy on the GPU where that takes a small part of the free memory."""
    if device.type != "cuda" or cache.device == device:
        return cache
    small = 6 * cache.n_pulses <= _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    return cache.to_device(device) if small else cache


def _tokens(
    gathered: Gathered,
    cache: EventCache,
    config: ModelConfig,
    tables: Tables,
    device: torch.device,
    capacity: tuple[int | None, int | None],
    rotation_E: np.ndarray | None,
) -> TokenBatch:
    return build_tokens(
        gathered.packed.to(device).unpack(),
        config,
        tables,
        n_doms_E=cache.n_doms[gathered.index_E],
        token_capacity=capacity[0],
        event_capacity=capacity[1],
        rotation_E=on_device(rotation_E, device),
        index_E=gathered.index_E,
    )
