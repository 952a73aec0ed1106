"""Grouping by DOM: both implementations against a loop over pulses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.data import grouping
from iceaggr.data.bench import bench_grouping, synthetic_pulses
from iceaggr.data.grouping import Doms, doms_per_event, group_doms
from iceaggr.data.pulses import Pulses

IMPLEMENTATIONS = [grouping._group_on_cpu, grouping._group_by_torch]


def naive(pulses: Pulses) -> list[tuple[int, int, list[int]]]:
    """(event, sensor, pulses in file order) of every DOM, by event and then sensor."""
    doms: dict[tuple[int, int], list[int]] = {}
    for event in range(pulses.n_events):
        for pulse in range(int(pulses.offsets_E1[event]), int(pulses.offsets_E1[event + 1])):
            doms.setdefault((event, int(pulses.sensor_P[pulse])), []).append(pulse)
    return [(*key, doms[key]) for key in sorted(doms)]


def as_list(doms: Doms) -> list[tuple[int, int, list[int]]]:
    rows = zip(doms.event_D, doms.sensor_D, doms.start_D, doms.count_D, strict=True)
    return [(int(e), int(s), doms.order_P[a : a + n].tolist()) for e, s, a, n in rows]


@pytest.mark.parametrize("group", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    sensors=st.sampled_from([1, 3, 40, 5160]),
    seed=st.integers(0, 2**20),
    known=st.booleans(),
)
def test_equals_a_loop_over_pulses(make_pulses, group, counts, sensors, seed, known):
    pulses = make_pulses(counts, seed=seed, sensors=sensors)
    expected = naive(pulses)
    doms = group(pulses, len(expected) if known else None)
    assert as_list(doms) == expected
    for d, (_, _, members) in enumerate(expected):
        positions = range(int(doms.start_D[d]), int(doms.start_D[d]) + len(members))
        assert doms.dom_of_pulse_P[positions].tolist() == [d] * len(members)
        assert doms.slot_P[positions].tolist() == list(range(len(members)))
    per_event = [sum(e == event for e, _, _ in expected) for event in range(len(counts))]
    assert doms.offsets_E1.diff().tolist() == per_event
    assert doms_per_event(pulses).tolist() == per_event
    assert all(x.dtype == torch.int64 for x in vars(doms).values())


def test_another_order_of_the_pulses_gives_the_same_doms(make_pulses):
    pulses = make_pulses([40, 60], sensors=9)
    shuffled = torch.cat([torch.randperm(40), 40 + torch.randperm(60)])
    other = Pulses(
        **vars(pulses)
        | {name: getattr(pulses, name)[shuffled] for name in ("sensor_P", "time_P", "charge_P", "auxiliary_P")}
    )
    a, b = group_doms(pulses), group_doms(other)
    for name in ("event_D", "sensor_D", "start_D", "count_D", "offsets_E1"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    ends = (a.start_D + a.count_D).tolist()
    for start, end in zip(a.start_D.tolist(), ends, strict=True):
        assert set(a.order_P[start:end].tolist()) == set(shuffled[b.order_P[start:end]].tolist())


def test_the_largest_real_event_passes(make_pulses):
    pulses = make_pulses([20, 178_250, 20])
    doms = group_doms(pulses)
    other = grouping._group_by_torch(pulses, None)
    for name, value in vars(doms).items():
        assert torch.equal(value, getattr(other, name)), name
    assert int(doms.count_D.sum()) == 178_290
    assert doms_per_event(pulses).tolist() == doms.offsets_E1.diff().tolist()


def test_a_wrong_number_of_doms_is_refused(make_pulses):
    with pytest.raises(ValueError, match="n_doms is 3, but the pulses hit"):
        group_doms(make_pulses([50]), n_doms=3)


def test_synthetic_events_have_the_published_multiplicities():
    pulses = synthetic_pulses(20_000)
    n_doms = doms_per_event(pulses)
    assert np.median(pulses.counts_E) == pytest.approx(63, rel=0.03)
    assert pulses.counts_E.double().mean() == pytest.approx(164, rel=0.06)
    assert np.median(n_doms) == pytest.approx(49, rel=0.05)
    assert n_doms.mean() == pytest.approx(60.6, rel=0.06)
    inside = np.ones(pulses.n_pulses - 1, bool)
    inside[pulses.offsets_E1[1:-1] - 1] = False
    assert (np.diff(pulses.time_P)[inside] >= 0).all()


def test_the_benchmark_reports_rates():
    result = bench_grouping("cpu", n_events=64, repeats=2)
    assert result["events_per_s"] > 0
    assert result["doms_per_event"] == pytest.approx(60, rel=0.2)


@pytest.mark.gpu
def test_a_gpu_groups_as_the_cpu_does_without_waiting():
    pulses = synthetic_pulses(500)
    here = group_doms(pulses)
    device = pulses.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = group_doms(device, n_doms=here.n_doms)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in vars(here).items():
        assert torch.equal(value, getattr(there, name).cpu()), name
