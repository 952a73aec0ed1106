"""Training batches simulated on the way: no event twice (see `iceaggr.sim.rng.Rng` for a CPU), none on disk.

Simulated data. The feed of a seed is a row of blocks, each fixed by (seed, block number) and the device type; rank r of
W simulates blocks r, r + W, ... and cuts them into batches of the token budget. A position is a block and an event in
it, so that a run goes on exactly where it stopped, at the price of simulating that block again. Held-out events come
from a seed that no feed may use.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch

from iceaggr.config import ModelConfig
from iceaggr.data.batches import BatchError
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables
from iceaggr.data.grouping import group_doms
from iceaggr.data.kaggle import slice_events
from iceaggr.data.order import cut, default_capacity, rng
from iceaggr.data.packing import pack
from iceaggr.data.prefetch import default_depth, handed_over, on_device, prefetched, with_index
from iceaggr.data.pulses import Pulses, TokenBatch
from iceaggr.data.tokens import build_tokens, tokens_per_event
from iceaggr.geometry import Geometry
from iceaggr.sim.config import SimConfig
from iceaggr.sim.events import simulate_block
from iceaggr.sim.stream import BLOCK_SIZE, iter_blocks, iter_events

HELD_OUT_SEED = 1 << 30
"""Feeds have smaller seeds."""
FEED_STREAM = 1 << 40
"""Files of simulated folders have smaller stream numbers."""
_PLACE_BITS = 14  # a block has at most 2^14 proposals


@dataclass(frozen=True)
class FeedPosition:
    """The next event of one rank, and how many batches it has handed out."""

    block: int = 0  # counted over this rank's blocks
    event: int = 0  # in that block
    batch: int = 0


class SimulatedFeed:
    """An endless iterator of TokenBatch on the tables' device; stands where `TokenBatches` does in training.

    On a GPU a background thread simulates and builds batches ahead, each block on one of a few CUDA streams. On a CPU
    both happen on demand. A batch's index_E holds block number * 2^14 + place in the block.

    Args:
        events_per_epoch: what `steps_per_epoch` calls an epoch; the feed itself has none.
        static: give all batches the shapes of a full one, for compiled models.
        block_size: proposals per block; default what suits the device type. Another size is another feed.

    Raises:
        BatchError: the seed is one of held-out events, or an event has more tokens than the budget.
    """

    def __init__(
        self,
        config: ModelConfig,
        tables: Tables,
        geometry: Geometry,
        *,
        token_budget: int,
        events_per_epoch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        rotate: bool = False,
        static: bool = False,
        sim: SimConfig | None = None,
        block_size: int | None = None,
        prefetch: int | None = None,
    ) -> None:
        if not 0 <= seed < HELD_OUT_SEED:
            raise BatchError(f"seed {seed}: a simulated feed takes seeds from 0 to {HELD_OUT_SEED - 1}")
        self.device = with_index(tables.device)
        self.config, self.tables, self.geometry, self.sim = config, tables, geometry, sim
        self.token_budget, self.events_per_epoch, self.seed = token_budget, events_per_epoch, seed
        self.rank, self.world, self.rotate, self.static = rank, world, rotate, static
        self.block_size = block_size or BLOCK_SIZE[self.device.type]
        self._depth = default_depth(self.device) if prefetch is None else prefetch
        self._position = FeedPosition()
        self._source: Generator[tuple[TokenBatch, FeedPosition], None, None] | None = None

    @cached_property
    def _tokens_of_first_block(self) -> np.ndarray:
        """Tokens of each event of block 0, the same on every rank."""
        return tokens_per_event(_doms_per_event(self._simulate(0)), self.config.dom_cap)

    @cached_property
    def event_capacity(self) -> int:
        """Most events of a batch."""
        return default_capacity(self._tokens_of_first_block, self.token_budget)

    @cached_property
    def steps_per_epoch(self) -> float:
        """Steps of each rank per `events_per_epoch` events, by the average event of block 0."""
        per_batch = self.token_budget / self._tokens_of_first_block.mean() - 0.5  # what is left over at the end
        return self.events_per_epoch / min(max(per_batch, 1.0), self.event_capacity) / self.world

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenBatch:
        if self._source is None:
            self._source = prefetched(self._build(self._position), depth=self._depth, device=self.device)
        batch, self._position = next(self._source)
        return handed_over(batch)

    def state_dict(self) -> dict[str, int]:
        """This rank's position behind the last batch handed out, and what it depends on."""
        return asdict(self._position) | self._identity

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position. Raises BatchError if it was saved from another feed."""
        for name, value in self._identity.items():
            if state[name] != value:
                raise BatchError(f"the saved position is for {name} = {state[name]}, this feed has {value}")
        self.close()
        self._position = FeedPosition(*(int(state[name]) for name in ("block", "event", "batch")))

    def close(self) -> None:
        """Stops the background thread; the next batch starts it again."""
        if self._source is not None:
            self._source.close()
            self._source = None

    @property
    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "rank": self.rank,
            "world": self.world,
            "token_budget": self.token_budget,
            "event_capacity": self.event_capacity,
            "block_size": self.block_size,
            "dom_cap": -1 if self.config.dom_cap is None else self.config.dom_cap,
        }

    def _simulate(self, number: int) -> Pulses:
        pulses, _ = simulate_block(
            self.block_size,
            seed=self.seed,
            stream=FEED_STREAM,
            block=number,
            config=self.sim,
            geometry=self.geometry,
            device=self.device,
        )
        return pulses

    def _blocks(self, first: int) -> Iterator[tuple[Pulses, np.ndarray]]:
        """This rank's blocks from its `first` on, each with the numbers of its events."""
        number = self.rank + self.world * first
        if self.device.type == "cpu":  # threads of its own would only take cores from the model
            blocks = (self._simulate(n) for n in _count(number, self.world))
        else:
            whole = iter_blocks(
                seed=self.seed,
                stream=FEED_STREAM,
                first=number,
                step=self.world,
                size=self.block_size,
                device=self.device,
                config=self.sim,
                geometry=self.geometry,
            )
            blocks = (pulses for pulses, _ in whole)
        for n, pulses in zip(_count(number, self.world), blocks, strict=False):
            yield pulses, (n << _PLACE_BITS) + np.arange(pulses.n_events)

    def _build(self, position: FeedPosition) -> Generator[tuple[TokenBatch, FeedPosition], None, None]:
        """Each batch, and the position behind it."""
        blocks = self._blocks(position.block)
        pool, number_E = next(blocks)
        in_block = pool.n_events  # of the newest block; what is left of the pool is its end
        pool, number_E = slice_events(pool, position.event, in_block), number_E[position.event :]
        n_doms_E = _doms_per_event(pool)
        capacity = (self.token_budget, self.event_capacity) if self.static else (None, None)
        while True:
            tokens_E = tokens_per_event(n_doms_E, self.config.dom_cap)
            if tokens_E.size and (most := int(tokens_E.max())) > self.token_budget:
                raise BatchError(
                    f"a simulated event has {most:,} tokens (CLS and its DOMs), but a batch has "
                    f"{self.token_budget:,}: raise tokens_per_batch, or limit the DOMs with model.dom_cap"
                )
            cuts = cut(tokens_E, self.token_budget, self.event_capacity)
            if len(cuts) < 3:  # the next event, still to come, may fit too
                more, more_E = next(blocks)
                in_block = more.n_events
                pool, number_E = _joined(pool, more), np.concatenate([number_E, more_E])
                n_doms_E = np.concatenate([n_doms_E, _doms_per_event(more)])
                position = replace(position, block=position.block + 1)
                continue
            n = cuts[1]
            rotation_E = None
            if self.rotate:
                turns_E = rng(self.seed, 2, position.batch * self.world + self.rank).random(n)
                rotation_E = (turns_E * (2 * np.pi)).astype(np.float32)
            batch = build_tokens(
                slice_events(pool, 0, n),
                self.config,
                self.tables,
                n_doms_E=n_doms_E[:n],
                token_capacity=capacity[0],
                event_capacity=capacity[1],
                rotation_E=on_device(rotation_E, self.device),
                index_E=number_E[:n],
            )
            pool, number_E, n_doms_E = slice_events(pool, n, pool.n_events), number_E[n:], n_doms_E[n:]
            position = FeedPosition(position.block, in_block - pool.n_events, position.batch + 1)
            yield batch, position


def held_out_store(n_events: int, *, device: torch.device | str, geometry: Geometry) -> EventCache:
    """A store in memory of the first n held-out events, with their energies (GeV), types (1 track, 0 cascade) and
    vertices (m).

    The same for every feed on a device type; their ids begin at 2^61.
    """
    blocks = list(iter_events(n_events, seed=HELD_OUT_SEED, device=device, geometry=geometry))
    pulses = _joined(*(pulses.to("cpu") for pulses, _ in blocks))
    pulses = replace(pulses, event_id_E=pulses.event_id_E + (HELD_OUT_SEED << 31))
    is_track, energy, vertex_E3 = (
        torch.cat([getattr(truth, name).cpu() for _, truth in blocks]).numpy()
        for name in ("is_track_E", "energy_E", "vertex_E3")
    )
    truth = {"type": is_track.astype(np.int8), "energy": energy}
    vertex = {f"vertex_{axis}": vertex_E3[:, i] for i, axis in enumerate("xyz")}
    return EventCache(pack(pulses) | truth | vertex)


def _count(first: int, step: int) -> Iterator[int]:
    while True:
        yield first
        first += step


def _doms_per_event(pulses: Pulses) -> np.ndarray:
    """(E,) hit DOMs of each event, in host memory."""
    return group_doms(pulses).offsets_E1.diff().cpu().numpy()


def _joined(*blocks: Pulses) -> Pulses:
    """The (labelled) events of all blocks in a row."""
    names = [name for name in vars(blocks[0]) if name != "offsets_E1"]
    parts = {name: torch.cat([getattr(block, name) for block in blocks]) for name in names}
    ends_E = torch.cat([block.counts_E for block in blocks]).cumsum(0)
    return Pulses(**parts, offsets_E1=torch.cat([ends_E.new_zeros(1), ends_E]))
