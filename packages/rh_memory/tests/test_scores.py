"""Intervals over blocks, calibration summaries, and that scores of known predictors are what they must be."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rh_memory import scores
from rh_memory.data.unfold import Spacings
from rh_memory.data.windows import SpacingData
from rh_memory.mdn import Mixture


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 40), st.integers(0, 1000))
def test_block_interval_holds_the_mean_and_ignores_order(blocks: int, seed: int):
    rng = np.random.default_rng(seed)
    index = np.arange(blocks * 32) * 8
    x = rng.standard_normal(index.size)
    found = scores.block_estimate(x, index)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(x.mean())
    order = rng.permutation(index.size)
    # Sums in another order differ in the last bit, which can move one bootstrap draw across the estimate.
    assert scores.block_estimate(x[order], index[order]) == pytest.approx(found, abs=0.01)


def test_dependence_inside_blocks_widens_the_interval():
    rng = np.random.default_rng(0)
    index = np.arange(256 * 100)
    shared = np.repeat(rng.standard_normal(100), 256)
    wide, narrow = (scores.block_estimate(x, index) for x in (shared, rng.permutation(shared)))
    assert wide.high - wide.low > 8 * (narrow.high - narrow.low)


def test_one_block_has_no_interval_and_bad_values_are_refused():
    assert scores.block_estimate([1.0, 2.0], [3, 4]) == (1.5, None, None)
    with pytest.raises(ValueError, match="not finite"):
        scores.block_estimate([1.0, math.nan], [0, 300])
    with pytest.raises(ValueError, match="different targets"):
        scores.paired_difference(np.ones(2), [0, 1], np.ones(2), [2, 3])


def test_paired_difference_uses_shared_targets_only():
    a, b = np.arange(1024.0), np.arange(1024.0) - 0.25
    found = scores.paired_difference(a, np.arange(1024), b[512:], np.arange(512, 1024))
    assert found.value == pytest.approx(0.25)
    assert found.high - found.low < 1e-9


class _Constant:
    """Predicts one fixed Gaussian everywhere."""

    config = SimpleNamespace(memory="none")

    def eval(self) -> None: ...

    def predict(self, window, positions):
        shape = (*window.s_BW[:, 1:].shape, 1)
        return Mixture(torch.zeros(shape), torch.ones(shape), torch.full(shape, 0.5))


def test_scores_of_a_known_gaussian():
    rng = np.random.default_rng(3)
    s = (1 + 0.5 * rng.standard_normal(9000)).astype(np.float32)
    data = SpacingData(Spacings(s, np.cumsum(s, dtype=np.float64), np.zeros(9000), np.full(9000, 11.5, np.float32)))
    found = scores.score_model(_Constant(), data, torch.arange(0, 8000, 6), batch=500)
    summary = scores.summarise(found)
    assert found.spacing_W[0] == 256
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.25)
    assert summary["nll_last"]["low"] < entropy < summary["nll_last"]["high"]
    assert summary["nll_all"]["value"] == pytest.approx(entropy, abs=0.04)
    assert summary["crps_last"]["value"] == pytest.approx(0.5 / math.sqrt(math.pi), abs=0.02)
    assert summary["pit_last"]["std"] == pytest.approx(12**-0.5, abs=0.015)
    assert summary["below_zero_last"]["value"] == pytest.approx(0.02275, abs=1e-4)
    for row in summary["coverage_last"]:
        assert row["observed"]["value"] == pytest.approx(row["nominal"], abs=0.04)
    assert summary["nll_by_context"]["context"][0] == 1
    assert summary["nll_by_context"]["context"][-1] == 256
    assert scores.contexts_of(summary["nll_by_context"]) == "contexts of 1 to 256"


def test_the_mean_over_the_readouts_of_a_postfix_memory_says_so():
    assert scores.contexts_of({"context": list(range(16, 257, 16))}) == "contexts of 16, 32, ..., 256"
    assert scores.contexts_of({"context": [256]}) == "context of 256"
