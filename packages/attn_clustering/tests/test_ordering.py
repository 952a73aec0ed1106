"""Plans: which sequences, how often, in which order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attn_clustering.config import ORDERINGS
from attn_clustering.data import languages
from attn_clustering.data.ordering import Plan, PlanError, plan
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def dominant():
    return torch.from_numpy(np.random.default_rng(0).choice(4, 200, p=[0.4, 0.3, 0.2, 0.1])).to(torch.uint8)


@given(
    n=st.integers(5, 60),
    steps=st.integers(1, 12),
    batch=st.integers(1, 12),
    seed=st.integers(0, 5),
    cooldown=st.sampled_from([0.0, 0.25, 1.0]),
    fresh=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_order_is_the_same_multiset(n, steps, batch, seed, cooldown, fresh):
    n = max(n, steps * batch) if fresh else n
    topics = torch.arange(n) * 7919 % 13 % 4
    plans = [
        plan(
            kind,
            topics,
            steps=steps,
            batch=batch,
            seed=seed,
            epochs="fresh" if fresh else "repeated",
            cooldown=cooldown,
        )
        for kind in ORDERINGS
    ]
    expected = plans[0].index_S.bincount(minlength=n)
    shared = plans[0].cooldown_steps * batch
    for p in plans:
        assert p.index_S.shape == (steps * batch,)
        assert torch.equal(p.index_S.bincount(minlength=n), expected), p.kind
        assert torch.equal(p.index_S[steps * batch - shared :], plans[0].index_S[steps * batch - shared :])
        assert p.epochs == pytest.approx(steps * batch / n)
    if fresh:
        assert expected.max() == 1


def test_each_kind_orders_as_it_says(dominant):
    def topics(kind, **options):
        return dominant[plan(kind, dominant, steps=20, batch=10, seed=1, **options).index_S].long()

    assert (topics("topic_ordered").diff() >= 0).all()
    assert (topics("homogeneous_blocks").diff() >= 0).all()
    assert (topics("reversed").diff() <= 0).all()
    shares = torch.stack([(topics("interleaved").view(10, 20) == k).sum(dim=1) for k in range(4)])
    assert (shares.max(dim=1).values - shares.min(dim=1).values <= 2).all()
    assert (topics("shuffled").diff() != 0).sum() > 100
    assert (topics("random_blocks").diff() != 0).sum() > 100


def test_ties_are_ordered_by_id(dominant):
    index = plan("topic_ordered", dominant, steps=20, batch=10, seed=1).index_S
    assert torch.equal(index, torch.argsort(dominant.long(), stable=True))
    assert torch.equal(plan("topic_ordered", dominant, steps=20, batch=10, seed=2).index_S, index)


def test_random_blocks_have_the_block_sizes_and_repeat_them(dominant):
    index = plan("random_blocks", dominant, steps=40, batch=10, seed=1).index_S
    assert torch.equal(index[:200], index[200:])
    sizes = dominant.bincount().tolist()
    for block in index[:200].split(sizes):  # inside a block ids ascend, as in topic_ordered
        assert (block.diff() > 0).all()
    assert (index[:200].diff() < 0).sum() == 3


def test_shuffles_differ_between_epochs_and_seeds(dominant):
    index = plan("shuffled", dominant, steps=40, batch=10, seed=1).index_S
    assert not torch.equal(index[:200], index[200:])
    assert not torch.equal(index, plan("shuffled", dominant, steps=40, batch=10, seed=2).index_S)


def test_cut_stops_in_the_middle_of_the_ordered_pass(dominant):
    cut = plan("topic_ordered", dominant, steps=25, batch=10, seed=1, partial="cut")
    whole = plan("topic_ordered", dominant, steps=20, batch=10, seed=1)
    assert torch.equal(cut.index_S[200:], whole.index_S[:50])
    matched = plan("topic_ordered", dominant, steps=25, batch=10, seed=1)
    assert len(dominant[matched.index_S[200:]].unique()) == 4
    assert cut.epochs == 1.25


def test_faithful_plan_is_six_and_two_fifths_epochs():
    p = plan("topic_ordered", torch.arange(100_000) % 5, steps=10_000, batch=64, seed=42, partial="cut")
    assert p.epochs == 6.4
    assert p.batch_ids(9_999).shape == (64,)


def test_homogeneous_blocks_of_single_topic_sequences(small):
    data = languages.sample(languages.homogeneous(small["permutation"]), 0, 120)
    p = plan("homogeneous_blocks", data.dominant_N, steps=12, batch=10, seed=0)
    assert (data.topics_NT[p.index_S].flatten().long().diff() >= 0).all()


def test_plans_are_saved_without_pickle_and_checked(tmp_path, dominant):
    p = plan("interleaved", dominant, steps=7, batch=9, seed=3, cooldown=0.3)
    p.save(tmp_path / "plan.npz")
    q = Plan.load(tmp_path / "plan.npz")
    assert torch.equal(p.index_S, q.index_S)
    assert {k: v for k, v in vars(p).items() if k != "index_S"} == {k: v for k, v in vars(q).items() if k != "index_S"}
    assert p.hash == q.hash
    with np.load(tmp_path / "plan.npz") as data:
        np.savez(tmp_path / "bent.npz", index=data["index"][::-1], meta=data["meta"])
    with pytest.raises(PlanError, match="damaged"):
        Plan.load(tmp_path / "bent.npz")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(PlanError, match="no readable plan"):
        Plan.load(tmp_path / "junk.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sorted"}, "no ordering 'sorted'"),
        ({"steps": 0}, "at least 1"),
        ({"cooldown": 1.5}, "cooldown=1.5"),
        ({"epochs": "fresh"}, "need 210 sequences, there are 200"),
    ],
)
def test_impossible_plans_are_refused(dominant, change, message):
    arguments = {"kind": "shuffled", "steps": 21, "batch": 10, "seed": 0} | change
    with pytest.raises(PlanError, match=message):
        plan(arguments.pop("kind"), dominant, **arguments)
