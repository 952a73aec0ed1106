"""The simulator's events: laws of the real data, determinism, and bounds."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.data.kaggle import KaggleFolder
from iceaggr.data.pulses import Pulses
from iceaggr.geometry import icecube86
from iceaggr.sim import trigger
from iceaggr.sim.config import SimConfig
from iceaggr.sim.events import Truth, simulate_block
from iceaggr.sim.stream import BLOCK_SIZE, bench_simulator, iter_events

CONFIG = SimConfig()


@pytest.fixture(scope="module")
def block() -> tuple[Pulses, Truth]:
    return simulate_block(1024, seed=3)


def events_of(pulses: Pulses):
    """(sensor, time, auxiliary) of each event as NumPy arrays."""
    offsets = pulses.offsets_E1.tolist()
    columns = [x.numpy() for x in (pulses.sensor_P, pulses.time_P, pulses.auxiliary_P)]
    for begin, end in itertools.pairwise(offsets):
        yield [c[begin:end].astype(np.int64) for c in columns]


def naive_coincidence(sensor: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Near: a pulse within 2 DOMs of the string and 1 us, not on the same DOM; a launch: 6.4 us after one."""
    d = sensor[:, None] - sensor
    string = sensor // 60
    near = ((d != 0) & (abs(d) <= 2) & (string[:, None] == string) & (abs(time[:, None] - time) <= 1000)).any(1)
    after = time[:, None] - time
    return ((d == 0) & (after >= 0) & (after <= 6400) & near).any(1)


def fast_coincidence(sensor: np.ndarray, time: np.ndarray) -> np.ndarray:
    order = np.lexsort((time, sensor))
    dom, at = torch.from_numpy(sensor[order]), torch.from_numpy(time[order])
    near, _ = trigger.coincidence(dom, at, CONFIG)
    found = np.empty(len(sensor), dtype=bool)
    found[order] = ~trigger.auxiliary(dom, at, near, CONFIG).numpy()
    return found


def test_auxiliary_follows_the_law_in_every_event(block) -> None:
    checked = 0
    for sensor, time, auxiliary in events_of(block[0]):
        if len(sensor) <= 3000:
            np.testing.assert_array_equal(naive_coincidence(sensor, time), auxiliary == 0)
            checked += 1
    assert checked > 0.98 * block[0].n_events


def test_the_law_holds_for_the_real_events(real_mini: Path) -> None:
    agree = total = 0
    for sensor, time, auxiliary in events_of(KaggleFolder(real_mini).read_batch(1)):
        agree += (fast_coincidence(sensor, time) == (auxiliary == 0)).sum()
        total += len(sensor)
    assert total == 352
    assert agree / total >= 0.99


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 80))
def test_coincidence_equals_the_naive_loop(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    sensor = rng.integers(50, 70, n)  # across the end of a string
    time = rng.choice(20_000, n, replace=False)
    np.testing.assert_array_equal(fast_coincidence(sensor, time), naive_coincidence(sensor, time))


def test_trigger_time_law(block) -> None:
    """The first pulse in coincidence of each of the 8 public real events is at 9863 to 9890 ns."""
    first = np.array([time[auxiliary == 0].min() for _, time, auxiliary in events_of(block[0])])
    assert (first <= 9890).all()
    assert ((first >= 9863) & (first <= 9890)).mean() > 0.9


def test_events_look_like_kaggle_events(block) -> None:
    pulses, truth = block
    assert pulses.time_P.dtype == torch.int32
    assert pulses.sensor_P.dtype == torch.int32
    assert pulses.charge_P.dtype == torch.float32
    assert int(pulses.offsets_E1[0]) == 0
    assert int(pulses.offsets_E1[-1]) == pulses.n_pulses == truth.signal_P.numel()
    event = pulses.event_of_pulse_P()
    same = event[1:] == event[:-1]
    assert (pulses.time_P.diff()[same] >= 0).all()
    assert pulses.time_P.min() >= 9863 - 4000
    assert not icecube86().dead[pulses.sensor_P.numpy()].any()
    assert (pulses.counts_E >= 5).all()
    steps = (pulses.charge_P.double() * 40).round()
    assert steps.min() >= 1
    assert pulses.charge_P.max() <= CONFIG.max_charge
    torch.testing.assert_close(pulses.charge_P, (steps / 40).float(), rtol=0, atol=0)


def test_truth_is_consistent(block) -> None:
    pulses, truth = block
    assert all(getattr(truth, f.name).shape[0] in (pulses.n_events, pulses.n_pulses) for f in fields(Truth))
    signal = torch.zeros(pulses.n_events, dtype=torch.int64)
    signal.index_add_(0, pulses.event_of_pulse_P(), truth.signal_P.long())
    assert torch.equal(signal, truth.n_signal_E)
    assert (signal >= trigger.SMT3[0]).all()
    assert (truth.visible_E > 0).all()
    assert ((truth.energy_E >= CONFIG.energy_min) & (truth.energy_E <= CONFIG.energy_max)).all()
    assert torch.equal(truth.muon_length_E > 0, truth.is_track_E)
    assert ((truth.zenith_E >= 0) & (truth.zenith_E <= torch.pi)).all()
    assert ((truth.azimuth_E >= 0) & (truth.azimuth_E < 2 * torch.pi)).all()
    # The neutrino's light comes after the neutrino, give or take jitter and early pulses.
    inside = ~truth.is_track_E
    start = torch.repeat_interleave(truth.time_E, pulses.counts_E)
    of_cascade = torch.repeat_interleave(inside, pulses.counts_E) & truth.signal_P
    assert (pulses.time_P[of_cascade] > start[of_cascade] - 50).all()


def test_directions_are_near_isotropic(block) -> None:
    n = block[0].n_events
    assert abs(block[1].zenith_E.cos().mean()) < 0.1
    assert abs(block[1].azimuth_E.cos().mean()) < 5 * 0.71 / n**0.5
    assert 0.35 < block[1].is_track_E.float().mean() < 0.65


def test_same_seed_same_bytes_and_other_blocks_differ(block) -> None:
    for first, again in zip(block, simulate_block(1024, seed=3), strict=True):
        for name, x in vars(first).items():
            assert torch.equal(x, getattr(again, name)), name
    for seed, block_number, stream in ((4, 0, 0), (3, 1, 0), (3, 0, 1)):
        pulses, _ = simulate_block(128, seed=seed, block=block_number, stream=stream)
        assert pulses.zenith_E is not None
        assert not torch.equal(pulses.zenith_E[:10], block[0].zenith_E[:10])


def test_stream_is_its_blocks_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 128
    monkeypatch.setitem(BLOCK_SIZE, "cpu", size)
    blocks = [simulate_block(size, seed=5, stream=2, block=b) for b in range(2)]
    wanted = blocks[0][0].n_events + 7
    threads = torch.get_num_threads()
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        found = list(iter_events(wanted, seed=5, stream=2))
        torch.set_num_threads(threads)
        assert [p.n_events for p, _ in found] == [wanted - 7, 7]
        assert torch.equal(torch.cat([p.event_id_E for p, _ in found]), torch.arange(wanted))
        assert torch.equal(found[0][0].time_P, blocks[0][0].time_P)
        end = int(blocks[1][0].offsets_E1[7])
        assert torch.equal(found[1][0].charge_P, blocks[1][0].charge_P[:end])
        assert torch.equal(found[1][1].signal_P, blocks[1][1].signal_P[:end])
        assert torch.equal(found[1][1].vertex_E3, blocks[1][1].vertex_E3[:7])


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="0 proposals"):
        simulate_block(0, seed=1)
    with pytest.raises(ValueError, match="n_events is 0"):
        next(iter_events(0, seed=1))
    with pytest.raises(ValueError, match="device meta"):
        next(iter_events(1, seed=1, device="meta"))


def test_the_brightest_events_stay_within_bounds() -> None:
    config = replace(CONFIG, energy_min=9e7, hard_energy_min=9e7, track_fraction=0.0, radius=200.0, half_height=200.0)
    pulses, _ = simulate_block(3, seed=1, config=config)
    assert pulses.n_events == 3
    assert 20_000 < pulses.counts_E.max() < 500_000
    assert pulses.charge_P.max() <= CONFIG.max_charge


def test_a_block_that_triggers_nothing() -> None:
    faint = replace(CONFIG, light_yield=1e-3)
    pulses, truth = simulate_block(16, seed=1, config=faint)
    assert pulses.n_events == pulses.n_pulses == truth.energy_E.numel() == 0


def test_bench_reports_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCK_SIZE, "cpu", 128)
    found = bench_simulator("cpu", seconds=0.1)
    assert float(found["proposals_per_s"]) > float(found["events_per_s"]) > 0


@pytest.mark.gpu
def test_gpu_blocks_repeat_and_resemble_cpu_blocks(block) -> None:
    first, again = (simulate_block(4096, seed=3, device="cuda") for _ in range(2))
    for one, two in zip(first, again, strict=True):
        for name, x in vars(one).items():
            assert torch.equal(x, getattr(two, name)), name
    assert first[0].n_events / 4096 == pytest.approx(block[0].n_events / 1024, abs=0.06)
    median = float(first[0].counts_E.double().median())
    assert median == pytest.approx(float(block[0].counts_E.double().median()), rel=0.1)
    for sensor, time, auxiliary in list(events_of(first[0].to("cpu")))[:50]:
        if len(sensor) <= 3000:
            np.testing.assert_array_equal(naive_coincidence(sensor, time), auxiliary == 0)


@pytest.mark.gpu
def test_gpu_stream_equals_its_blocks_one_by_one() -> None:
    streamed = list(iter_events(20_000, seed=4, device="cuda"))
    for number, (pulses, truth) in enumerate(streamed[:-1]):
        alone = simulate_block(BLOCK_SIZE["cuda"], seed=4, block=number, device="cuda")
        for one, two in zip((pulses, truth), alone, strict=True):
            for name, x in vars(one).items():
                if name != "event_id_E":
                    assert torch.equal(x, getattr(two, name)), name
