"""Where the chance shares stated for the first run come from: a draw of 320 sequences, above the expectation."""

import numpy as np
import pytest
from attn_clustering.data.levels import levels
from attn_clustering.data.settings import LANGUAGES


def drawn_labels(rng: np.random.Generator, *, length=512, topics=5, segments=(2, 5), shortest=64) -> np.ndarray:
    """Topic labels of one sequence by the first run's definition, drawn with numpy as it did."""
    n = rng.integers(segments[0], segments[1] + 1)
    topic = rng.integers(0, topics, n)
    return np.repeat(topic, shortest + rng.multinomial(length - shortest * n, np.full(n, 1 / n)))


def shares(labels_NT: np.ndarray) -> tuple[float, float]:
    """Share of same-topic keys under uniform causal attention: mean over queries, and ratio of sums as the original."""
    position_T = np.arange(1, labels_NT.shape[1] + 1)
    same_NT = sum(np.cumsum(labels_NT == k, axis=1) * (labels_NT == k) for k in np.unique(labels_NT))
    return float((same_NT / position_T).mean()), float(same_NT.sum() / (position_T.sum() * len(labels_NT)))


def expected_share(topics: int, segments: tuple[int, int]) -> float:
    """For n segments of equal length: segment s sees its own part of the past, 1 - s ln((s + 1) / s) on average, and a
    past topic is its own with probability 1 / K."""
    means = []
    for n in range(segments[0], segments[1] + 1):
        own = np.array([1.0] + [1 - s * np.log((s + 1) / s) for s in range(1, n)])
        means.append((own + (1 - own) / topics).mean())
    return float(np.mean(means))


def test_the_stated_shares_are_those_of_320_sequences_with_the_first_runs_seed():
    seeds = np.random.default_rng(43)
    labels_NT = np.stack([drawn_labels(np.random.default_rng(seeds.integers(2**31))) for _ in range(320)])
    assert shares(labels_NT) == pytest.approx((0.597, 0.477), abs=1.1e-3)


@pytest.mark.parametrize(("name", "topics", "segments"), [("faithful-v1", 5, (2, 5)), ("sanity", 3, (2, 4))])
def test_the_expectation_is_lower_and_is_what_levels_reports(name, topics, segments):
    expected = expected_share(topics, segments)
    assert expected == pytest.approx({"faithful-v1": 0.582, "sanity": 0.680}[name], abs=5e-4)
    if name == "sanity":  # the other takes ten seconds
        found = levels(LANGUAGES[name]).within_ratio_chance
        assert found.value == pytest.approx(expected, abs=5 * found.se + 2e-3)  # lengths are not quite equal
