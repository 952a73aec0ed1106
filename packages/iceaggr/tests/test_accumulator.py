"""Events in pieces: any order and mixture gives what the whole events give, and nothing incomplete is predicted."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.accumulator import (
    CountError,
    DuplicateError,
    EventAccumulator,
    Incomplete,
    StreamError,
    TooManyPulsesError,
)
from iceaggr.config import ModelConfig, TrainConfig
from iceaggr.data.cache import EventCache
from iceaggr.data.pulses import Pulses
from iceaggr.models.build import build_model
from iceaggr.predict import predict_events

COUNTS = [40, 3, 1, 700, 25]
MODELS = {
    "hierarchical": ModelConfig(arch="hierarchical", d_model=16, d_hidden=32, layers=2, heads=2, head_hidden=16),
    "flat": ModelConfig(slots=3, d_model=16, d_hidden=32, layers=1, heads=2, head_hidden=16),
}


@pytest.fixture(scope="module")
def whole(make_pulses):
    """Five events; the fourth is 700 pulses of one DOM, more than T1 attends over at once."""
    pulses = make_pulses(COUNTS, seed=6, sensors=300)
    sensor_P = torch.where(pulses.event_of_pulse_P() == 3, 7, pulses.sensor_P).to(torch.int32)
    return replace(pulses, sensor_P=sensor_P)


def piece(pulses, rows_P):
    """These pulses (rows of the batch) as a piece: grouped by event, in the order given."""
    event_P = pulses.event_of_pulse_P().numpy()[rows_P]
    order = np.argsort(event_P, kind="stable")
    rows_P, (events, counts) = rows_P[order], np.unique(event_P, return_counts=True)
    part = Pulses(
        event_id_E=pulses.event_id_E[events],
        offsets_E1=torch.from_numpy(np.concatenate([[0], counts.cumsum()])),
        sensor_P=pulses.sensor_P[rows_P],
        time_P=pulses.time_P[rows_P],
        charge_P=pulses.charge_P[rows_P],
        auxiliary_P=pulses.auxiliary_P[rows_P],
    )
    return part, pulses.counts_E.numpy()[events]


@pytest.mark.parametrize("name", MODELS)
def test_chunked_equals_one_shot(whole, tables, name):
    config = TrainConfig(model=MODELS[name], dtype="float32")
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    cache = EventCache.in_memory(whole)
    expected = dict(zip(cache.event_id, predict_events(model, cache, np.arange(5), config, tables), strict=True))

    @settings(max_examples=12, deadline=None)
    @given(seed=st.integers(0, 999), cuts=st.lists(st.integers(1, sum(COUNTS) - 1), max_size=12))
    def check(seed, cuts):
        accumulator, answers = EventAccumulator(), {}
        rows = np.random.default_rng(seed).permutation(sum(COUNTS))
        for rows_P in np.split(rows, sorted(set(cuts))):
            accumulator.add(*piece(whole, rows_P))
            for ids, v_E3 in accumulator.predictions(model, config, tables, max_pulses=50):
                assert not answers.keys() & set(ids.tolist())
                answers |= dict(zip(ids.tolist(), v_E3, strict=True))
        assert accumulator.close() == []
        assert accumulator.n_bytes == 0
        assert answers.keys() == expected.keys()
        for event_id, v_3 in answers.items():
            assert np.abs(v_3 - expected[event_id]).max() < 1e-5 * (1 + np.abs(expected[event_id]).max())

    check()


def test_complete_gives_the_pulses_back_and_frees_them(whole):
    accumulator = EventAccumulator()
    accumulator.add(*piece(whole, np.arange(0, 400)))
    assert accumulator.n_pending == 1
    waiting = accumulator.n_bytes
    (first,) = accumulator.complete()
    assert first.event_id_E.tolist() == whole.event_id_E[:3].tolist()
    assert accumulator.n_bytes < waiting
    accumulator.add(*piece(whole, np.arange(400, sum(COUNTS))))
    assert accumulator.n_pending == 0
    batches = [first, *accumulator.complete(max_pulses=1)]
    assert [batch.n_events for batch in batches] == [3, 1, 1]
    joined = replace(
        whole,
        event_id_E=torch.cat([b.event_id_E for b in batches]),
        sensor_P=torch.cat([b.sensor_P for b in batches]),
        time_P=torch.cat([b.time_P for b in batches]),
        charge_P=torch.cat([b.charge_P for b in batches]),
        auxiliary_P=torch.cat([b.auxiliary_P for b in batches]),
    )
    # equal times may change places, and only those
    assert torch.equal(joined.time_P, whole.time_P)
    assert torch.equal(joined.event_id_E, whole.event_id_E)
    assert sorted(joined.charge_P.tolist()) == sorted(whole.charge_P.tolist())
    assert accumulator.n_bytes == 0
    assert list(accumulator.complete()) == []


def test_the_memory_of_a_batch_is_free_while_it_is_worked_on(whole):
    """Of a bright event the copies that the generator would keep count."""
    accumulator = EventAccumulator()
    accumulator.add(*piece(whole, np.arange(sum(COUNTS))))
    kept = [weakref.ref(event) for event in accumulator._complete.values()]
    for _ in accumulator.complete():
        assert [ref() for ref in kept] == [None] * 5


def test_incomplete_events_are_reported_and_never_handed_out(whole):
    accumulator = EventAccumulator()
    accumulator.add(*piece(whole, np.delete(np.arange(sum(COUNTS)), 100)))
    assert [i for batch in accumulator.complete() for i in batch.event_id_E.tolist()] == [
        int(whole.event_id_E[i]) for i in (0, 1, 2, 4)
    ]
    assert accumulator.close() == [Incomplete(int(whole.event_id_E[3]), 699, 700)]
    assert accumulator.n_bytes == 0
    assert accumulator.close() == []


def test_complete_events_must_be_taken_before_closing(whole):
    accumulator = EventAccumulator()
    accumulator.add(*piece(whole, np.arange(40)))
    with pytest.raises(StreamError, match="1 complete events wait"):
        accumulator.close()


@pytest.mark.parametrize(
    ("before", "rows", "counts", "error", "message"),
    [
        ([], [*range(40), 5], None, TooManyPulsesError, "has 40 pulses, but 41 came"),
        ([range(20), range(15, 20)], range(20, 35), None, DuplicateError, "5 came twice"),
        ([range(40)], range(3), None, DuplicateError, "already complete"),
        ([range(20)], range(20, 22), [41], CountError, "said to have 41 pulses; an earlier piece said 40"),
        ([], range(3), [0], CountError, "at least 1"),
    ],
    ids=["too many", "a piece twice", "after the end", "another count", "no pulses"],
)
def test_contradictions_are_named_and_change_nothing(whole, before, rows, counts, error, message):
    accumulator = EventAccumulator()
    for good in before:
        accumulator.add(*piece(whole, np.array(good)))
    held = accumulator.n_bytes
    part, n_pulses_E = piece(whole, np.array(rows))
    with pytest.raises(error, match=message):
        accumulator.add(part, n_pulses_E if counts is None else np.array(counts))
    assert accumulator.n_bytes == held
    assert issubclass(error, StreamError)


def test_a_piece_is_refused_whole(whole):
    """The contradiction is in its last event: the events before it are not taken either."""
    accumulator = EventAccumulator()
    part, n_pulses_E = piece(whole, np.arange(44))
    with pytest.raises(CountError):
        accumulator.add(part, n_pulses_E * np.array([1, 1, 0]))
    assert accumulator.n_bytes == 0
    accumulator.add(part, n_pulses_E)
    assert sum(batch.n_events for batch in accumulator.complete()) == 3


def test_only_so_many_complete_events_are_remembered(whole):
    accumulator = EventAccumulator(remember=1)
    accumulator.add(*piece(whole, np.arange(44)))
    assert sum(batch.n_events for batch in accumulator.complete()) == 3
    with pytest.raises(DuplicateError):
        accumulator.add(*piece(whole, np.array([43])))
    accumulator.add(*piece(whole, np.array([0])))
    assert accumulator.close() == [Incomplete(int(whole.event_id_E[0]), 1, 40)]
