"""Reference levels: the filter against enumeration, closed forms against samples, the published figures."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from attn_clustering.data import filters, languages, levels
from attn_clustering.data.settings import RUN1, SANITY, DataConfigError, LanguageConfig
from hypothesis import given, settings
from hypothesis import strategies as st

STATED = LanguageConfig()


def segmentations(config):
    """Every (lengths, topics) of a sequence with its probability, by enumeration of the definition."""
    low, high = config.segments[0], config.law.max_segments
    for n in range(low, high + 1):
        spare = config.seq_len - n * config.min_segment
        for extra in itertools.product(range(spare + 1), repeat=n):
            if sum(extra) != spare:
                continue
            ways = math.factorial(spare) // math.prod(math.factorial(x) for x in extra)
            p = ways / n**spare / (high - low + 1) / config.topics**n
            for topics in itertools.product(range(config.topics), repeat=n):
                yield [k for k, x in zip(topics, extra, strict=True) for _ in range(config.min_segment + x)], p


def enumerate_filter(config, emission_TK):
    """Posterior of the topic after each token and predictive loss, summing over all segmentations."""
    joint = torch.zeros(config.seq_len, config.topics, dtype=torch.float64)
    for labels, p in segmentations(config):
        running = p
        for t, k in enumerate(labels):
            running *= float(emission_TK[t, k])
            joint[t, k] += running
    evidence_T = joint.sum(dim=1)
    before_T = torch.cat([torch.ones(1).double(), evidence_T[:-1]])
    return joint / evidence_T[:, None], -(evidence_T / before_T).log()


def assert_filter_is_exact(config, emission_NTK):
    found = filters.filter_topics(config.law, emission_NTK)
    for i in range(len(emission_NTK)):
        posterior_TK, loss_T = enumerate_filter(config, emission_NTK[i])
        assert torch.allclose(found.posterior_NTK[i], posterior_TK, atol=1e-8)
        assert torch.allclose(found.loss_NT[i], loss_T, atol=1e-7)


@pytest.mark.parametrize("kind", ["permutation", "dirichlet"])
def test_filter_is_the_sum_over_all_segmentations(kind, tiny):
    data = languages.sample(tiny[kind], 0, 3)
    assert_filter_is_exact(tiny[kind], languages.emissions(tiny[kind], data.tokens_NT))


@given(
    topics=st.integers(2, 3),
    least=st.integers(1, 4),
    low=st.integers(1, 2),
    more=st.integers(0, 2),
    spare=st.integers(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_filter_is_exact_for_any_law_and_emissions(topics, least, low, more, spare, seed):
    config = LanguageConfig(
        vocab=64, seq_len=low * least + spare, topics=topics, segments=(low, low + more), min_segment=least
    )
    emission = torch.rand(2, config.seq_len, topics, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_filter_is_exact(config, emission + 0.01)


def test_filter_does_not_depend_on_the_batch(small, monkeypatch):
    data = languages.sample(small["dirichlet"], 0, 11)
    whole = filters.bayes_filter(small["dirichlet"], data.tokens_NT)
    monkeypatch.setitem(filters._CHUNK, "cpu", 4)
    parts = filters.bayes_filter(small["dirichlet"], data.tokens_NT)
    assert torch.allclose(whole.posterior_NTK, parts.posterior_NTK, atol=1e-12)
    assert torch.allclose(whole.posterior_NTK.sum(dim=2), torch.ones(11, 64).double(), atol=1e-9)


def test_filter_of_one_segment_needs_no_boundary(small):
    """With a single topic per sequence the posterior is Bayes' rule on the product of emissions."""
    config = languages.homogeneous(small["dirichlet"])
    e_NTK = languages.emissions(config, languages.sample(config, 0, 5).tokens_NT)
    product = e_NTK.log().cumsum(dim=1)
    assert torch.allclose(filters.filter_topics(config.law, e_NTK).posterior_NTK, product.softmax(dim=2), atol=1e-8)


@pytest.mark.parametrize("kind", ["permutation", "dirichlet"])
def test_closed_forms_match_monte_carlo(kind, small):
    """H(next | previous, topic) and the unigram entropies against -ln p of sampled tokens."""
    config = small[kind]
    data = languages.sample(config, 0, 4_000)
    found = levels.levels(config, n_sequences=16)
    truth = data.topics_NT.long()[..., None]
    known = -languages.emissions(config, data.tokens_NT).gather(2, truth)[:, 1:].log().mean().item()
    assert found.known_topic.value == pytest.approx(known, abs=0.005)
    unigram_KR = languages.unigrams(config)
    x = data.tokens_NT.long() - 3
    assert found.unigram.value == pytest.approx(-unigram_KR.mean(dim=0)[x].log().mean().item(), abs=0.02)
    assert found.unigram_known_topic.value == pytest.approx(
        -unigram_KR[:, x].permute(1, 2, 0).gather(2, truth).log().mean().item(), abs=0.02
    )


def test_control_variate_leaves_the_floor_where_it_is(small):
    config = small["dirichlet"]
    found = levels.levels(config, n_sequences=400)
    plain = (
        filters.bayes_filter(config, languages.sample(config, 0, 400, split="val").tokens_NT).loss_NT[:, 1:].mean(dim=1)
    )
    se = float(plain.std() / math.sqrt(400))
    assert abs(found.bayes_floor.value - float(plain.mean())) < 4 * se
    assert found.bayes_floor.se < se / 2


def test_levels_are_ordered_and_complete(small):
    for config in small.values():
        found = levels.levels(config, n_sequences=64)
        assert levels.bayes_floor(config, n_sequences=64) == found.bayes_floor
        losses = [found.ln_vocab, found.unigram, found.unigram_filter, found.bayes_floor, found.known_topic]
        assert [x.value for x in losses] == sorted((x.value for x in losses), reverse=True)
        assert found.chance_accuracy.value <= found.one_token_accuracy.value <= found.unigram_filter_accuracy.value
        assert found.unigram_filter_accuracy.value < found.bigram_filter_accuracy.value < 1
    data = json.loads(found.to_json())
    assert data["bayes_floor"]["value"] == found.bayes_floor.value
    assert data["config"]["topics"] == 3
    assert "bayes_floor" in found.table()


def test_kept_levels_are_made_once_for_every_seed(small, tmp_path, monkeypatch):
    language, file = small["dirichlet"], tmp_path / "levels.json"
    found = levels.kept_levels(file, language, [0, 1])
    second = levels.levels(replace(language, seed=1)).bayes_floor.value
    assert found[levels.FLOORS] == {"0": found["bayes_floor"]["value"], "1": second}
    assert json.loads(file.read_text()) == found
    for name in ("levels", "bayes_floor"):
        monkeypatch.setattr(levels, name, lambda *_, **__: pytest.fail("made again"))
    assert levels.kept_levels(file, language, [0, 1, 1]) == found


def test_within_ratio_against_a_direct_sum():
    labels = torch.tensor([[0, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.uint8)
    found = levels._attention_levels(labels, 2)
    assert found["within_ratio_chance"].value == pytest.approx((1 + 1 + 1 / 3 + 3 / 4 + 4) / 8)
    assert found["within_ratio_legacy_chance"].value == pytest.approx((1 + 2 + 1 + 3 + 10) / 20)
    assert found["max_entropy_causal"].value == pytest.approx(math.log(24) / 4)


def test_permutation_closed_form():
    """ln k less what coinciding permutations cost, and (1 - rho) ln K nats for the topic where nothing coincides."""
    found = levels.levels(replace(STATED, seq_len=128, min_segment=32, segments=(1, 2)), n_sequences=16)
    k, r = STATED.permutations, STATED.regular
    assert found.known_topic.value == pytest.approx(math.log(k) - k * (k - 1) / 2 / r * 2 / k * math.log(2), abs=0.004)
    config = replace(STATED, topics=3)
    data = languages.sample(config, 0, 40)
    e_NTK = languages.emissions(config, data.tokens_NT)[:, 1:]
    known = e_NTK.gather(2, data.topics_NT[:, 1:].long()[..., None]).log().mean()
    gain = known - e_NTK.mean(dim=2).log().mean()
    assert gain.item() == pytest.approx((1 - config.shared) * math.log(3), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("permutations", "shared", "known", "floor", "ceiling"),
    [(16, 0.0, 2.770, 2.804, 1.000), (32, 0.5, 3.460, 3.491, 0.9945), (32, 0.9, 3.460, 3.483, 0.949)],
)
def test_permutation_table(permutations, shared, known, floor, ceiling):
    config = replace(STATED, permutations=permutations, shared=shared)
    found = levels.levels(config, n_sequences=64)
    assert found.known_topic.value == pytest.approx(known, abs=0.002)
    # The reference used a constant hazard, an upper bound on the exact filter.
    assert floor - 0.015 < found.bayes_floor.value < floor
    assert found.bigram_filter_accuracy.value == pytest.approx(ceiling, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "unigram", "bag", "floor", "known", "accuracies", "n"),
    [
        (RUN1, 8.317, 8.036, 7.310, 7.282, (0.555, 0.960, 0.988), 256),
        (SANITY, 6.227, 5.274, 4.534, 4.49, (0.980, 0.994, 0.997), 256),
    ],
    ids=["faithful-v1", "sanity"],
)
def test_levels_of_the_seed_runs(config, unigram, bag, floor, known, accuracies, n):
    found = levels.levels(config, n_sequences=n)
    assert found.unigram.value == pytest.approx(unigram, abs=0.005)
    # The reference scored all positions and used a constant hazard, an upper bound on the exact filter.
    assert found.unigram_filter_with_first.value == pytest.approx(bag, abs=0.005)
    assert found.bayes_floor_with_first.value == pytest.approx(floor, abs=0.005)
    assert found.bayes_floor.value < found.bayes_floor_with_first.value
    assert found.known_topic.value == pytest.approx(known, abs=0.01)
    assert found.bayes_floor.se < 0.003
    assert found.unigram_filter.se < 0.003
    one, bag_accuracy, ceiling = accuracies
    assert found.one_token_accuracy.value == pytest.approx(one, abs=0.002)
    assert found.unigram_filter_accuracy.value == pytest.approx(bag_accuracy, abs=0.01)
    assert found.bigram_filter_accuracy.value == pytest.approx(ceiling, abs=0.004)
    languages._build.cache_clear()


def test_mean_row_entropy_of_a_part_of_the_first_run():
    """Closed form with digammas, 7.281 nats, on 64 of the 4,093 rows of one topic."""
    from attn_clustering.data import dirichlet

    w = dirichlet.row_weights(replace(RUN1, signatures=0), 0, 0, 64, "cpu").double()
    entropy = torch.special.entr(w / w.sum(dim=1, keepdim=True)).sum(dim=1)
    assert entropy.mean().item() == pytest.approx(7.281, abs=0.01)


def test_unknown_names_and_too_few_sequences_are_refused():
    with pytest.raises(DataConfigError, match="smoke"):
        levels.main("nonsense")
    with pytest.raises(DataConfigError, match="at least 2"):
        levels.levels(STATED, n_sequences=1)


def test_command_line_forms():
    assert "bayes_floor" in levels.main("smoke", n_sequences=32)
    assert json.loads(levels.main("smoke", as_json=True, n_sequences=32))["sequences"] == 32
