"""Events that arrive in pieces: kept until every pulse is there, handed out once, and then forgotten.

Pulses are kept and not DOM embeddings: 17 bytes each are fewer than the embeddings take for all but the brightest
events (512 bytes a DOM at d = 128), pieces may then split DOMs, and a complete event is predicted as if it had come
whole, by any model.

Shape suffixes: E events of a piece, P pulses.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass, field

import numpy as np
import torch
from lab_shared.errors import UserError

from iceaggr.config import TrainConfig
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables
from iceaggr.data.pulses import Pulses
from iceaggr.models.build import Model
from iceaggr.predict import predict_events

_PULSE = np.dtype([("time", np.int64), ("sensor", np.int32), ("charge", np.float32), ("auxiliary", np.bool_)])


class StreamError(UserError):
    """A piece that contradicts what came before. It is refused whole: the accumulator is as it was."""


class DuplicateError(StreamError):
    """A pulse that an event already has, or a piece of an event that is already complete."""


class TooManyPulsesError(StreamError):
    """More pulses than the event was said to have."""


class CountError(StreamError):
    """Two pieces of an event that differ in how many pulses it has, or a number below one."""


@dataclass(frozen=True)
class Incomplete:
    """An event of which pulses are missing."""

    event_id: int
    received: int
    expected: int


@dataclass
class _Pending:
    expected: int
    received: int = 0
    pieces: list[np.ndarray] = field(default_factory=list)


class EventAccumulator:
    """Collects events from pieces that come in any order and any mixture of events.

    >>> accumulator = EventAccumulator()
    >>> for pulses, n_pulses_E in pieces:
    ...     accumulator.add(pulses, n_pulses_E)
    ...     for event_id_E, v_E3 in accumulator.predictions(model, config, tables):
    ...         publish(event_id_E, v_E3)
    >>> for event in accumulator.close():
    ...     print(f"event {event.event_id}: {event.received} of {event.expected} pulses")

    `predictions` (or `complete`, for the pulses themselves) takes the complete events out and frees their memory.

    Args:
        remember: complete events whose late pieces are recognised as duplicates. A piece that comes even later begins
            an event that `close` reports.
    """

    def __init__(self, *, remember: int = 1_000_000) -> None:
        self.remember = remember
        self._pending: dict[int, _Pending] = {}
        self._complete: dict[int, np.ndarray] = {}
        self._done: OrderedDict[int, None] = OrderedDict()

    @property
    def n_pending(self) -> int:
        """Events of which pulses are missing."""
        return len(self._pending)

    @property
    def n_bytes(self) -> int:
        """Memory that pulses take: of incomplete events, and of complete ones that were not taken yet."""
        pieces = [piece for event in self._pending.values() for piece in event.pieces]
        return sum(piece.nbytes for piece in (*pieces, *self._complete.values()))

    def add(self, pulses: Pulses, n_pulses_E: np.ndarray) -> None:
        """Take a piece: some pulses of some events, in any order, on any device; labels are ignored.

        n_pulses_E: (E,) how many pulses each of these events has in all.

        Raises:
            DuplicateError: an event that is already complete, or a pulse (sensor, time, charge and auxiliary flag)
                that it has twice; the latter is found when the last pulse comes.
            TooManyPulsesError: more pulses than n_pulses_E says.
            CountError: n_pulses_E differs from an earlier piece's, or is below 1.
            ValueError: n_pulses_E has another length than the events.
        """
        piece_P = np.empty(pulses.n_pulses, _PULSE)
        for name in _PULSE.names or ():
            piece_P[name] = getattr(pulses, f"{name}_P").cpu().numpy()
        offsets_E1 = pulses.offsets_E1.cpu().numpy()
        changed: dict[int, _Pending] = {}
        finished: dict[int, np.ndarray] = {}
        ids = pulses.event_id_E.cpu().tolist()
        counts = [int(n) for n in n_pulses_E]
        for event_id, expected, low, high in zip(ids, counts, offsets_E1[:-1], offsets_E1[1:], strict=True):
            known = changed.get(event_id) or self._pending.get(event_id)
            self._refuse(event_id, expected, int(high - low), known, finished)
            # A copy, because a view would keep the whole piece in memory for as long as the event waits.
            pieces = [*(known.pieces if known else ()), piece_P[low:high].copy()]
            event = _Pending(expected, (known.received if known else 0) + int(high - low), pieces)
            if event.received == expected:
                finished[event_id] = _whole(event_id, event.pieces)
                changed.pop(event_id, None)
            else:
                changed[event_id] = event
        for event_id in finished:
            self._pending.pop(event_id, None)
            self._done[event_id] = None
        while len(self._done) > self.remember:
            self._done.popitem(last=False)
        self._pending |= changed
        self._complete |= finished

    def complete(self, *, max_pulses: int = 1 << 20) -> Generator[Pulses, None, None]:
        """The complete events on the CPU, each once, in batches of about max_pulses; taken ones are forgotten."""
        while self._complete:
            yield self._take(max_pulses)

    def predictions(
        self, model: Model, config: TrainConfig, tables: Tables, *, max_pulses: int = 1 << 20
    ) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
        """(event_id_E, v_E3) of the complete events, each once: raw vectors as of `predict_events`."""
        for pulses in self.complete(max_pulses=max_pulses):
            cache = EventCache.in_memory(pulses)
            yield cache.event_id, predict_events(model, cache, np.arange(cache.n_events), config, tables)

    def close(self) -> list[Incomplete]:
        """The events of which pulses are missing, which are dropped.

        Raises:
            StreamError: complete events were not taken out.
        """
        if self._complete:
            raise StreamError(
                f"{len(self._complete)} complete events wait: take them with predictions() or complete() before close()"
            )
        missing = [Incomplete(event_id, event.received, event.expected) for event_id, event in self._pending.items()]
        self._pending.clear()
        self._done.clear()
        return missing

    def _take(self, max_pulses: int) -> Pulses:
        """The next batch, copied: nothing else holds these events while they are worked on."""
        taken: dict[int, np.ndarray] = {}
        n_pulses = 0
        while self._complete and n_pulses < max_pulses:
            event_id = next(iter(self._complete))
            taken[event_id] = self._complete.pop(event_id)
            n_pulses += len(taken[event_id])
        pulse_P = np.concatenate(list(taken.values()))
        ends_E = np.cumsum([len(event) for event in taken.values()])
        times = pulse_P["time"]
        narrow = -(2**31) <= int(times.min()) <= int(times.max()) < 2**31
        return Pulses(
            event_id_E=torch.tensor(list(taken)),
            offsets_E1=torch.from_numpy(np.concatenate([[0], ends_E])),
            sensor_P=torch.from_numpy(pulse_P["sensor"].copy()),
            time_P=torch.from_numpy(times.astype(np.int32 if narrow else np.int64)),
            charge_P=torch.from_numpy(pulse_P["charge"].copy()),
            auxiliary_P=torch.from_numpy(pulse_P["auxiliary"].copy()),
        )

    def _refuse(
        self, event_id: int, expected: int, n_pulses: int, known: _Pending | None, finished: dict[int, np.ndarray]
    ) -> None:
        if event_id in self._done or event_id in finished:
            raise DuplicateError(f"event {event_id} is already complete, but {n_pulses} more of its pulses came")
        if expected < 1 or (known and known.expected != expected):
            earlier = f"an earlier piece said {known.expected}" if known else "an event has at least 1"
            raise CountError(f"event {event_id} is said to have {expected} pulses; {earlier}")
        if (received := n_pulses + (known.received if known else 0)) > expected:
            raise TooManyPulsesError(
                f"event {event_id} has {expected} pulses, but {received} came: was a piece sent twice?"
            )


def _whole(event_id: int, pieces: list[np.ndarray]) -> np.ndarray:
    """The pulses of an event in time order; equal times by sensor and charge, so that no order of pieces shows."""
    pulse_P = np.concatenate(pieces)
    pulse_P = pulse_P[np.lexsort([pulse_P[name] for name in ("auxiliary", "charge", "sensor", "time")])]
    if len(twice := np.flatnonzero(pulse_P[1:] == pulse_P[:-1])):
        pulse = pulse_P[twice[0]]
        raise DuplicateError(
            f"event {event_id} has all its {len(pulse_P)} pulses, but {len(twice)} came twice: "
            f"sensor {pulse['sensor']} at {pulse['time']} ns is one, so others are missing"
        )
    return pulse_P
