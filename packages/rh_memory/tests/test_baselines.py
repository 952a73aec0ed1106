"""Linear predictors against naive ones, the marginal, and the whole table on few zeros."""

import math

import numpy as np
import pytest
import torch
from lab_shared.testing import assert_parity
from rh_memory import baselines, linear


@pytest.fixture(scope="module")
def series() -> linear.Series:
    rng = np.random.default_rng(0)
    n = 6000
    s = 1 + 0.4 * rng.standard_normal(n)
    for i in range(2, n):
        s[i] += -0.5 * (s[i - 1] - 1) + 0.2 * (s[i - 2] - 1)
    gamma = 1000 + np.cumsum(np.abs(s))
    return linear.Series(*(torch.from_numpy(x) for x in (s, gamma, np.log(gamma / 2 / math.pi))))


def test_prime_powers():
    assert [q for q, _, _ in linear.prime_powers(16)] == [2, 3, 4, 5, 7, 8, 9, 11, 13, 16]
    assert (8, 2, 3) in linear.prime_powers(16)


def test_phase_features_match_the_sum_written_out(series):
    features = linear.Features(lags=3, primes=9, scales=(5.0, math.inf))
    first, last = 400, 560
    rows = features.rows(series, first, last)
    assert rows.shape == (160, features.count)
    taper = features.tapers().double()
    for n in (400, 471, 559):
        d = torch.arange(256)
        difference = series.gamma_N[n] - series.gamma_N[n - d]
        parts = [torch.ones(1), (series.s_N[[n, n - 1, n - 2]] - 1)]
        for part in (torch.cos, torch.sin):
            for omega in features.frequencies:
                parts.append((taper * part(difference * omega)).sum(1) / 16)
        expected = torch.cat([x.double() for x in parts])
        assert_parity(rows[n - first], expected, atol=2e-4, name=f"row {n}")


def test_fit_recovers_an_autoregression_and_matches_lstsq(series):
    features = linear.Features(lags=4)
    fit = linear.accumulate(series, features, [(0, 5000)], degree=0).solve()
    rows = features.rows(series, 3, 4999).double()
    exact = torch.linalg.lstsq(rows, series.s_N[4:5000, None]).solution[:, 0]
    assert_parity(fit.weight_KF[0], exact, atol=1e-6)
    assert fit.weight_KF[0][1:3].tolist() == pytest.approx([-0.5, 0.2], abs=0.05)
    assert fit.variance == pytest.approx(0.16, rel=0.1)
    index = torch.tensor([5000, 5001, 5500])
    (mean,) = linear.predict([fit], series, features, index)
    assert_parity(mean, features.rows(series, 4999, 5500).double()[[0, 1, 500]] @ fit.weight_KF[0], atol=1e-5)


def test_weights_follow_the_height():
    rng = np.random.default_rng(1)
    n = 40_000
    height = np.linspace(8, 12, n)
    s = 1 + rng.standard_normal(n) * 0.3
    for i in range(1, n):
        s[i] += 0.2 * (height[i - 1] - 10) * (s[i - 1] - 1)
    series = linear.Series(torch.from_numpy(s), None, torch.from_numpy(height))
    features = linear.Features(lags=2)
    moments = linear.accumulate(series, features, [(0, n)], degree=2)
    with_height, without = moments.solve(), moments.solve(degree=0)
    assert with_height.weight_KF[1, 1] == pytest.approx(0.4, abs=0.03)
    assert with_height.variance < 0.092 < 0.094 < without.variance


def test_marginal_is_a_density():
    train = np.random.default_rng(2).gamma(6, 1 / 6, 20_000)
    edges, log_density = baselines.marginal_log_density(train)
    assert np.exp(log_density) @ np.diff(edges) == pytest.approx(1)
    nll = baselines.marginal_nll(train, np.array([0.0, 0.9, 99.0]))
    assert np.isfinite(nll).all()
    assert nll[1] < nll[0]


def test_a_damaged_cache_is_none(tmp_path):
    path = tmp_path / "baselines.npz"
    assert baselines._remembered(path) is None
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY"):
        path.write_bytes(content)
        assert baselines._remembered(path) is None
    np.savez(path, spacing=np.arange(3))
    assert baselines._remembered(path) is None


@pytest.mark.slow
def test_table_on_the_first_zeros_and_its_cache(zeros_file, data_folder, monkeypatch):
    found = baselines.for_zeros(file=zeros_file, folder=data_folder)
    rows = {row["name"]: row["nll_last"]["value"] for row in found.json()["rows"]}
    assert rows["iid marginal"] == pytest.approx(0.5, abs=0.05)
    assert rows["prime phases"] < rows["AR(64), height"] < 0 < rows["AR(50)"] + 0.5
    assert 0.42 < found.facts["gue"]["nll_last"]["sine process, 8 gaps"]["value"] < 0.46
    monkeypatch.setattr(baselines, "compute", None)
    again = baselines.for_zeros(file=zeros_file, folder=data_folder)
    assert again.json() == found.json()
    assert "prime phases" in baselines.table(found.json())
