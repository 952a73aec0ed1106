"""What a von Mises-Fisher concentration kappa promises about the opening angle. numpy in and out, float64."""

from __future__ import annotations

import numpy as np
import torch


def expected_angle_deg(kappa: np.ndarray | float) -> np.ndarray:
    """Mean opening angle under vMF(kappa) in degrees: pi (I0(k) - exp(-k)) / (2 sinh k); 90 at kappa = 0.

    By parts from the density k sin(psi) exp(k cos psi) / (2 sinh k) of psi (Mardia & Jupp, 9.3).
    """
    k = np.maximum(_checked(kappa), 1e-8)
    i0e = torch.special.i0e(torch.from_numpy(k)).numpy()
    return np.rad2deg(np.pi * (i0e - np.exp(-2 * k)) / -np.expm1(-2 * k))


def containment_deg(kappa: np.ndarray | float, probability: float) -> np.ndarray:
    """Angle in degrees that contains this share of vMF(kappa).

    1 - cos psi_p = -log(1 - p (1 - exp(-2k))) / k, the cumulative distribution solved for the angle.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"probability is {probability}; it must lie in [0, 1)")
    k = np.maximum(_checked(kappa), 1e-8)
    one_minus_cos = -np.log1p(probability * np.expm1(-2 * k)) / k
    return np.rad2deg(2 * np.arcsin(np.sqrt(np.clip(one_minus_cos / 2, 0, 1))))


def _checked(kappa: np.ndarray | float) -> np.ndarray:
    k = np.atleast_1d(np.asarray(kappa, dtype=np.float64))
    if not (np.isfinite(k) & (k >= 0)).all():
        raise ValueError("kappa must be finite and >= 0; pass the length of the output vector")
    return k
