"""The completeness verdict: it must accept what is complete and refuse what is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rh_memory.zeros.generate import compute_chunk
from rh_memory.zeros.theta import height_of_count, smooth_count, theta
from rh_memory.zeros.verify import count_below, gram_statistics


@settings(max_examples=20, deadline=None)
@given(st.floats(700, 17_000))
def test_turing_pins_the_count(zeros, point):
    true = int(np.searchsorted(zeros.height, point))
    assert count_below(point, zeros.height, 32) == (true, true)


@settings(max_examples=10, deadline=None)
@given(st.integers(2000, 15_000))
def test_missing_zeros_widen_or_contradict_but_never_mislead(zeros, k):
    """Two zeros taken out next to the point: the true count stays between the bounds."""
    point = float(zeros.height[k]) - 1e-6
    low, high = count_below(point, np.delete(zeros.height, [k + 3, k + 4]), 32)
    assert low <= k <= high


def test_too_low_for_turing(zeros):
    with pytest.raises(ValueError, match="heights above 527"):
        count_below(540.0, zeros.height, 32)


def test_smooth_count_inverts():
    for count in (1, 10, 1e3, 2e6, 1e8):
        assert smooth_count(height_of_count(count)) == pytest.approx(count, rel=1e-9)


def test_gram_statistics_against_the_definition(zeros):
    """S(g_n) by counting zeros below Gram points found one by one."""
    last = 2000.0
    expected: dict[str, int] = {}
    n = 0
    while (gram := height_of_count(n + 1)) < last:
        s = int(np.searchsorted(zeros.height, gram)) - (n + 1)
        expected[str(s)] = expected.get(str(s), 0) + 1
        n += 1
    result = gram_statistics(torch.from_numpy(zeros.height[zeros.height < last].copy()), 0, 8.0, last)
    assert result["s_histogram"] == dict(sorted(expected.items(), key=lambda item: int(item[0])))
    assert result["gram_points"] == n
    assert result["s_histogram"]["-1"] > 0


def test_the_manifest_says_complete(zeros):
    assert zeros.manifest["verdict"] == "complete"
    assert set(zeros.manifest["s_histogram"]) == {"-1", "0", "1"}
    assert zeros.manifest["rosser_exceptions"] == []
    assert zeros.manifest["zeros_below"] >= 20_000


@pytest.mark.parametrize("n", [50, 3000, 19_990])
def test_count_against_n_of_t(zeros, n):
    assert abs(n + 0.5 - smooth_count(float(zeros.height[n]))) < 1.5


def test_the_first_rosser_exception_is_at_13999525(certified):
    """A Gram block of length 2 without zeros, S(g_13999527) = -2."""
    lower = int(height_of_count(13_999_526)) - 500
    chunk = compute_chunk(lower, lower + 1024)
    assert chunk.statistics["rosser_exceptions"] == [{"n": 13_999_525, "length": 2, "zeros": 0}]
    assert chunk.statistics["s_histogram"]["-2"] == 1
    k = certified.n >= 13_999_520
    mine = (certified.n[k] - chunk.before - 1).tolist()
    heights = (chunk.centre + chunk.offset)[mine].numpy()
    assert np.abs(heights - certified.high[k]).max() < 2e-9
    in_block = theta(torch.from_numpy(heights)) / math.pi
    assert not ((in_block > 13_999_525) & (in_block < 13_999_527)).any()
