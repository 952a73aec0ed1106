"""Attention statistics against loops written from the definitions, and their nulls."""

import math

import numpy as np
import pytest
import torch
from attn_clustering.analysis.attention import AttentionStats, entropy, entropy_bound
from attn_clustering.analysis.legacy import legacy_chance, legacy_metrics, noncausal_pattern
from attn_clustering.analysis.nulls import same_topic_count, uniform_share
from attn_clustering.analysis.recurrence import first_segment_mass, probe_pairs, recurrence_score
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.attention import Mask, attend
from lab_shared.errors import UserError
from lab_shared.testing import assert_parity


def random_pattern(n, heads, t, seed=0, sharpness=2.0):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, heads, t, 8, generator=g) * sharpness for _ in range(2))
    return attend(q, k, k, Mask.causal(), backend="reference", return_weights=True)[1]


def segment_topics(rng, n, t, topics, segments=(2, 5), least=None):
    """Labels of the micro-languages: segments of at least `least` positions, topics drawn independently."""
    least = least or t // 8
    rows = []
    for _ in range(n):
        parts = rng.integers(segments[0], segments[1] + 1)
        lengths = least + rng.multinomial(t - parts * least, np.full(parts, 1 / parts))
        rows.append(np.repeat(rng.integers(topics, size=parts), lengths))
    return torch.from_numpy(np.array(rows))


def statistics(pattern_LNHTS, topics, batch=3):
    stats = AttentionStats(topics, len(pattern_LNHTS), pattern_LNHTS[0].size(1))
    for layer, pattern in enumerate(pattern_LNHTS):
        for start in range(0, len(topics), batch):
            stats.add(layer, slice(start, start + batch), pattern[start : start + batch])
    return stats.result()


def uniform_pattern(n, heads, t):
    return torch.ones(t, t).tril().div(torch.arange(1, t + 1)[:, None]).expand(n, heads, t, t)


def test_statistics_match_loops():
    n, h, t = 7, 2, 9
    topics = segment_topics(np.random.default_rng(0), n, t, 3, (2, 3), 2)
    pattern = random_pattern(n, h, t)
    got = statistics([pattern], topics)
    a, same = pattern.double().numpy(), (topics[:, :, None] == topics[:, None]).numpy()
    for head in range(h):
        nats, ratio, within, uniform, lag = [], [], [], [], []
        far = np.zeros((n, t, t))
        for b in range(n):
            for q in range(t):
                row = a[b, head, q, : q + 1]
                nats.append(-sum(x * math.log(x) for x in row if x > 0))
                if q:
                    ratio.append(nats[-1] / math.log(q + 1))
                if q >= 2:
                    far[b, q, : q - 1] = row[: q - 1] / row[: q - 1].sum()
        for b in range(n):
            for q in range(2, t):
                share = (far[b, q] * same[b, q]).sum()
                others = np.mean([far[c, q] for c in range(n) if c != b], axis=0)
                within.append(share)
                uniform.append(share - same[b, q, : q - 1].mean())
                lag.append(share - (others * same[b, q]).sum())
        for name, values in (
            ("entropy", nats),
            ("entropy_ratio", ratio),
            ("within", within),
            ("excess_uniform", uniform),
            ("excess_lag", lag),
        ):
            assert_parity(got[name][0, head], np.mean(values), atol=2e-5, name=name)
    assert_parity(got["self_mass"][0], pattern.diagonal(dim1=-2, dim2=-1).mean((0, 2)), atol=1e-5)


def test_uniform_attention_has_no_excess():
    topics = segment_topics(np.random.default_rng(1), 40, 64, 5)
    got = statistics([uniform_pattern(40, 2, 64)], topics)
    for name in ("excess_uniform", "excess_lag"):
        assert got[name].abs().max() < 2e-3
    assert_parity(got["entropy"][0], entropy_bound(64).mean().expand(2), atol=1e-5)
    assert_parity(got["entropy_ratio"][0], torch.ones(2), atol=1e-5)


def test_attention_by_position_clusters_but_has_no_lag_matched_excess():
    """A head that looks three tokens back is nearly always within the topic; the lag-matched null knows why."""
    t = 64
    topics = segment_topics(np.random.default_rng(2), 60, t, 5)
    index = torch.arange(t)
    pattern = torch.zeros(t, t)
    pattern[index, (index - 3).clamp_min(0)] = 1
    got = statistics([pattern.expand(60, 1, t, t)], topics)
    assert got["within"].item() > 0.8
    assert got["excess_uniform"].item() > 0.2
    assert abs(got["excess_lag"].item()) < 2e-3


def test_attention_to_the_topic_has_excess():
    topics = segment_topics(np.random.default_rng(3), 60, 64, 5)
    same = (topics[:, :, None] == topics[:, None]).float()[:, None]
    weight = (uniform_pattern(60, 1, 64) * (1 + 4 * same)).tril()
    got = statistics([weight / weight.sum(-1, keepdim=True)], topics)
    assert got["excess_lag"].item() > 0.1
    assert got["excess_uniform"].item() > 0.1


def test_specialisation_sees_a_head_for_one_topic():
    topics = segment_topics(np.random.default_rng(4), 200, 32, 4)
    same = (topics[:, :, None] == topics[:, None]).float()
    of_topic_0 = (topics == 0)[:, :, None] * same
    both = torch.stack([of_topic_0, same], 1)
    weight = (uniform_pattern(200, 2, 32) * (1 + 8 * both)).tril()
    got = statistics([weight / weight.sum(-1, keepdim=True)], topics)
    assert got["specialisation"][0, 0] > 3 * got["specialisation"][0, 1].abs()
    assert got["excess_lag_by_topic"][0, 0].argmax() == 0


@settings(max_examples=8, deadline=None)
@given(st.integers(4, 20), st.integers(0, 10_000), st.floats(0.1, 20))
def test_causal_entropy_stays_below_ln_t(t, seed, sharpness):
    pattern = random_pattern(2, 2, t, seed, sharpness)
    assert (entropy(pattern) <= entropy_bound(t) + 1e-4).all()
    assert pattern.triu(1).abs().max() == 0


def test_attention_ahead_is_refused_and_missing_layers_are_noticed():
    topics = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(AssertionError, match="looks ahead"):
        statistics([torch.full((2, 1, 6, 6), 1 / 6)], topics)
    stats = AttentionStats(topics, 2, 1)
    stats.add(0, slice(0, 2), uniform_pattern(2, 1, 6))
    with pytest.raises(ValueError, match="2 of 4"):
        stats.result()


def test_legacy_chance_is_what_the_original_called_collapse():
    """Without the mask, attention uniform over all tokens scores what their models did after DroPE (.466 to .476).

    Its expectation over the first run's segments, from the probability that two positions share a topic, is .458; the
    standard error of 1,500 sequences is .005.
    """
    topics = segment_topics(np.random.default_rng(11), 1500, 512, 5, (2, 5), 64)
    chance = legacy_chance(topics)
    assert chance["within"] == pytest.approx(0.458, abs=0.012)
    assert chance["entropy_bound_causal"] == pytest.approx(5.246, abs=5e-4)
    assert chance["entropy_bound_noncausal"] == pytest.approx(6.238, abs=5e-4)
    with_self = same_topic_count(topics, 0) / torch.arange(1, 513)
    assert with_self.mean() == pytest.approx(0.582, abs=0.012)
    assert uniform_share(topics).nanmean() < with_self.mean()


def test_legacy_metrics_match_loops_and_their_chance():
    n, h, t, k = 4, 2, 12, 3
    topics = segment_topics(np.random.default_rng(6), n, t, k, (2, 3), 3)
    q, key = (torch.randn(n, h, t, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    pattern = noncausal_pattern(q, key)
    assert_parity(pattern, (q @ key.mT / 2).softmax(-1), atol=1e-6)
    got = legacy_metrics(pattern, topics, k)
    a, label = pattern.double().numpy(), topics.numpy()
    for head in range(h):
        within, nats, variance = [], [], []
        for b in range(n):
            inside, total = np.zeros(t), np.zeros(t)
            for i in range(t):
                nats.append(-(a[b, head, i] * np.log(a[b, head, i])).sum())
                for j in range(i + 1):
                    total[i] += a[b, head, i, j]
                    inside[i] += a[b, head, i, j] * (label[b, i] == label[b, j])
            within.append(inside.mean() / total.mean())
            by_topic = [
                inside[label[b] == c].sum() / total[label[b] == c].sum() if (label[b] == c).any() else 0
                for c in range(k)
            ]
            variance.append(np.var(by_topic, ddof=1))
        assert_parity(got["legacy_within"][head], np.mean(within), atol=1e-5)
        assert_parity(got["legacy_entropy"][head], np.mean(nats), atol=1e-5)
        assert_parity(got["legacy_specialization"][head], np.mean(variance), atol=1e-5)
    flat = legacy_metrics(torch.full((n, 1, t, t), 1 / t), topics, k)
    assert_parity(flat["legacy_within"][0], legacy_chance(topics)["within"], atol=1e-5)


def test_probe_pairs_differ_in_the_first_segment_only():
    rng = np.random.default_rng(7)
    topics = segment_topics(rng, 60, 64, 4, (2, 4), 10)
    tokens = torch.from_numpy(rng.integers(50, size=topics.shape)) + 100 * topics
    pairs = probe_pairs(tokens, topics, 10, 20)
    m = pairs.segment
    assert pairs.recurring_PT.shape == (20, 40)
    assert torch.equal(pairs.recurring_PT[:, m:], pairs.control_PT[:, m:])
    label = (pairs.recurring_PT // 100).view(20, 4, m)
    assert (label == label[..., :1]).all()
    a, b, a2, c = label[..., 0].T
    assert (a == a2).all()
    assert ((a != b) & (b != c) & (a != c)).all()
    assert (pairs.control_PT[:, 0] // 100 == c).all()
    assert not (pairs.recurring_PT[:, :m] == pairs.recurring_PT[:, 2 * m : 3 * m]).all(1).any()
    with pytest.raises(UserError, match="needs three"):
        probe_pairs(tokens, topics % 2, 10, 20)


def test_recurrence_is_zero_for_attention_by_position_and_positive_for_attention_by_topic():
    rng = np.random.default_rng(8)
    topics = segment_topics(rng, 60, 64, 4, (2, 4), 10)
    pairs = probe_pairs(topics, topics, 10, 12)
    label = pairs.tokens(slice(0, 12))
    base = random_pattern(1, 1, 40).expand(24, 1, 40, 40)
    same = (label[:, :, None] == label[:, None])[:, None]
    clustering = (base * (1 + 4 * same)).tril()
    pattern = torch.cat([base, clustering / clustering.sum(-1, keepdim=True)], 1)
    got = recurrence_score(first_segment_mass(pattern, 10)[:, None])
    assert got["recurrence"][0, 0].abs() < 1e-6
    assert got["recurrence"][0, 1] > 0.05
    assert (got["recurrence_mass"][0, 1, :, 1] > got["recurrence_mass"][0, 1, :, 0]).all()
