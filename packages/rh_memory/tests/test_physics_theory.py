"""The sine process and the arithmetic predictions against independent formulas."""

import math

import numpy as np
import pytest
import torch
from lab_shared.testing import assert_parity
from rh_memory import arithmetic, physics, readout, sine_process


def test_exact_gap_has_the_published_moments():
    moments = sine_process.gap_moments()
    assert moments["mean"] == pytest.approx(1, abs=1e-12)
    assert moments["std"] == pytest.approx(0.42426, abs=1e-5)
    assert moments["entropy"] == pytest.approx(0.5330, abs=5e-5)
    assert sine_process.surmise_entropy() == pytest.approx(0.5288, abs=5e-5)


def test_gap_density_is_the_second_derivative_of_the_gap_probability():
    s, h = np.linspace(0.3, 3.3, 11), 1e-3
    e = [sine_process.gap_probability(s + d) for d in (-h, 0, h)]
    assert_parity(np.exp(sine_process.gap_log_density(s)), (e[0] - 2 * e[1] + e[2]) / h**2, atol=5e-6)


def test_joint_gap_density_integrates_to_the_marginal():
    x, w = np.polynomial.legendre.leggauss(60)
    second = 3.0 * (1 + x)
    points = torch.from_numpy(np.stack([0 * second, 0 * second + 0.7, 0.7 + second], axis=1))
    joint = np.exp(sine_process.janossy_log(points).numpy())
    assert 3.0 * w @ joint == pytest.approx(math.exp(sine_process.gap_log_density(np.array([0.7]))[0]), rel=1e-9)


def test_number_variance_matches_the_closed_form():
    sici = pytest.importorskip("scipy.special").sici
    L = np.array([0.1, 1.0, 3.3, 20.0])
    si, ci = sici(2 * np.pi * L)
    closed = (np.log(2 * np.pi * L) + np.euler_gamma + 1 - np.cos(2 * np.pi * L) - ci) / np.pi**2
    assert_parity(sine_process.number_variance(L), closed + L * (1 - 2 / np.pi * si), atol=1e-12)


def test_zeta_on_its_line_matches_mpmath():
    mp = pytest.importorskip("mpmath")
    e = np.array([0.3, 14.13, 50.0])
    zeta, curvature = arithmetic.zeta_line(e)
    for i, x in enumerate(e):
        z, d1, d2 = (complex(mp.zeta(mp.mpc(1, x), derivative=k)) for k in range(3))
        assert abs(zeta[i] - z) < 1e-11
        assert abs(curvature[i] - (d2 / z - (d1 / z) ** 2)) < 1e-9


def test_far_pairs_dip_at_the_lowest_zeros():
    e = np.linspace(10, 28, 1801)
    curve = arithmetic.pair_correlation(e, 1e6)
    for zero in (14.134725, 21.022040, 25.010858):
        near = np.abs(e - zero) < 1
        assert abs(e[near][curve[near].argmin()] - zero) < 0.1


def test_number_variance_with_primes_saturates():
    L = np.array([0.2, 60.0, 120.0])
    zeta, gue = arithmetic.number_variance(L, 1e6), sine_process.number_variance(L)
    assert zeta[0] == pytest.approx(gue[0], rel=2e-3)
    assert zeta.max() < 0.5 < gue[1] < gue[2]


def test_far_distances_match_all_pairs():
    x = np.sort(np.random.default_rng(0).uniform(0, 40, 90))
    d = (x[None] - x[:, None])[np.triu_indices(90, 1)]
    assert_parity(physics._distances(x, 7.0, 14), np.histogram(d[d < 7], 14, (0, 7))[0].astype(float), atol=0)


def test_form_factor_finds_a_planted_line():
    rng = np.random.default_rng(1)
    t = np.sort(rng.uniform(1e6, 1e6 + 9000, 40_000))
    kept = t[rng.random(t.size) < 0.5 * (1 + 0.5 * np.cos(t * math.log(5)))]
    peaks = physics.form_factor_peaks(physics.form_factor(kept), limit=12)
    height = dict(zip(peaks["n"].tolist(), peaks["peak over background"], strict=True))
    assert height.pop(5) > 50
    assert max(height.values()) < 10


def test_lines_and_law_are_read_off_data_made_by_the_law():
    from rh_memory.data.unfold import Spacings

    rng, n = np.random.default_rng(2), 8_000
    gamma = 1e6 + np.cumsum(rng.uniform(0.3, 0.75, n))
    middle = physics.mid_gap(np.concatenate([gamma[:1], gamma[:-1]]))
    kinds, labels, _ = readout.frequencies()
    s = 1 + 0.05 * rng.standard_normal(n)
    for kind, label in zip(kinds, labels, strict=True):
        if kind == "prime power":
            q = int(label)
            order = next(r for r in range(1, 8) if round(q ** (1 / r)) ** r == q and _is_prime(round(q ** (1 / r))))
            s += arithmetic.line_amplitude(q, order, 1e6) * np.cos(middle * math.log(q))
    spacings = Spacings(s.astype(np.float32), gamma, np.zeros(n), np.log(gamma / 2 / np.pi).astype(np.float32))
    index = np.arange(1, n)
    columns = readout.lines(spacings, index, 1 + 0.5 * (s[index] - 1))
    law = readout.law(columns, 1e6, "zeros")
    assert law["exponent"]["value"] == pytest.approx(0.5, abs=0.02)
    assert law["prefactor"]["value"] == pytest.approx(2 / math.pi, rel=0.05)
    assert law["powers"] == pytest.approx(1, abs=0.1)
    found = readout.learned(columns)
    assert found["power_predicted"] == pytest.approx(0.75, abs=0.01)
    assert found["median_z"]["random"] < 3
    flat = columns | {"zeros cos": np.zeros_like(columns["zeros cos"])}  # no line stands out: no share, and no nan
    assert readout.learned(flat)["power_predicted"] is None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
