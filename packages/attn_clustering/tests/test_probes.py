"""Probes against scikit-learn and against what is known without training."""

import numpy as np
import pytest
import torch
from attn_clustering.analysis import probes
from attn_clustering.analysis.regression import fit
from lab_shared.testing import assert_parity


def noisy_topics(places=2, sequences=60, positions=8, width=24, topics=4, seed=0):
    """Features: topic means of growing strength by place, correlated noise, an offset, and one constant feature."""
    g = torch.Generator().manual_seed(seed)
    topics_SP = torch.randint(topics, (sequences, positions), generator=g)
    means = torch.randn(places, topics, width, generator=g) * torch.arange(1, places + 1)[:, None, None] / 4
    mixing = torch.randn(width, width, generator=g) * torch.logspace(0, -2, width)
    noise = torch.randn(places, sequences, positions, width, generator=g) @ mixing
    features = means[:, topics_SP] + noise + 3
    features[..., -1] = 5
    return features, topics_SP


@pytest.mark.parametrize("l2", [1e-4, 1e-1])
def test_fit_matches_scikit_learn(l2):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    features, topics = noisy_topics(sequences=150)
    x, y = features.flatten(1, 2), topics.flatten()
    train, test = slice(0, 800), slice(800, None)
    fitted = fit(x[:, train], y[None, train], torch.tensor([l2]), 4, tolerance=2e-5)
    for place in range(2):
        scaler = StandardScaler().fit(x[place, train])
        theirs = LogisticRegression(C=1 / (l2 * 800), max_iter=2000, tol=1e-6)
        theirs.fit(scaler.transform(x[place, train]), y[train])
        probability = fitted.logits(x[:, test])[place, :, 0].softmax(-1)
        expected = theirs.predict_proba(scaler.transform(x[place, test]))
        assert_parity(probability, expected, atol=5e-3)
        accuracy = (probability.argmax(-1) == y[test]).float().mean()
        assert abs(accuracy - theirs.score(scaler.transform(x[place, test]), y[test])) <= 0.003


def test_problems_and_groups_do_not_disturb_each_other():
    features, topics = noisy_topics()
    x, y = features.flatten(1, 2), topics.flatten()
    labels, l2 = torch.stack([y, y.roll(7)]), torch.tensor([1e-3, 1e-1])
    together = fit(x, labels, l2, 4, tolerance=2e-5)
    for place in range(2):
        for problem in range(2):
            alone = fit(x[[place]], labels[[problem]], l2[[problem]], 4, tolerance=2e-5)
            a = together.logits(x)[place, :, problem].softmax(-1)
            assert_parity(a, alone.logits(x[[place]])[0, :, 0].softmax(-1), atol=5e-3)


def test_probe_result_has_its_baselines():
    features, topics = noisy_topics(sequences=100)
    topics = topics[:, :1].expand(-1, 8)  # one topic per sequence: the permuted labels must still be unpredictable
    features = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(1))[:, topics] + features
    result = probes.train_probes(features, topics, 4)
    assert (result.correct_SPG.float().mean((0, 1)) > 0.9).all()
    assert (result.permuted_accuracy_G < 0.6).all()
    assert result.correct_SPG.shape == (20, 8, 2)
    again = probes.probe_correct(features[:, 80:], result.weight_GDK, result.bias_GK, topics[80:])
    assert torch.equal(again, result.correct_SPG)
    assert torch.isin(result.l2_G, torch.tensor(probes.L2_GRID)).all()


def test_token_baseline_counts():
    topics = torch.tensor([[0, 0, 1, 1]] * 20)
    tokens = torch.tensor([[5, 6, 7, 5]] * 20)  # 5 is seen equally often in both, 6 in topic 0, 7 in topic 1
    correct = probes.token_baseline(tokens, topics, 9, 2, torch.tensor([1, 2]))
    assert correct.shape == (4, 2)
    assert correct.all()
    assert probes.token_baseline(tokens, topics, 9, 2, torch.tensor([0, 3])).float().mean() == 0.5


def test_boundary_distance_and_response():
    topics = torch.tensor([[1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    distance = probes.distance_from_change(topics)
    assert distance.tolist() == [[-1, -1, 0, 1, 2, 3, 0, 1], [-1] * 8]
    correct = torch.ones(2, 8, 1, dtype=torch.bool)
    correct[0, 2] = False
    accuracy, count = probes.boundary_response(correct, distance)
    assert count[:4].tolist() == [2, 2, 2, 0]
    assert accuracy[:3, 0].tolist() == [0.5, 1, 1]
    assert accuracy[3:].isnan().all()


def test_splits_share_no_sequence_and_strangers_are_strangers():
    split = probes.split_sequences(57)
    parts = [set(range(57)[s]) for s in split]
    assert set.union(*parts) == set(range(57))
    assert sum(map(len, parts)) == 57
    order = probes._derangement(30, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(30))
    assert (order != torch.arange(30)).all()
    with pytest.raises(ValueError, match="at least 10"):
        probes.split_sequences(9)
    assert [list(probes.middle_places(n)) for n in (2, 4, 8)] == [[1], [2, 3], [3, 4, 5, 6]]


def test_ill_scaled_features_and_a_missing_class():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 300, 6, generator=g) * torch.logspace(-3, 4, 6)
    y = (x[0, :, 0] > 0).long()  # class 2 of 3 never occurs
    fitted = fit(x, y[None], torch.tensor([1e-4]), 3)
    guess = fitted.logits(x)[0, :, 0].argmax(-1)
    assert np.mean((guess == y).numpy()) > 0.97


@pytest.mark.gpu
def test_probes_of_the_first_run_take_seconds():
    assert all(row["seconds"] < row["required"] for row in probes.bench_probes("cuda"))
