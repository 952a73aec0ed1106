"""T1 and T2: the stream of batches, and one pass."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from iceaggr.config import ModelConfig
from iceaggr.data.batches import TokenBatches
from iceaggr.data.cache import EventCache
from iceaggr.data.features import rotate_z
from iceaggr.data.pulse_batches import PulseBatches, build_pulse_batch, one_pass_of_pulses
from iceaggr.models.hierarchical import pulse_inputs
from lab_shared.testing import assert_parity

TINY = ModelConfig(arch="hierarchical", d_model=16, d_hidden=32, layers=2, heads=2, head_hidden=16)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(make_pulses):
    counts = np.random.default_rng(3).integers(1, 60, 120)
    counts[17] = 900
    return EventCache.in_memory(make_pulses(counts, seed=9, sensors=200))


def same(a, b):
    tensors = ("features_RF", "dom_R", "offsets_BK", "xyz_D3", "count_D", "event_D", "offsets_E1", "target_E3")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors) and np.array_equal(
        a.index_E, b.index_E
    )


def test_static_batches_all_have_one_shape_and_every_event_once(cache, tables):
    batches = PulseBatches(cache, np.arange(120), TINY, tables, token_budget=400, seed=1, static=True)
    taken, shapes = [], set()
    while len(taken) < 120:
        batch = next(batches)
        taken += batch.index_E.tolist()
        shapes.add((batch.features_RF.shape, batch.offsets_BK.shape, batch.xyz_D3.shape, batch.valid_E.shape))
        assert int(batch.valid_E.sum()) == batch.n_events
    assert sorted(taken[:120]) == list(range(120))
    assert len(shapes) == 1
    counts = cache.n_pulses_E
    assert max(counts[taken[:5]].sum(), 900) <= batches.capacity.pulses
    with pytest.raises(ValueError, match="exceed Capacity"):
        build_pulse_batch(cache.gather(np.arange(120)), TINY, tables, capacity=batches.capacity)


def test_the_stream_resumes_exactly_and_two_ranks_share_it(cache, tables):
    def stream(**options):
        return PulseBatches(cache, np.arange(120), TINY, tables, token_budget=300, seed=5, rotate=True, **options)

    whole = stream()
    first = [next(whole) for _ in range(3)]
    state = json.loads(json.dumps(whole.state_dict()))
    rest = [next(whole) for _ in range(3)]
    other = stream()
    other.load_state_dict(state)
    assert all(same(a, next(other)) for a in rest)
    ranks = [stream(rank=rank, world=2) for rank in range(2)]
    shared = [next(ranks[i % 2]) for i in range(6)]
    assert all(same(a, b) for a, b in zip(first + rest, shared, strict=True))


def test_the_order_of_events_is_that_of_the_flat_models(cache, tables):
    flat = TokenBatches(cache, np.arange(120), ModelConfig(), tables, token_budget=2000, seed=5)
    pulses = PulseBatches(cache, np.arange(120), TINY, tables, token_budget=2000, seed=5)
    assert next(flat).index_E[:20].tolist() == next(pulses).index_E[:20].tolist()


def test_one_pass_sees_every_event_once(cache, tables):
    for static in (False, True):
        batches = list(one_pass_of_pulses(cache, np.arange(100), TINY, tables, token_budget=300, static=static))
        assert len(batches) > 5
        assert sorted(np.concatenate([b.index_E for b in batches])) == list(range(100))


def test_rotation_turns_positions_and_targets(cache, tables):
    pulses = cache.gather(np.arange(4))
    angle_E = torch.tensor([0.3, 1.0, 2.0, -1.0])
    plain = build_pulse_batch(pulses, TINY, tables)
    turned = build_pulse_batch(pulses, TINY, tables, rotation_E=angle_E)
    assert_parity(turned.xyz_D3, rotate_z(plain.xyz_D3, angle_E[plain.event_D]), atol=1e-6)
    assert_parity(turned.target_E3, rotate_z(plain.target_E3, angle_E), atol=1e-6)
    assert torch.equal(turned.features_RF, plain.features_RF)


@pytest.mark.gpu
def test_batches_are_made_without_waiting_for_the_gpu(cache, tables):
    tables = replace(tables, **{name: x.cuda() for name, x in vars(tables).items()})
    batches = PulseBatches(cache, np.arange(120), TINY, tables, token_budget=400, seed=1, static=True, prefetch=0)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pulse_inputs(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()
