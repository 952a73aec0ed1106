"""Statistics against closed forms, brute force and simulated coverage."""

from __future__ import annotations

import itertools
import math
import time
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared import bootstrap
from lab_shared.stats import Quantile, bca_interval, holm, paired_sign_flip

FINITE = st.floats(-100, 100).map(lambda v: round(v, 3))


# bootstrap


def test_mean_of_normal_values_has_the_textbook_interval() -> None:
    x = np.random.default_rng(0).normal(5.0, 2.0, 1000)
    low, high = bca_interval(x, resamples=20_000)
    half = 1.96 * x.std() / math.sqrt(x.size)
    assert low == pytest.approx(x.mean() - half, abs=0.04 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.04 * half)


def test_skewed_mean_is_corrected_to_second_order() -> None:
    """Efron (1987): the limits exceed the normal ones by (2 z^2 + 1) skewness sd / (6 n), on both sides."""
    x = np.random.default_rng(1).gamma(0.5, 1.0, 400)
    centred = x - x.mean()
    sd = x.std()
    z = NormalDist().inv_cdf(0.975)
    shift = (2 * z**2 + 1) * np.mean(centred**3) / sd**3 * sd / (6 * x.size)
    low, high = bca_interval(x, resamples=50_000)
    half = z * sd / math.sqrt(x.size)
    assert low == pytest.approx(x.mean() - half + shift, abs=0.03 * half)
    assert high == pytest.approx(x.mean() + half + shift, abs=0.03 * half)
    assert shift > 0.05 * half  # or nothing was tested


@pytest.mark.parametrize("shape", [0.3, 1.0, 20.0])
def test_large_means_by_cumulants_equal_resampling(shape: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(2).gamma(shape, 1.0, 6000)
    fast = bca_interval(x, level=0.9)
    assert fast == bca_interval(x, level=0.9, seed=1)  # nothing was drawn
    monkeypatch.setattr(bootstrap, "_cumulants_of_mean", lambda _: (math.inf, math.inf))
    slow = bca_interval(x, level=0.9, resamples=6000)
    half = 1.645 * x.std() / math.sqrt(x.size)
    np.testing.assert_allclose(fast, slow, atol=0.06 * half)


def test_heavy_tails_are_resampled() -> None:
    x = np.zeros(5000)
    x[0] = 1.0
    low, high = bca_interval(x)
    assert low == 0  # a normal interval would be symmetric about 0.0002
    assert high > 0.0004


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [2, 7, 40])
def test_quantile_draws_have_the_distribution_of_resamples(n: int, q: float) -> None:
    rng = np.random.default_rng(n)
    x = np.sort(rng.normal(size=n))
    fast = np.sort(bootstrap._quantile_draws(x, q, 20_000, rng))
    slow = np.sort(np.quantile(x[rng.integers(0, n, (20_000, n))], q, axis=1))
    grid = np.concatenate([fast, slow])
    distance = np.abs(
        np.searchsorted(fast, grid + 1e-9) / fast.size - np.searchsorted(slow, grid + 1e-9) / slow.size
    ).max()
    assert distance < 1.95 * math.sqrt(2 / 20_000)  # Kolmogorov-Smirnov at p = 0.001


@given(st.lists(FINITE, min_size=2, max_size=12), st.floats(0, 1))
@settings(deadline=None)
def test_quantile_jackknife_is_leave_one_out(values: list[float], q: float) -> None:
    x = np.sort(np.array(values))
    slow = [np.quantile(np.delete(x, i), q) for i in range(x.size)]
    np.testing.assert_allclose(bootstrap._quantile_left_out(x, q), slow, atol=1e-9)


def test_any_statistic_agrees_with_the_fast_paths() -> None:
    x = np.random.default_rng(3).exponential(size=300)
    for stat, general in ((np.mean, lambda v: v.mean()), (np.median, lambda v: np.median(v))):
        fast, slow = bca_interval(x, stat, resamples=4000), bca_interval(x, general, resamples=4000, seed=1)
        np.testing.assert_allclose(fast, slow, atol=0.12 * (fast.high - fast.low))
    assert bca_interval(x, np.median) == bca_interval(x, Quantile(0.5))


def test_grouped_jackknife_has_the_acceleration_of_leave_one_out() -> None:
    x = np.random.default_rng(4).gamma(0.5, size=20_000)

    def acceleration(left_out: np.ndarray) -> float:
        d = left_out.mean() - left_out
        return float(np.sum(d**3) / np.sum(d**2) ** 1.5 / 6)

    exact = acceleration((x.sum() - x) / (x.size - 1))
    assert bootstrap._group_left_out(x, np.mean).size == 1000
    assert acceleration(bootstrap._group_left_out(x, np.mean)) == pytest.approx(exact, rel=0.3)
    small = x[:50]
    np.testing.assert_allclose(bootstrap._group_left_out(small, np.mean), (small.sum() - small) / 49)


@pytest.mark.parametrize(("stat", "truth"), [(np.mean, 1.0), (np.median, math.log(2)), (Quantile(0.75), math.log(4))])
def test_coverage(stat: object, truth: float) -> None:
    """Exponential values, n = 60: the 90% interval holds the truth in 90% of 300 experiments."""
    rng = np.random.default_rng(5)
    hits = 0
    for i in range(300):
        low, high = bca_interval(rng.exponential(size=60), stat, level=0.9, resamples=500, seed=i)
        hits += low <= truth <= high
    assert 0.84 <= hits / 300 <= 0.95  # sd 0.017


@given(st.lists(FINITE, min_size=2, max_size=30), st.sampled_from([np.mean, np.median, Quantile(0.2)]))
@settings(deadline=None, max_examples=50)
def test_interval_is_ordered_and_within_the_values(values: list[float], stat: object) -> None:
    low, high = bca_interval(values, stat, resamples=200)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_interval_is_reproducible_and_moves_with_the_values() -> None:
    x = np.random.default_rng(6).exponential(size=100)
    assert bca_interval(x) == bca_interval(x)
    assert bca_interval(x) != bca_interval(x, seed=1)
    np.testing.assert_allclose(bca_interval(10 + 3 * x), 10 + 3 * np.array(bca_interval(x)))
    assert bca_interval(np.full(30, 0.1)) == pytest.approx((0.1, 0.1))
    assert bca_interval(np.full(6000, 0.1)) == pytest.approx((0.1, 0.1))


def test_two_hundred_thousand_values_take_no_time() -> None:
    x = np.random.default_rng(7).lognormal(3, 1, 200_000)
    start = time.process_time()
    for stat in (np.mean, np.median, Quantile(0.9)):
        bca_interval(x, stat)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([1.0], {}, "at least two"),
        ([[1.0, 2.0]], {}, "one dimension"),
        ([1.0, math.nan, math.inf], {}, "2 of 3 values are not finite"),
        ([1.0, 2.0], {"level": 95}, "level=95"),
        ([1.0, 2.0], {"resamples": 10}, "resamples=10"),
    ],
)
def test_interval_refuses(values: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bca_interval(values, **options)


def test_quantile_refuses() -> None:
    with pytest.raises(ValueError, match=r"q=50"):
        Quantile(50)


# paired test


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=9))
@settings(deadline=None)
def test_exact_test_equals_brute_force(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    d = a - b
    sums = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=d.size)]
    result = paired_sign_flip(a, b)
    assert result.p == np.mean([s >= abs(d.sum()) - 1e-9 for s in sums])
    assert result.exact
    assert result.flips == 2**d.size
    assert result.difference == pytest.approx(d.mean())
    assert paired_sign_flip(b, a).p == result.p


def test_smallest_possible_p() -> None:
    for n in (1, 5, 20):
        assert paired_sign_flip(np.arange(1.0, n + 1), np.zeros(n)).p == 2.0 ** (1 - n)
    assert paired_sign_flip([3.0, 4.0], [3.0, 4.0]).p == 1


def test_monte_carlo_agrees_with_the_normal_limit() -> None:
    rng = np.random.default_rng(8)
    d = rng.normal(0.1, 1.0, 400)
    result = paired_sign_flip(d, np.zeros(400), resamples=20_000)
    z = abs(d.sum()) / math.sqrt(np.sum(d**2))
    assert result.p == pytest.approx(2 * (1 - NormalDist().cdf(z)), abs=0.01)
    assert not result.exact
    assert result.flips == 20_000
    far = paired_sign_flip(d + 5, np.zeros(400), resamples=999)
    assert far.p == 1 / 1000  # never 0


def test_p_is_uniform_when_nothing_differs() -> None:
    rng = np.random.default_rng(9)
    p = np.array([paired_sign_flip(rng.exponential(size=10), rng.exponential(size=10)).p for _ in range(400)])
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * math.sqrt(level / 400))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([1.0], [1.0, 2.0], "same positive number"), ([], [], "positive number"), ([math.nan], [1.0], "1 of 1")],
)
def test_paired_test_refuses(a: list, b: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_sign_flip(a, b)


# families of tests


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=40)
def test_holm_rejects_what_the_stepwise_procedure_rejects(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.2):
        rejected, order = set(), np.argsort(p_values, kind="stable")
        for k, i in enumerate(order):
            if p_values[i] * (len(p_values) - k) > level:
                break
            rejected.add(int(i))
        assert {i for i, p in enumerate(adjusted) if p <= level} == rejected


@given(st.lists(st.floats(0, 1), max_size=8))
@settings(max_examples=40)
def test_holm_is_monotone_and_at_least_p(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for a, p in zip(adjusted, p_values, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_holm_refuses(p: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, p])
