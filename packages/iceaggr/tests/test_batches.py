"""The training stream: every event once per epoch over all ranks, exact resume, threads that end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.config import ModelConfig
from iceaggr.data.batches import BatchError, TokenBatches, one_pass
from iceaggr.data.cache import EventCache
from iceaggr.data.features import Tables
from iceaggr.data.order import EventOrder, cut, default_capacity
from iceaggr.data.prefetch import prefetched
from iceaggr.data.pulses import TokenBatch

CPU = torch.device("cpu")
CONFIG = ModelConfig(features="summary", dom_cap=12)


@pytest.fixture(scope="module")
def cache(make_pulses) -> EventCache:
    counts = np.random.default_rng(3).integers(1, 40, 120)
    return EventCache.in_memory(make_pulses(counts, seed=9))


@pytest.fixture
def stream(cache, tables) -> Iterator[Callable[..., TokenBatches]]:
    """stream(**options) of the first 100 events of the store, 64 tokens a batch; closed at the end."""
    opened = []

    def open_stream(**options: object) -> TokenBatches:
        options = {"token_budget": 64, "seed": 5} | options
        opened.append(TokenBatches(cache, np.arange(100), CONFIG, tables, **options))
        return opened[-1]

    yield open_stream
    for batches in opened:
        batches.close()


def equal(a: TokenBatch, b: TokenBatch) -> bool:
    tensors = ("features_TF", "offsets_E1", "cls_E", "valid_E", "target_E3")
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
    return same and np.array_equal(a.index_E, b.index_E) and (a.n_events, a.n_tokens) == (b.n_events, b.n_tokens)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 400),
    block=st.integers(1, 50),
    window=st.integers(1, 6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_an_epoch_is_a_permutation_and_can_be_entered_anywhere(n, block, window, seed, data):
    order = EventOrder(n, seed=seed, block=block, window=window)
    whole = np.concatenate(list(order.windows(2)))
    assert np.array_equal(np.sort(whole), np.arange(n))
    skip = data.draw(st.integers(0, n - 1))
    assert np.array_equal(np.concatenate(list(order.windows(2, skip))), whole[skip:])


def test_epochs_and_seeds_differ_and_small_sets_are_shuffled_whole():
    def first(seed: int, epoch: int) -> np.ndarray:
        return np.concatenate(list(EventOrder(5000, seed=seed).windows(epoch)))

    assert not np.array_equal(first(0, 0), first(0, 1))
    assert not np.array_equal(first(0, 0), first(1, 0))
    assert np.array_equal(first(0, 0), first(0, 0))
    # Neighbours in the order are unrelated: a third of n apart on average, as in a uniform permutation.
    assert np.abs(np.diff(first(0, 0))).mean() == pytest.approx(5000 / 3, rel=0.05)


@given(
    tokens=st.lists(st.integers(2, 30), max_size=60),
    budget=st.integers(30, 90),
    capacity=st.one_of(st.none(), st.integers(1, 9)),
)
def test_cuts_fill_batches_greedily(tokens, budget, capacity):
    cuts = cut(np.array(tokens, dtype=np.int64), budget, capacity)
    expected = [0]
    for i, _ in enumerate(tokens):
        too_many = sum(tokens[expected[-1] : i + 1]) > budget
        if too_many or (capacity is not None and i - expected[-1] == capacity):
            expected.append(i)
    assert cuts == expected + ([len(tokens)] if tokens else [])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_event_once_per_epoch_across_ranks(stream, world):
    ranks = [stream(rank=rank, world=world) for rank in range(world)]
    taken: list[int] = []
    while len(taken) < 350:
        step = [next(batches) for batches in ranks]
        taken += [int(i) for batch in step for i in batch.index_E]
        assert all(batch.n_tokens <= 64 for batch in step)
        assert len({(b.epoch, b.events_seen) for b in ranks}) == 1
        assert ranks[0].events_seen == len(taken)
    for epoch in range(3):
        assert sorted(taken[100 * epoch : 100 * (epoch + 1)]) == list(range(100))
    assert taken[:100] != taken[100:200]
    assert ranks[0].epoch == len(taken) // 100


def test_steps_per_epoch_is_what_an_epoch_takes(stream):
    for world in (1, 2):
        batches = stream(world=world)
        steps = 0
        while batches.epoch < 4:
            next(batches)
            steps += 1
        assert batches.steps_per_epoch == pytest.approx(steps / (batches.events_seen / 100), rel=0.05)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("stop", [0, 1, 7, 40])
def test_resuming_mid_epoch_is_exact(stream, prefetch, stop):
    options = {"rotate": True, "static": True, "world": 2, "rank": 1}
    straight = stream(**options)
    expected = [next(straight) for _ in range(stop + 5)]
    interrupted = stream(**options, prefetch=prefetch)
    for _ in range(stop):
        next(interrupted)
    time.sleep(0.05)  # let the thread run ahead: what it prefetched must not count
    state = interrupted.state_dict()
    resumed = stream(**options, prefetch=prefetch)
    next(resumed)
    resumed.load_state_dict(state)
    assert all(equal(next(resumed), batch) for batch in expected[stop:])
    assert all(equal(next(interrupted), batch) for batch in expected[stop:])
    assert resumed.state_dict() == interrupted.state_dict()


def test_a_position_of_another_stream_is_refused(stream, cache, tables):
    state = stream().state_dict()
    with pytest.raises(BatchError, match="token_budget = 64, this stream has 80"):
        stream(token_budget=80, event_capacity=state["event_capacity"]).load_state_dict(state)
    with pytest.raises(BatchError, match="seed"):
        stream(seed=6).load_state_dict(state)
    other = TokenBatches(cache, np.arange(1, 101), CONFIG, tables, token_budget=64, seed=5, event_capacity=999)
    with pytest.raises(BatchError, match="events"):
        other.load_state_dict(state | {"event_capacity": 999})


def test_static_batches_have_one_shape(stream):
    batches = stream(static=True)
    seen = [next(batches) for _ in range(30)]
    assert {b.features_TF.shape for b in seen} == {torch.Size([64, 19])}
    assert {b.valid_E.shape for b in seen} == {torch.Size([batches.event_capacity])}
    assert [int(b.valid_E.sum()) for b in seen] == [b.n_events for b in seen]
    # The greedy cut leaves less than one event's room, and the capacity rarely stops it earlier.
    assert np.mean([b.n_tokens for b in seen]) > 64 - 13


def test_rotations_differ_between_steps_and_keep_the_zenith(stream, cache):
    plain, turned = stream(), stream(rotate=True)
    for _ in range(3):
        a, b = next(plain), next(turned)
        assert np.array_equal(a.index_E, b.index_E)
        assert torch.allclose(a.target_E3[:, 2], b.target_E3[:, 2])
        assert not torch.allclose(a.target_E3[:, :2], b.target_E3[:, :2], atol=1e-2)
        assert np.allclose(a.target_E3.numpy(), cache.direction_E3[a.index_E], atol=1e-6)


def test_an_event_that_does_not_fit_is_named(cache, tables):
    most = int(cache.n_doms.argmax())
    says = f"event {cache.event_id[most]} has {cache.n_doms[most] + 1} tokens .* raise tokens_per_batch"
    config = replace(CONFIG, dom_cap=None)
    with pytest.raises(BatchError, match=says):
        TokenBatches(cache, np.arange(120), config, tables, token_budget=20, seed=0)
    with pytest.raises(BatchError, match=says):
        next(one_pass(cache, np.arange(120), config, tables, token_budget=20))
    with pytest.raises(BatchError, match="no events"):
        TokenBatches(cache, np.arange(0), config, tables, token_budget=20, seed=0)


@pytest.mark.parametrize("options", [{}, {"static": True}, {"sort": False}, {"event_capacity": 3}, {"prefetch": 2}])
@pytest.mark.parametrize("world", [1, 3])
def test_one_pass_takes_every_event_exactly_once(cache, tables, options, world):
    events = np.arange(7, 120, 2)
    batches = [
        batch
        for rank in range(world)
        for batch in one_pass(cache, events, CONFIG, tables, token_budget=50, rank=rank, world=world, **options)
    ]
    assert sorted(i for batch in batches for i in batch.index_E) == events.tolist()
    for batch in batches:
        assert np.allclose(batch.target_E3[: batch.n_events].numpy(), cache.direction_E3[batch.index_E], atol=1e-6)
        assert batch.n_events <= options.get("event_capacity", 99)
    if not options and world == 1:
        lengths = [int(cache.n_doms[i]) for batch in batches for i in batch.index_E]
        assert [min(n, 12) for n in lengths] == sorted((min(n, 12) for n in lengths), reverse=True)
    if options.get("sort") is False and world == 1:
        assert [int(i) for batch in batches for i in batch.index_E] == events.tolist()


def test_default_capacity_is_a_little_above_the_average():
    assert default_capacity(np.full(10, 50), 1000) == 33
    assert default_capacity(np.empty(0, np.int64), 1000) == 1


def prefetch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_prefetching_is_bounded_and_ends_with_its_source():
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(6):
            made.append(i)
            yield i

    items = prefetched(source(), depth=2, device=CPU)
    assert next(items) == 0
    time.sleep(0.2)
    assert len(made) <= 4  # one taken, two waiting, one that waits for room
    assert list(items) == [1, 2, 3, 4, 5]
    assert not prefetch_threads()


def test_an_exception_in_the_thread_comes_out_and_the_thread_ends():
    def source() -> Iterator[int]:
        yield 1
        raise FloatingPointError("in the thread")

    items = prefetched(source(), depth=2, device=CPU)
    assert next(items) == 1
    with pytest.raises(FloatingPointError, match="in the thread"):
        next(items)
    assert not prefetch_threads()


def test_closing_ends_the_thread_and_the_stream_can_go_on(stream):
    batches = stream(prefetch=2)
    first = next(batches)
    assert len(prefetch_threads()) == 1
    with batches:
        pass
    assert not prefetch_threads()
    expected = stream()
    assert equal(next(expected), first)
    assert equal(next(batches), next(expected))
    batches.close()
    assert not prefetch_threads()


def test_leaving_one_pass_early_ends_its_thread(cache, tables):
    for _ in one_pass(cache, np.arange(120), CONFIG, tables, token_budget=30, prefetch=2):
        break
    deadline = time.monotonic() + 5
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not prefetch_threads()


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_a_gpu_gets_the_same_batches_from_memory_and_over_the_bus(cache, tables, monkeypatch, share):
    from iceaggr.data import batches as module

    monkeypatch.setattr(module, "_RESIDENT_SHARE", share)
    on_gpu = Tables(*(x.cuda() for x in vars(tables).values()))
    options = {"token_budget": 64, "seed": 5, "rotate": True, "static": True}
    here = TokenBatches(cache, np.arange(100), CONFIG, tables, **options)
    with TokenBatches(cache, np.arange(100), CONFIG, on_gpu, **options) as there:
        assert (there.cache.device.type == "cuda") == (share > 0)
        assert there.state_dict() == here.state_dict()
        for _ in range(20):
            a, b = next(here), next(there)
            assert np.array_equal(a.index_E, b.index_E)
            assert torch.allclose(a.features_TF, b.features_TF.cpu(), atol=1e-5)
            assert torch.allclose(a.target_E3, b.target_E3.cpu(), atol=1e-6)
    assert not prefetch_threads()
