"""Auxiliary targets against loops over single windows."""

import math

import numpy as np
import pytest
import torch
from lab_shared.testing import assert_parity
from rh_memory.q3 import aux_loss, constants, q3_targets, ramp, stats_targets


def windows(n=5, length=64):
    return torch.rand(n, length, generator=torch.Generator().manual_seed(0)) + 0.5


def slow_q3(s):
    d, d2 = np.diff(s), np.diff(s, n=2)
    half = len(s) // 2
    blocks = [s[i : i + 16].var(ddof=1) for i in range(0, len(s) - 15, 16)]
    return [
        s.mean() - 1,
        math.log(s.std(ddof=1) * math.sqrt(2 * math.pi * math.e)),
        np.abs(d).max(),
        np.quantile(s, 0.01),
        np.abs(d2).mean(),
        abs(s[:half].mean() - s[half:].mean()),
        (d2**2).mean(),
        np.var(blocks, ddof=1),
    ]


@pytest.mark.parametrize("length", [64, 70])
def test_q3_targets_match_their_definitions(length):
    s = windows(length=length)
    slow = np.array([slow_q3(row) for row in s.double().numpy()])
    assert_parity(q3_targets(s), slow, atol=1e-5)


def test_stats_match_their_definitions():
    s = windows()
    x = s.double().numpy()
    x0 = x - x.mean(1, keepdims=True)
    ac = [[(r[k:] * r[:-k]).mean() / (r * r).mean() for k in (1, 5)] for r in x0]
    slow = np.column_stack([x.mean(1), x.std(1, ddof=1), ac])
    assert_parity(stats_targets(s), slow, atol=1e-5)


def test_a_window_of_one_block_is_refused():
    with pytest.raises(ValueError, match="windows of 31 spacings are too short"):
        q3_targets(torch.ones(1, 31))


def test_constants_make_z_scores():
    s = windows(200)
    mean, std = constants(s, "q3")
    z = (q3_targets(s) - mean) / std
    assert_parity(z.mean(0), torch.zeros(8), atol=1e-4)
    assert_parity(z.std(0), torch.ones(8), atol=1e-4)


def test_mean_and_diagonal_modes():
    z = torch.zeros(1, 8)
    aux = torch.zeros(1, 8, 8)
    aux[0, 2, 2] = 8.0  # slot 2's prediction of target 2
    assert float(aux_loss(aux, z, "diagonal")) == pytest.approx(8.0)
    assert float(aux_loss(aux, z, "mean")) == pytest.approx(1 / 8)
    aux[0, 2, 3] = 100.0  # slot 2's prediction of another target
    assert float(aux_loss(aux, z, "diagonal")) == pytest.approx(8.0)


def test_the_ramp_of_the_seed():
    points = [(0, 0.0), (250, 5e-4), (500, 1e-3), (1750, 5.5e-3), (3000, 1e-2), (9999, 1e-2)]
    for step, weight in points:
        assert ramp(step, (500, 3000), (1e-3, 1e-2)) == pytest.approx(weight)
