"""The seed's formulas on inputs whose figures are known, each against its definition in numpy."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rh_memory.diagnostics import legacy

MODEL = SimpleNamespace(n_memory=3)


class Windows(SimpleNamespace):
    """As much of a Golden as the formulas ask of one."""

    batch, device = 4, torch.device("cpu")

    def __len__(self) -> int:
        return 5

    def windows(self):
        yield None


def answer(monkeypatch, name, value):
    monkeypatch.setattr(legacy, name, lambda *_, **__: value)


def test_a_adds_up_single_differences(monkeypatch):
    nll_VW = torch.tensor([[0.2, 0.4], [0.3, 0.5], [0.2, 0.4], [0.1, 0.4]])  # as it is, and each slot off
    answer(monkeypatch, "under_changes", nll_VW)
    found = legacy._ablation(MODEL, Windows())
    assert found["A ablation"]["nll"] == pytest.approx(0.3)
    assert found["A ablation"]["delta"] == pytest.approx([0.1, 0.0, -0.05])
    assert found["A ablation"]["largest"] == pytest.approx(0.1)
    assert found["A ablation"]["passes"]
    assert found["A' k-slot curve"]["sum_of_deltas"] == pytest.approx([0.1, 0.1, 0.05])


def test_e_is_the_entropy_of_normalised_effects(monkeypatch):
    mean_VW = torch.tensor([[1.0, 1.0], [1.3, 0.7], [1.1, 0.9], [1.0, 1.0]])
    answer(monkeypatch, "under_changes", mean_VW)
    found = legacy._effects(MODEL, Windows())
    assert found["effect"] == pytest.approx([0.3, 0.1, 0.0], abs=1e-6)
    assert found["entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-6)
    assert not found["passes"]


def test_g_is_the_slope_of_log_error_on_log_horizon(monkeypatch):
    steps = torch.arange(1, 201)
    answer(monkeypatch, "true_future", torch.ones(5, 200))
    signs = torch.tensor([1, -1, 1, -1, 1])[:, None]
    answer(monkeypatch, "roll", 1 + 0.1 * signs * steps**0.3)
    found = legacy._error_growth(MODEL, Windows(), 200, has_heights=True)
    assert list(found["mae"]) == ["1", "10", "50", "200"]
    assert found["mae"]["10"] == pytest.approx(0.1 * 10**0.3, rel=1e-5)
    assert found["slope"] == pytest.approx(0.3, abs=1e-5)
    assert found["passes"]


@pytest.mark.parametrize(("sign", "passes"), [(1, False), (-1, True)])
def test_h_is_a_spread_over_a_mean_and_passes_where_that_is_negative(monkeypatch, sign, passes):
    monkeypatch.setattr(legacy, "window_nll", lambda model, quarter: torch.tensor([quarter]))
    found = legacy._cross_block(MODEL, [sign * 1.0, sign * 2.0, sign * 3.0, sign * 4.0])
    assert found["cv"] == pytest.approx(sign * math.sqrt(1.25) / 2.5)
    assert found["passes"] == passes


def test_i_looks_at_centres_of_attention_in_the_last_layer():
    profile_LHMT = torch.ones(2, 1, 3, 100)
    profile_LHMT[1] = 0
    for slot, place in enumerate((10, 50, 90)):
        profile_LHMT[1, 0, slot, place] = 0.5  # the rest goes to slots
    model = SimpleNamespace(attention_profile=lambda window: profile_LHMT)
    found = legacy._attention(model, Windows())
    assert found["centre_of_mass"] == pytest.approx([10, 50, 90])
    assert found["receptive_field"] == [1, 1, 1]
    assert found["std_centre_of_mass"] == pytest.approx(40)
    assert found["passes"]


def test_j_is_an_increase_in_parts_of_the_nll(monkeypatch):
    answer(monkeypatch, "under_changes", torch.tensor([[-0.5], [-0.4], [-0.45], [-0.4], [-0.45], [-0.3]]))
    found = legacy._permutation(MODEL, Windows(), torch.Generator().manual_seed(0))
    assert found["relative_increase"] == pytest.approx(0.1 / 0.5)
    assert not found["passes"]


def test_k_counts_the_directions_of_stacked_gradients(monkeypatch):
    rng = np.random.default_rng(0)
    gradient_GMD = rng.standard_normal((20, 3, 12)) * np.linspace(3, 0.1, 12)
    answer(monkeypatch, "content_gradients", torch.from_numpy(gradient_GMD))
    found = legacy._gradient_rank(MODEL, Windows())
    power = np.sort(np.linalg.eigvalsh(np.cov(gradient_GMD.reshape(60, 12).T)))[::-1]
    share = power / power.sum()
    assert found["r90"] == int(np.searchsorted(np.cumsum(share), 0.9)) + 1
    assert found["r50"] == int(np.searchsorted(np.cumsum(share), 0.5)) + 1
    assert found["effective_rank"] == pytest.approx(math.exp(-(share * np.log(share)).sum()))
    assert found["ratio"] == pytest.approx(found["r90"] / 3)  # above 1: it counts what the windows differ in
    assert found["ratio"] > 1
