"""The micro-languages: stateless sampling, the law of the segments, tables against slow constructions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from attn_clustering.data import counter, dirichlet, languages, permutation, segments
from attn_clustering.data.settings import RUN1, SANITY, DataConfigError, LanguageConfig
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = ["permutation", "dirichlet"]


def splitmix64(state: int) -> int:
    """The published generator on Python integers."""
    mask = (1 << 64) - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_bits_are_splitmix64(stream, count):
    got = int(counter.bits(stream, torch.tensor([count]))[0]) & ((1 << 64) - 1)
    assert got == splitmix64(stream + count * 0x9E3779B97F4A7C15)


def test_high_and_low_are_the_halves_of_a_draw():
    draws = counter.bits(counter.key(1), torch.arange(1000))
    for x, h, low in zip(draws.tolist(), counter.high(draws, 37), counter.low(draws, 37), strict=True):
        x &= (1 << 64) - 1
        assert int(h) == ((x >> 32) * 37) >> 32
        assert int(low) == ((x & 0xFFFFFFFF) * 37) >> 32


def test_permutation_is_one_and_keys_are_unrelated():
    assert torch.equal(counter.permutation(3, 100).sort().values, torch.arange(100))
    assert counter.key(1, 2) != counter.key(2, 1) != counter.key(1) != counter.key(1, 0)


@pytest.mark.parametrize("kind", KINDS)
@given(first=st.integers(0, 10_000), n=st.integers(1, 40), split=st.sampled_from(["train", "val"]))
@settings(max_examples=8, deadline=None)
def test_a_sequence_depends_on_its_id_alone(kind, first, n, split):
    config = LanguageConfig(kind=kind, vocab=64, seq_len=40, topics=3, min_segment=8, permutations=4, shared=0.0)
    batch = languages.sample(config, first, n, split=split)
    for i in {0, n // 2, n - 1}:
        alone = languages.sample(config, first + i, 1, split=split)
        assert torch.equal(alone.tokens_NT[0], batch.tokens_NT[i])
        assert torch.equal(alone.topics_NT[0], batch.topics_NT[i])
        assert alone.dominant_N[0] == batch.dominant_N[i]
    assert torch.equal(languages.labels(config, first, n, split=split), batch.topics_NT)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_threads_do_not_matter(kind, small, monkeypatch):
    whole = languages.sample(small[kind], 0, 50)
    monkeypatch.setitem(languages._CHUNK, "cpu", 7)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(languages.sample(small[kind], 0, 50).tokens_NT, whole.tokens_NT)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_and_seeds_differ_and_structure_fields_keep_the_language(kind, small):
    config = small[kind]
    a, b = (languages.sample(config, 0, 20, split=split).tokens_NT for split in ("train", "val"))
    assert not (a == b).all(dim=1).any()
    assert not torch.equal(a, languages.sample(replace(config, seed=1), 0, 20).tokens_NT)
    same = replace(config, segments=(1, 1), val_sequences=3)
    assert torch.equal(languages.row_entropies(same), languages.row_entropies(config))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [RUN1, SANITY, LanguageConfig()], ids=["faithful-v1", "sanity", "controlled-v1"])
def test_gpu_samples_what_the_cpu_samples(config):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cpu, gpu = (languages.sample(config, 1000, 300, split="val", device=device) for device in ("cpu", "cuda"))
    for name, x in vars(cpu).items():
        assert torch.equal(x, getattr(gpu, name).cpu()), name


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_regular_and_labels_fit_their_law(kind, small):
    config = small[kind]
    data = languages.sample(config, 0, 400)
    assert data.tokens_NT.dtype == torch.int32
    assert data.tokens_NT.min() >= 3
    assert data.tokens_NT.max() < config.vocab
    counts = torch.stack([(data.topics_NT == k).sum(dim=1) for k in range(config.topics)], dim=1)
    assert (counts.sum(dim=1) == config.seq_len).all()
    # The first of equal maxima, from numpy, which promises it.
    assert np.array_equal(counts.numpy().argmax(axis=1), data.dominant_N.numpy())
    ends = (data.topics_NT[:, 1:] != data.topics_NT[:, :-1]).nonzero()
    for row in range(0, 400, 7):
        cuts = [0, *(ends[ends[:, 0] == row, 1] + 1).tolist(), config.seq_len]
        assert min(np.diff(cuts)) >= config.min_segment
        assert len(cuts) - 1 <= config.law.max_segments


@pytest.mark.parametrize("config", [RUN1, SANITY], ids=["faithful-v1", "sanity"])
def test_label_statistics_match_a_naive_sampler(config, naive_labels):
    rng = np.random.default_rng(0)
    slow = np.stack([naive_labels(config, rng) for _ in range(2_000)])
    fast = languages.labels(config, 0, 4_000).numpy()
    for lag in (1, 32, 64, 128):
        p, q = ((x[:, lag:] == x[:, :-lag]).mean(axis=1) for x in (slow, fast))
        assert abs(p.mean() - q.mean()) < 4 * math.hypot(p.std() / len(p) ** 0.5, q.std() / len(q) ** 0.5)
    changes = [(x[:, 1:] != x[:, :-1]).sum(axis=1) for x in (slow, fast)]
    for n in range(5):
        p, q = ((c == n).mean() for c in changes)
        assert abs(p - q) < 0.04


def test_lag_profile_of_the_first_run():
    labels = languages.labels(RUN1, 0, 8_000)
    for lag, expected in ((1, 0.996), (8, 0.968), (32, 0.866), (64, 0.712), (128, 0.402), (256, 0.208)):
        assert (labels[:, lag:] == labels[:, :-lag]).double().mean().item() == pytest.approx(expected, abs=0.01)
    dominant_share = torch.stack([(labels == k).sum(dim=1) for k in range(5)]).max(dim=0).values.double().mean() / 512
    assert dominant_share.item() == pytest.approx(0.523, abs=0.008)


def test_length_cdf_is_binomial():
    law = RUN1.law
    cdf = segments.length_cdf(law)
    for m, r in ((2, 384), (3, 100), (5, 192)):
        exact = np.cumsum([math.comb(r, x) * (1 / m) ** x * (1 - 1 / m) ** (r - x) for x in range(r + 1)])
        assert np.abs(cdf[m, r, : r + 1].numpy() / segments.SCALE - exact).max() < 2e-9
        assert cdf[m, r, r] == segments.SCALE
    assert (cdf[1, 50, :50] == 0).all()


def test_short_sequences_have_as_many_segments_as_fit():
    config = LanguageConfig(seq_len=128, min_segment=64, segments=(2, 5))
    drawn = segments.draw(config.law, 1, torch.arange(100))
    assert torch.equal(drawn.lengths_NM(), torch.full((100, 2), 64))


def test_homogeneous_sequences_have_one_topic(small):
    data = languages.sample(languages.homogeneous(small["permutation"]), 0, 300)
    assert (data.topics_NT == data.dominant_N[:, None]).all()
    assert (data.dominant_N.bincount() > 60).all()


def test_topics_of_segments_are_independent_and_uniform():
    drawn = segments.draw(RUN1.law, 9, torch.arange(40_000))
    pairs = (drawn.topics_NM[:, 0] * 5 + drawn.topics_NM[:, 1]).bincount(minlength=25).double()
    chi2 = ((pairs - 1600) ** 2 / 1600).sum()
    assert chi2 < 51.2  # 24 degrees of freedom, one in a thousand


# --- permutation ---


def test_every_matrix_is_doubly_stochastic_and_shares_what_it_should(small):
    config = replace(small["permutation"], permutations=6, shared=0.5)
    tables = permutation.build(config, "cpu")
    n = config.regular
    a, b = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    p_RRK = permutation.probabilities(config, tables, a, b)
    assert torch.allclose(p_RRK.sum(dim=0), torch.ones(n, 3).double())
    assert torch.allclose(p_RRK.sum(dim=1), torch.ones(n, 3).double())
    assert len(tables.successor_UR) == 3 + 3 * 3
    assert (tables.members_KJ[:, :3] == torch.arange(3)).all()
    entropy_KR = permutation.row_entropies(config, tables)
    assert torch.allclose(torch.special.entr(p_RRK).sum(dim=1).T, entropy_KR)


# --- dirichlet ---


def test_weights_one_by_one_are_the_rows(small):
    config = small["dirichlet"]
    n = config.regular
    a, b = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    for k in range(config.topics):
        rows = dirichlet.row_weights(config, k, 0, n, "cpu")
        assert torch.equal(dirichlet.weights(config, k, a, b), rows.long())
        assert torch.equal(dirichlet.row_weights(config, k, 5, 9, "cpu"), rows[5:9])


def test_rows_are_dirichlet_with_a_boosted_block():
    config = LanguageConfig(kind="dirichlet", vocab=1003, topics=4, concentration=5.0, signatures=0)
    w = dirichlet.row_weights(config, 1, 0, 1000, "cpu").double()
    inside, outside = w[:, 250:500] / 5, torch.cat([w[:, :250], w[:, 500:]], dim=1)
    unit = outside.mean()
    for part in (inside, outside):  # z^2: mean 1, variance 2, P(z^2 < 1) = 0.6827
        assert (part / unit).mean().item() == pytest.approx(1.0, abs=0.01)
        assert (part / unit).var().item() == pytest.approx(2.0, abs=0.06)
        assert (part < unit).double().mean().item() == pytest.approx(0.6827, abs=0.005)


def test_signature_pairs_are_ten_times_heavier(small):
    config = small["dirichlet"]
    plain, marked = (dirichlet.row_weights(replace(config, signatures=s), 2, 0, 125, "cpu") for s in (0, 10))
    changed = (marked != plain).nonzero()
    assert 8 <= len(changed) <= 10
    assert (changed // config.block == 2).all()
    assert torch.equal(marked[tuple(changed.T)], 10 * plain[tuple(changed.T)])


def test_tables_agree_with_dense_matrices(small):
    config = small["dirichlet"]
    tables = dirichlet.build(config, "cpu", rows_per_chunk=32)
    for k in range(config.topics):
        w = dirichlet.row_weights(config, k, 0, config.regular, "cpu").double()
        p = w / w.sum(dim=1, keepdim=True)
        assert torch.allclose(tables.entropy_KR[k], torch.special.entr(p).sum(dim=1))
        assert torch.allclose(tables.first_KR[k], p.mean(dim=0))
        assert tables.cdf_KRP.shape[2] == 128
        assert (tables.cdf_KRP[k, :, 124:] == w.sum(dim=1, keepdim=True)).all()


def test_walk_finds_the_same_token_as_searchsorted(small):
    """The first transition of every sequence, by numpy on the row's cumulative weights."""
    config = small["dirichlet"]
    tables = dirichlet.build(config, "cpu")
    drawn = segments.draw(config.law, counter.key(config.seed, 1, 0), torch.arange(300))
    tokens_TN = dirichlet.walk(config, tables, drawn.draws_N, drawn.labels_NT(config.seq_len).T.contiguous())
    assert torch.equal(tokens_TN.T + 3, languages.sample(config, 0, 300).tokens_NT)
    for i in range(0, 300, 11):
        for t in (1, 17, 63):
            row = tables.cdf_KRP[int(drawn.labels_NT(64)[i, t]), int(tokens_TN[t - 1, i])].numpy()
            draw = int(counter.bits(int(drawn.draws_N[i]), torch.tensor([segments.FIRST_TOKEN_DRAW + t]))[0])
            r = (((draw >> 32) & 0xFFFFFFFF) * int(row[-1])) >> 32
            assert int(tokens_TN[t, i]) == np.searchsorted(row[: config.regular], r, side="right")


# --- both ---


@pytest.mark.parametrize("kind", KINDS)
def test_transition_frequencies_match_the_matrices(kind, tiny):
    """Chi-square of sampled transitions against the probabilities that the Bayes filter uses."""
    config = tiny[kind]
    data = languages.sample(config, 0, 20_000)
    x, n = data.tokens_NT.long() - 3, config.regular
    a, b = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    pairs = torch.stack([a.flatten(), b.flatten()], dim=1) + 3
    p_RRK = languages.emissions(config, pairs)[:, 1].view(n, n, -1)
    assert torch.allclose(p_RRK.sum(dim=1), torch.ones(n, config.topics).double())
    for k in range(config.topics):
        mine = data.topics_NT[:, 1:] == k
        index = x[:, :-1][mine] * n + x[:, 1:][mine]
        counts = index.bincount(minlength=n * n).view(n, n).double()
        expected = counts.sum(dim=1, keepdim=True) * p_RRK[:, :, k]
        assert (counts[expected == 0] == 0).all()
        used = expected > 5
        chi2 = float(((counts - expected) ** 2 / expected)[used].sum())
        degrees = int(used.sum()) - n
        assert abs(chi2 - degrees) < 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("kind", KINDS)
def test_first_tokens_match_their_law(kind, tiny):
    config = tiny[kind]
    data = languages.sample(config, 0, 20_000)
    p_KR = languages.first_probabilities(config)
    assert torch.allclose(p_KR.sum(dim=1), torch.ones(config.topics).double())
    for k in range(config.topics):
        mine = data.topics_NT[:, 0] == k
        counts = (data.tokens_NT[mine, 0].long() - 3).bincount(minlength=config.regular).double()
        expected = p_KR[k] * mine.sum()
        assert ((counts - expected) ** 2 / expected).sum() < 45  # 19 degrees of freedom


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": 8}, "too small"),
        ({"vocab": 70_000}, "16 bits"),
        ({"segments": (3, 2)}, "least <= largest"),
        ({"min_segment": 400}, "fit into"),
        ({"shared": 1.0}, "fraction"),
        ({"permutations": 2, "shared": 0.9}, "permutation of its own"),
        ({"kind": "dirichlet", "vocab": 40}, "8 is the least"),
        ({"kind": "dirichlet", "vocab": 40_000}, "do not fit"),
        ({"train_sequences": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(DataConfigError, match=message):
        LanguageConfig(**change)


def test_bench_rows_say_what_was_measured(monkeypatch, small):
    monkeypatch.setattr(
        languages, "LANGUAGES", {"controlled-v1": small["permutation"], "faithful-v1": small["dirichlet"]}
    )
    rows = languages.bench_languages("cpu", n=64)
    assert [row["required"] for row in rows] == [20e6, 1e6]
    assert all(row["tokens_per_s"] > 0 and row["total_s"] > row["tables_s"] > 0 for row in rows)
