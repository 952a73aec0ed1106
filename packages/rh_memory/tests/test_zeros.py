"""Zeros against certified ones, and what must not depend on how they were computed."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.testing import assert_parity
from rh_memory.zeros import chebyshev, layout, riemann_siegel, theta
from rh_memory.zeros.generate import compute_chunk
from rh_memory.zeros.roots import find_zeros, newton

CPU = torch.device("cpu")


def errors(centre, offset, first_index, certified):
    """|error| of every certified zero within the run of zeros that starts at first_index."""
    inside = (certified.n >= first_index) & (certified.n < first_index + len(centre))
    k = certified.n[inside] - first_index
    assert len(k)
    return np.abs((np.asarray(centre)[k] - certified.high[inside]) + np.asarray(offset)[k] - certified.low[inside])


def test_the_first_zeros_are_exact(zeros, certified):
    assert errors(zeros.centre[:1000], zeros.offset[:1000], 1, certified).max() < 1e-13


def test_all_certified_zeros_are_met_to_1e_11(zeros, certified):
    assert errors(zeros.centre, zeros.offset, 1, certified).max() < 1e-11
    assert np.isin(np.arange(1_747_000, 1_748_000), certified.n).all()  # as many in a row as RESULTS.md says
    high = np.unique(certified.n[certified.n > 20_000] // 400)
    checked = 0
    for group in high:
        n = certified.n[certified.n // 400 == group]
        middle = theta.height_of_count(float(n[0]))
        lower = int(middle) - 200
        chunk = compute_chunk(lower, lower + 1024)
        error = errors(chunk.centre, chunk.offset, chunk.before + 1, certified)
        checked += len(error)
        assert error.max() < 1e-11, (n[0], error.max())
    assert checked >= (certified.n > 20_000).sum()


def test_the_certified_zeros_are_arbs(certified, monkeypatch):
    flint = pytest.importorskip("flint")
    monkeypatch.setattr(flint.ctx, "prec", 120)
    for k in (0, 500, 1003, 1100):
        exact = flint.acb.zeta_zero(int(certified.n[k])).imag
        assert abs(float(exact - flint.arb(float(certified.high[k]))) - certified.low[k]) < 1e-15


def test_a_second_oracle(zeros):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(25):
        for n in (1, 77):
            exact = mpmath.zetazero(n).imag
            assert abs(float(exact - mpmath.mpf(zeros.centre[n - 1])) - zeros.offset[n - 1]) < 1e-11


@pytest.mark.parametrize(("first_centre", "low"), [(24, True), (2984, True), (3048, False), (200_040, False)])
def test_z_against_mpmath(first_centre, low):
    mpmath = pytest.importorskip("mpmath")
    shared = layout.layout(max(first_centre + 100.0, 3100.0), low, 8.0, CPU)
    blocks = riemann_siegel.Blocks(np.array([first_centre, first_centre + 32.0]), CPU)
    z = riemann_siegel.hardy_z(blocks, shared)
    with mpmath.workdps(30):
        for i, j in ((0, 0), (1, 40), (1, len(shared.node_K) - 1)):
            exact = mpmath.siegelz(mpmath.mpf(float(blocks.centre[i])) + mpmath.mpf(float(shared.node_K[j])))
            assert abs(float(exact) - float(z[i, j])) < (5e-12 if first_centre == 3048 else 3e-14)


@settings(max_examples=8, deadline=None)
@given(st.integers(3100, 60_000_000), st.floats(-16, 16))
def test_theta_at_any_height(centre, d):
    mpmath = pytest.importorskip("mpmath")
    c = float(centre // 2 * 2)
    phase, high, low = (torch.tensor(x) for x in theta.theta_at(np.array([c - 320, c, c + 32])))
    place = torch.tensor([d], dtype=torch.float64)
    mine = float(phase[1] + theta.turns(place, high[1], low[1]) + theta.stirling_tail(c + place) / (2 * math.pi))
    mine += ((c + d) * math.log1p(d / c) - d) / (4 * math.pi)
    with mpmath.workdps(40):
        exact = mpmath.siegeltheta(mpmath.mpf(c) + mpmath.mpf(d)) / (2 * mpmath.pi)
        difference = exact - mpmath.mpf(mine)
        assert abs(float(difference - mpmath.nint(difference))) < 2e-15


def test_logarithms_hold_far_more_than_a_float():
    mpmath = pytest.importorskip("mpmath")
    high, low = theta.log_turns(2000)
    with mpmath.workdps(40):
        for n in (2, 97, 1024, 1999):
            exact = mpmath.log(n) / (2 * mpmath.pi)
            assert abs(float(exact - mpmath.mpf(high[n - 1]) - mpmath.mpf(low[n - 1]))) < 1e-23
    assert np.all(high * 2**25 == np.round(high * 2**25))


def test_the_remainder_against_a_direct_derivative():
    """C_0(p) = cos(2 pi (p^2 - p - 1/16)) / cos(2 pi p), C_1 = -C_0''' / (96 pi^2)."""
    mpmath = pytest.importorskip("mpmath")

    def psi(p):
        return mpmath.cos(2 * mpmath.pi * (p * p - p - mpmath.mpf(1) / 16)) / mpmath.cos(2 * mpmath.pi * p)

    c = riemann_siegel.remainder_coefficients()
    with mpmath.workdps(30):
        for p in (0.1, 0.4, 0.93):
            z = p - 0.5
            assert_parity(sum(a * z ** (2 * j) for j, a in enumerate(c[0])), float(psi(mpmath.mpf(p))), atol=1e-15)
            third = float(-mpmath.diff(psi, p, 3) / (96 * mpmath.pi**2))
            assert_parity(sum(a * z ** (2 * j + 1) for j, a in enumerate(c[1])), third, atol=1e-14)


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 31), st.sampled_from([5000, 400_000]))
def test_block_borders_do_not_matter(shift, lower):
    """The grid of blocks moved: the same zeros."""
    here, there = find_zeros(lower, 34, CPU), find_zeros(lower - shift, 36, CPU)
    heights, other = (x[0] + x[1] for x in (here, there))
    other = other[(other >= heights[0] - 1e-8) & (other <= heights[-1] + 1e-8)]
    assert_parity(other, heights, atol=2e-9 if lower > 1e5 else 1e-10)


def test_overlap_matters():
    """Blocks computed alone, without their neighbours' samples, lose zeros at their borders."""
    whole = find_zeros(100_008, 40, CPU)[0]
    parts = sum(len(find_zeros(100_008 + 32 * i, 1, CPU)[0]) for i in range(40))
    assert parts < len(whole)


def test_pairs_hidden_between_samples_are_found():
    """The tightest pair below 2 million (0.003 apart) lies between two samples."""
    lower = int(theta.height_of_count(1_115_578)) - 512
    centre, offset, counts = find_zeros(lower, 34, CPU)
    gap = np.diff((centre + offset).numpy())
    assert gap.min() == pytest.approx(0.002958654, abs=1e-8)
    assert counts["hidden_pairs"] >= 1


def test_sparse_sampling_is_repaired_by_finer_sampling(monkeypatch):
    monkeypatch.setattr("rh_memory.zeros.generate._SAMPLES_PER_GAP", (1.0, 8.0))
    chunk = compute_chunk(100_000, 101_024)
    assert chunk.statistics["samples_per_gap"] == 8.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-0.95, 0.95), min_size=1, max_size=6, unique=True))
def test_newton_stays_in_its_bracket(roots):
    roots = sorted(roots)
    if min(np.diff([-1.0, *roots, 1.0])) < 1e-3:
        return
    series = torch.tensor(np.polynomial.chebyshev.chebfromroots(roots))
    borders = [-1.0, *((a + b) / 2 for a, b in pairwise(roots)), 1.0]
    left, right = torch.from_numpy(np.array(borders[:-1])), torch.from_numpy(np.array(borders[1:]))
    series_DN = torch.cat([series, series.new_zeros(2)])[:, None].repeat(1, len(roots))
    positive = chebyshev.evaluate(series_DN, left)[0] > 0
    found = newton(series_DN, left, right, (left + right) / 2, positive)
    assert_parity(found, np.array(roots), atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_chebyshev_matrices(count):
    x = torch.linspace(-1, 1, 50, dtype=torch.float64)
    series = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = chebyshev.basis(chebyshev.nodes(count), count) @ series
    assert_parity(values @ chebyshev.values_to_series(count), series, atol=1e-13)
    if count > 2:
        value, slope = chebyshev.evaluate(series[:, None].repeat(1, 50), x)
        reference = np.polynomial.chebyshev.Chebyshev(series.numpy())
        assert_parity(value, reference(x.numpy()), atol=1e-13)
        assert_parity(slope, reference.deriv()(x.numpy()), atol=1e-11)
        derived = series @ chebyshev.derivative(count)
        assert_parity(derived[:-1], reference.deriv().coef, atol=1e-12)


@pytest.mark.gpu
def test_cuda_gives_the_same_zeros():
    mine, theirs = compute_chunk(500_008, 500_008 + 4096, "cuda"), compute_chunk(500_008, 500_008 + 4096, "cpu")
    assert mine.before == theirs.before
    assert_parity(mine.centre.cpu(), theirs.centre, atol=0)
    assert_parity(mine.offset.cpu(), theirs.offset, atol=1e-12)
