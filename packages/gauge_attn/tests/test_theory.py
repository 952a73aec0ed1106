from math import inf

import pytest
import torch
from gauge_attn import theory
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("d", [1, 5, 9])
def test_closed_form_against_random_beliefs_within_ten_percent(d):
    measured = theory.simulate(d, 0.081, 0.0086, 64, draws=12)
    rho = theory.participation(d, 0.081**2 / 0.0086)
    assert measured["row_std"] == pytest.approx(theory.row_std(rho, 64), rel=0.10)
    assert measured["kl_mean"] == pytest.approx(theory.kl_mean(d, 0.081), rel=0.05)
    assert measured["kl_std"] == pytest.approx(theory.kl_std(d, 0.081), rel=0.05)


def test_limits_are_the_baselines():
    assert theory.row_std(1, 64) == pytest.approx(0.0216656, rel=1e-5)
    assert theory.row_std(inf, 64) == pytest.approx(0.1230314, rel=1e-5)
    assert theory.row_std(1e15, 64) == pytest.approx(theory.row_std(inf, 64), rel=1e-9)
    assert theory.participation(5, 0.0) == 1
    with pytest.raises(ValueError, match="got 1"):
        theory.row_std(2, 1)


def test_participation_is_the_ratio_of_moments_of_chi_square():
    a, d = 0.7, 3
    chi = torch.distributions.Chi2(torch.tensor(float(d), dtype=torch.float64))
    grid = torch.linspace(1e-6, 200, 2_000_001, dtype=torch.float64)
    density = chi.log_prob(grid).exp()
    first, second = (torch.trapezoid(density * (-k * a * grid).exp(), grid) for k in (1, 2))
    assert theory.participation(d, a) == pytest.approx((second / first**2).item(), rel=1e-5)


@given(st.floats(0.03, 0.11), st.integers(16, 64))
@settings(max_examples=20, deadline=None)
def test_target_and_participation_are_inverse(target, n):
    if theory.row_std(1, n) < target < theory.row_std(inf, n):
        assert theory.row_std(theory.participation_for(target, n), n) == pytest.approx(target, rel=1e-6)


@given(st.floats(1.01, 50), st.floats(0.05, 20), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_dimension_and_temperature_are_inverse_to_participation(rho, a, d):
    assert theory.participation(theory.smallest_dimension(rho, a), a) == pytest.approx(rho, rel=1e-9)
    kappa = theory.kappa_for(rho, d, 0.3)
    assert theory.participation(d, 0.09 / kappa) == pytest.approx(rho, rel=1e-9)


def test_what_cannot_be_reached():
    assert theory.participation_for(0.10, 128) == inf
    assert theory.smallest_dimension(inf, 1.0) == inf
    assert theory.smallest_dimension(2.0, 0.0) == inf


def test_tables_as_numbers_and_as_text():
    assert "none: one-hot attention scores less" in theory.text(theory.tables(n=128))
    result = theory.tables()
    assert [row["d"] for row in result["rows"][:5]] == [1, 3, 5, 7, 9]
    sharp = [row["row_std"] for row in result["rows"][5:10]]
    assert sharp == sorted(sharp)
    assert result["minimum"][1]["smallest_dimension"] == pytest.approx(17.7, abs=0.1)
