"""The simulator's packed hits, merging, triggers and read-out against naive loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.geometry import icecube86
from iceaggr.sim import hits, trigger
from iceaggr.sim.config import SimConfig
from iceaggr.sim.detector import detector
from iceaggr.sim.photons import merge

CONFIG = SimConfig()


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, hits.MAX_EVENTS - 1),
    st.integers(0, 5159),
    st.integers(-39_000, 91_000),
    st.integers(1, 110_480),
    st.booleans(),
)
def test_hits_keep_their_fields(event: int, sensor: int, time: int, steps: int, signal: bool) -> None:
    packed = hits.pack(
        torch.tensor([event]),
        torch.tensor([sensor]),
        torch.tensor([float(time)]),
        torch.tensor([steps / 40], dtype=torch.float64),
        torch.tensor([signal]),
    )
    found = (
        hits.event(packed),
        hits.sensor(packed),
        hits.time(packed) - hits.TIME_OFFSET,
        hits.steps(packed),
    )
    assert [int(x) for x in found] == [event, sensor, time, steps]
    assert bool(packed & 1) == signal


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_merge_equals_the_naive_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 60
    sensor, time = rng.integers(0, 4, n), rng.integers(0, 1500, n)
    steps, signal = rng.integers(1, 80, n), rng.integers(0, 2, n)
    packed = hits.join(*(torch.from_numpy(x) for x in (sensor, time, steps, signal)))
    unlimited = replace(CONFIG, saturation=1e12)
    found = merge(hits.sort_int64(packed), unlimited)
    expected: dict[tuple[int, int], list[int]] = {}
    for i in sorted(range(n), key=lambda i: (sensor[i], time[i], steps[i])):
        since = time[i] - time[sensor == sensor[i]].min()
        fine = since < CONFIG.fine_length
        slot = since / CONFIG.fine_bin if fine else 1000 + (since - CONFIG.fine_length) / CONFIG.coarse_bin
        pulse = expected.setdefault((int(sensor[i]), int(slot)), [int(time[i]), 0, 0])
        pulse[1] += int(steps[i])
        pulse[2] |= int(signal[i])
    rows = zip(
        *(x.tolist() for x in (hits.sensor(found), hits.time(found), hits.steps(found), found & 1)),
        strict=True,
    )
    assert sorted(rows) == sorted((key[0], *pulse) for key, pulse in expected.items())


def naive_triggers(sensor: np.ndarray, time: np.ndarray) -> set[tuple[int, int]]:
    """(start, end) of every satisfied window, one event, by the definitions."""
    array = icecube86()
    found = set()
    order = np.lexsort((sensor, time))
    sensor, time = sensor[order], time[order]
    deepcore = detector(array, torch.device("cpu")).deepcore_S.numpy()
    for members, need, window in ((sensor < 78 * 60, 8, 5000), (deepcore[sensor], 3, 2500)):
        at = time[members]
        found |= {(at[i], at[i + need - 1]) for i in range(len(at) - need + 1) if at[i + need - 1] - at[i] <= window}
    for i in range(len(time)):
        away = array.xyz[sensor] - array.xyz[sensor[i]]
        next_few = np.arange(len(time)) > i
        volume = next_few & (time - time[i] <= 1000) & (np.hypot(*away[:, :2].T) <= 175) & (abs(away[:, 2]) <= 37.5)
        if volume.sum() >= 3:
            found.add((time[i], time[volume].max()))
        string = next_few & (time - time[i] <= 1500) & (sensor // 60 == sensor[i] // 60)
        string &= abs(sensor - sensor[i]) <= 6
        doms = np.array(sorted({*sensor[string], sensor[i]}))
        if any(((doms >= low) & (doms < low + 7)).sum() >= 5 for low in range(sensor[i] - 6, sensor[i] + 1)):
            found.add((time[i], time[string].max()))
    return found


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_triggers_equal_the_naive_loop(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    near = rng.choice([35 * 60 + 30, 85 * 60 + 30, 77 * 60 + 55])
    sensor = near + rng.choice(9, n) - 4
    time = rng.choice(6000, n, replace=False)
    array = detector(icecube86(), torch.device("cpu"))
    windows = trigger.triggers(torch.full((n,), 7), torch.from_numpy(sensor), torch.from_numpy(time), array)
    assert (windows >> 34 == 7).all()
    found = {(w >> 17 & 0x1FFFF, w & 0x1FFFF) for w in windows.tolist()}
    assert found == naive_triggers(sensor, time)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_readout_equals_the_naive_loop(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    event, start = rng.integers(0, 3, n), rng.integers(0, 60_000, n)
    end = start + rng.integers(0, 5000, n)
    windows = hits.sort_int64(torch.from_numpy((event << 34) | (start << 17) | end))
    triggered, first, last = trigger.readout(windows, 3, CONFIG)
    for e in range(3):
        mine = sorted(zip(start[event == e], end[event == e], strict=True))
        assert bool(triggered[e]) == bool(mine)
        if mine:
            reach = mine[0][1]
            for s, t in mine[1:]:
                if s - reach > 10_000:
                    break
                reach = max(reach, t)
            assert (int(first[e]), int(last[e])) == (mine[0][0], reach)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("n", [0, 1, 511, 512, 513, 262_144, 300_001])
def test_running_max_equals_cummax(n, device) -> None:
    x = torch.randint(-(1 << 40), 1 << 40, (n,), generator=torch.Generator().manual_seed(n))
    expected = x.cummax(0).values if n else x
    assert torch.equal(hits.running_max(x.to(device)).cpu(), expected)
