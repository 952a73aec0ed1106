import numpy as np
import pytest
from iceaggr.calibration import containment_deg, expected_angle_deg
from lab_shared.testing import assert_parity

KAPPAS = np.array([1e-9, 0.01, 0.5, 3.0, 40.0, 1e4])


def density(psi, k):
    """vMF density of the opening angle, stable for large k."""
    return k * np.sin(psi) * np.exp(k * (np.cos(psi) - 1)) / -np.expm1(-2 * k)


@pytest.mark.parametrize("k", KAPPAS)
def test_expected_angle_is_the_integral(k):
    nodes, weights = np.polynomial.legendre.leggauss(400)
    top = min(np.pi, 20 / np.sqrt(max(k, 1e-9)))
    psi = (nodes + 1) / 2 * top
    mean = (weights * psi * density(psi, k)).sum() * top / 2
    assert expected_angle_deg(k)[0] == pytest.approx(np.rad2deg(mean), rel=1e-6)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_containment_inverts_the_cumulative(p):
    psi = np.deg2rad(containment_deg(KAPPAS, p))
    cumulative = np.expm1(-2 * KAPPAS * np.sin(psi / 2) ** 2) / np.expm1(-2 * KAPPAS)
    assert_parity(cumulative, np.full_like(KAPPAS, p), atol=1e-7)


def test_limits_and_errors():
    assert expected_angle_deg(0.0)[0] == pytest.approx(90)
    assert containment_deg(0.0, 0.5)[0] == pytest.approx(90)
    assert expected_angle_deg(1e8)[0] < 0.01
    assert (np.diff(expected_angle_deg(np.logspace(-3, 6, 50))) < 0).all()
    with pytest.raises(ValueError, match="kappa must be finite"):
        expected_angle_deg(np.array([1.0, -2.0]))
    with pytest.raises(ValueError, match=r"probability is 1\.5"):
        containment_deg(1.0, 1.5)
