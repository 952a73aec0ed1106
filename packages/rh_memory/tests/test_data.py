"""Unfolding, splits, windows and controls."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.testing import assert_parity
from rh_memory import sine_process
from rh_memory.data import controls
from rh_memory.data.controls import LOG_HEIGHT, default_gue, gue_spacings, shuffled
from rh_memory.data.unfold import Spacings, spacings, unfold
from rh_memory.data.windows import SpacingData, SplitError, rows, split
from rh_memory.zeros.store import Zeros


@pytest.fixture(scope="module")
def unfolded(zeros):
    return unfold(zeros)


def test_unfolding_against_the_definition(zeros):
    """u(b) - u(a) with 40 digits."""
    mpmath = pytest.importorskip("mpmath")
    fine = spacings(zeros.centre, zeros.offset)
    with mpmath.workdps(40):

        def u(k):
            g = mpmath.mpf(zeros.centre[k]) + mpmath.mpf(zeros.offset[k])
            return g / (2 * mpmath.pi) * mpmath.log(g / (2 * mpmath.pi * mpmath.e))

        for k in (0, 1, 500, 19_000):
            assert float(u(k + 1) - u(k)) == pytest.approx(fine[k], abs=1e-14)


def test_unfolded_statistics(unfolded, zeros):
    assert len(unfolded) == 19_999
    fine = spacings(zeros.centre, zeros.offset)
    # The mean is the change of u over the number of gaps; S at both ends moves it by at most 1/N.
    assert fine.mean() == pytest.approx(1, abs=1e-4)
    assert unfolded.s.dtype == np.float32
    assert 0.38 < unfolded.s.std() < 0.42
    lag = np.corrcoef(fine[1:], fine[:-1])[0, 1]
    assert -0.39 < lag < -0.33
    assert_parity(unfolded.log_height, np.log(zeros.height[1:] / (2 * math.pi)), atol=1e-6)
    np.testing.assert_array_equal(unfolded.centre + unfolded.offset, zeros.height[1:])


@pytest.mark.slow
def test_mean_one_over_two_million_zeros(tmp_path):
    from rh_memory.zeros.store import default_zeros

    s = unfold(default_zeros(2_001_052, tmp_path))
    assert len(s) == 2_001_051
    assert s.s.mean(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert s.s.std(dtype=np.float64) == pytest.approx(0.40752, abs=2e-5)
    assert float(s.s.min()) == pytest.approx(0.005447, abs=1e-6)
    assert float(s.s.max()) == pytest.approx(3.3035, abs=1e-4)


def test_unfolding_in_float32_is_a_trap():
    """What this package avoids: u near 2e6 in float32 spoils spacings by 0.1; one float64 height costs 1e-9."""
    height = 1e6 + np.cumsum(np.full(1000, 0.5241))
    u = (height / (2 * np.pi) * np.log(height / (2 * np.pi * np.e))).astype(np.float32)
    exact = spacings(np.floor(height), height - np.floor(height))
    assert np.abs(np.diff(u) - exact).max() > 0.05
    assert exact.std() < 1e-4


def test_unfolding_in_chunks(zeros, unfolded, monkeypatch):
    monkeypatch.setattr("rh_memory.data.unfold._CHUNK", 777)
    np.testing.assert_array_equal(unfold(zeros).s, unfolded.s)


def test_unfolding_nothing():
    assert len(unfold(Zeros(np.empty(0), np.empty(0)))) == 0


def test_the_original_split():
    parts = split(2_001_051)
    assert parts.train == ((0, 7035 * 256),)
    assert parts.val_tail == ((7035 * 256, 7816 * 256),)
    assert len(rows(parts.train)) == 7035
    assert len(rows(parts.val_tail)) == 781
    assert len(parts.starts("train")) == 7035 * 256 - 256
    assert parts.val[0][1] == parts.test[0][0]
    assert parts.val[0][0] == parts.val_tail[0][0]
    assert parts.test[0][1] == parts.val_tail[0][1]


@settings(max_examples=15, deadline=None)
@given(st.integers(30_000, 3_000_000), st.sampled_from(["tail", "interleaved"]), st.sampled_from([0, 1024, 3000]))
def test_splits_keep_apart(n, kind, segment):
    try:
        parts = split(n, kind, segment=segment)
    except SplitError:
        assert n < 60_000
        return
    ranges = sorted((*r, name) for name in ("train", "val", "test") for r in getattr(parts, name))
    assert ranges[0][0] >= 0
    assert ranges[-1][1] <= n
    for (_, end, a), (begin, _, b) in pairwise(ranges):
        assert begin >= end
        if kind == "interleaved" and a != b:
            assert begin - end >= 256
    for first, last, _ in ranges:
        assert segment == 0 or first // segment == (last - 1) // segment
    for name in ("train", "val", "test"):
        starts = parts.starts(name, stride=101)
        inside = [(first <= starts) & (starts + 257 <= last) for first, last in getattr(parts, name)]
        assert torch.stack(inside).any(0).all()
    share = sum(b - a for a, b in parts.train) / n
    assert 0.7 < share < 0.93


def test_too_few_for_a_split():
    with pytest.raises(SplitError, match=r"too few .* 10,240 are enough"):
        split(10_239)
    split(10_240)
    with pytest.raises(SplitError, match=r"too few .* 10,260 are enough"):
        split(10_000, "interleaved")
    split(10_260, "interleaved")
    with pytest.raises(SplitError, match="segments of 200"):
        split(1_000_000, segment=200)
    with pytest.raises(SplitError, match="no window of 9000"):
        split(60_000).starts("val", width=9000)


def test_windows_by_the_definition(unfolded):
    data = SpacingData(unfolded)
    starts = torch.tensor([0, 7, 19_000])
    batch = data.window(starts, 33)
    height = unfolded.centre + unfolded.offset
    for b, start in enumerate(starts.tolist()):
        np.testing.assert_array_equal(batch.s_BW[b], unfolded.s[start : start + 33])
        np.testing.assert_array_equal(batch.log_height_BW[b], unfolded.log_height[start : start + 33])
        assert_parity(batch.gamma_BW[b], height[start : start + 33] - height[start], atol=1e-11)
    assert batch.gamma_BW.dtype == torch.float64
    assert batch.gamma_BW[:, 0].abs().max() == 0
    assert_parity(batch.inputs().s_BW, batch.s_BW[:, :-1], atol=0)
    assert_parity(batch.targets(), batch.s_BW[:, 1:], atol=0)
    assert len(batch.to("cpu")) == 3


def test_mirrored_windows_are_those_of_the_zeros_below_the_real_line(zeros, unfolded):
    """The zeros at -gamma, in increasing order, unfolded and cut as those above are."""
    below = -zeros.height[::-1]
    s = spacings(zeros.centre, zeros.offset)[::-1]
    log_height = np.log(-below[1:] / (2 * math.pi))
    starts, width = torch.tensor([3, 7, 19_000 - 50]), 33
    batch = SpacingData(unfolded).window(starts, width, torch.tensor([True, False, True]))
    for b, start in ((0, 3), (2, 19_000 - 50)):
        i = len(s) - start - width  # where the same spacings begin, counted from the far end
        assert_parity(batch.s_BW[b], s[i : i + width].astype(np.float32), atol=0)
        ends = below[i + 1 : i + 1 + width]
        assert_parity(batch.gamma_BW[b], ends - ends[0], atol=1e-10)
        assert_parity(batch.log_height_BW[b], log_height[i : i + width], atol=1e-6)
    plain = SpacingData(unfolded).window(starts, width)
    for name in ("s_BW", "log_height_BW", "gamma_BW"):
        assert_parity(getattr(batch, name)[1], getattr(plain, name)[1], atol=0)


def test_window_heights_keep_their_digits():
    """At 1e12 one float64 resolves 1e-4; the pair keeps the differences."""
    offset = np.linspace(0, 3, 50)
    s = Spacings(np.ones(50, np.float32), np.full(50, 1e12), offset, np.ones(50, np.float32))
    batch = SpacingData(s).window(torch.tensor([5]), 20)
    assert_parity(batch.gamma_BW[0], offset[5:25] - offset[5], atol=1e-15)


def test_gue_against_theory():
    """Simulated GUE bulk spacings: mean 1, std 0.4243 (Gaudin), correlation of neighbours -0.308."""
    s = gue_spacings(40_000, seed=0, size=256)
    x = s.s.astype(np.float64)
    assert len(s) == 40_000
    assert x.mean() == pytest.approx(1, abs=2e-3)
    assert x.std() == pytest.approx(0.4243, abs=6e-3)
    pieces = x[: len(x) // s.segment * s.segment].reshape(-1, s.segment) - 1
    lag = (pieces[:, 1:] * pieces[:, :-1]).mean() / x.var()
    assert lag == pytest.approx(-0.308, abs=0.015)
    # Level repulsion: P(s < 0.1) is about pi^2 / 9 * 1e-3, a Poisson process has 0.095.
    assert (x < 0.1).mean() == pytest.approx(math.pi**2 / 9 * 1e-3, abs=6e-4)
    assert np.all(s.log_height == np.float32(LOG_HEIGHT))
    assert_parity((s.centre + s.offset), np.cumsum(x), atol=1e-6)


def test_gue_gaps_follow_gaudin_and_are_rigid():
    """Simulated, at the default size: Kolmogorov-Smirnov distance to the exact gap law, and the number variance."""
    s = gue_spacings(30_000, seed=1)
    x = s.s.astype(np.float64)
    grid = np.linspace(0, 4, 4001)
    density = np.exp(sine_process.gap_log_density(grid[1:]))
    cdf = np.concatenate([[0.0], np.cumsum((density + np.concatenate([[0.0], density[:-1]])) / 2 * 1e-3)])
    assert cdf[-1] == pytest.approx(1, abs=1e-5)
    empirical = (np.arange(len(x)) + 0.5) / len(x)
    distance = np.abs(np.interp(np.sort(x), grid, cdf) - empirical).max()
    assert distance < 1.63 / math.sqrt(len(x))  # 1 % of independent samples lie above
    assert s.segment == 768
    points = np.cumsum(x[: len(x) // 768 * 768].reshape(-1, 768), axis=1)
    lengths = np.array([1.0, 5.0, 20.0])
    for length, expected in zip(lengths, sine_process.number_variance(lengths), strict=True):
        counts = [
            np.searchsorted(row, starts + length) - np.searchsorted(row, starts)
            for row in points
            for starts in [np.arange(1.0, row[-1] - length - 1, 0.5)]
        ]
        assert np.mean((np.concatenate(counts) - length) ** 2) == pytest.approx(expected, rel=0.04)


def test_tridiagonal_eigenvalues_are_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    diagonal, off = rng.standard_normal(50), rng.random(49)
    expected = linalg.eigvalsh_tridiagonal(diagonal, off)
    np.testing.assert_allclose(controls._tridiagonal_eigenvalues(diagonal.copy(), off.copy()), expected, atol=1e-13)


def test_gue_is_simulated_once_and_again_when_damaged(tmp_path, monkeypatch):
    first = default_gue(1000, 3, tmp_path)
    np.testing.assert_array_equal(first.s, gue_spacings(1000, 3).s)
    calls = []
    monkeypatch.setattr(controls, "gue_spacings", lambda n, seed: calls.append(n) or gue_spacings(n, seed))
    np.testing.assert_array_equal(default_gue(1000, 3, tmp_path).s, first.s)
    assert not calls
    path = tmp_path / "gue_1000_seed3.npy"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    np.testing.assert_array_equal(default_gue(1000, 3, tmp_path).s, first.s)
    assert calls == [1000]
    assert json.loads((tmp_path / "gue_1000_seed3.json").read_text())["bulk"] == controls.BULK


def test_gue_depends_on_the_seed_alone():
    np.testing.assert_array_equal(gue_spacings(100, 1, size=64).s, gue_spacings(100, 1, size=64).s)
    assert not np.array_equal(gue_spacings(100, 1, size=64).s, gue_spacings(100, 2, size=64).s)


def test_shuffled_keeps_only_the_marginal(unfolded):
    s = shuffled(unfolded, seed=0)
    np.testing.assert_array_equal(np.sort(s.s), np.sort(unfolded.s))
    assert abs(np.corrcoef(s.s[1:], s.s[:-1])[0, 1]) < 0.03
    assert len(np.unique(s.log_height)) == 1
    assert not np.array_equal(shuffled(unfolded, seed=1).s, s.s)
