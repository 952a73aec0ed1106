"""Batches simulated on the way (small blocks of simulated data on the CPU)."""

from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from iceaggr.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from iceaggr.data.batches import BatchError
from iceaggr.data.features import Tables, rotate_z
from iceaggr.data.grouping import group_doms
from iceaggr.data.kaggle import slice_events
from iceaggr.data.prepare import prepare, split
from iceaggr.data.tokens import build_tokens
from iceaggr.geometry import icecube86
from iceaggr.sim import feed as feeds
from iceaggr.sim.events import simulate_block
from iceaggr.sim.feed import FEED_STREAM, HELD_OUT_SEED, SimulatedFeed, held_out_store
from iceaggr.sim.rng import mix_seed
from iceaggr.train import fit
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.run import Run

MODEL = ModelConfig(slots=2, d_model=16, d_hidden=16, layers=1, heads=2, head_hidden=8, dom_cap=40)
BLOCK = 48
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def array():
    return Tables.of(icecube86(), "cpu")


@pytest.fixture(scope="module")
def blocks():
    """Every block is simulated once for this file."""
    return {}


@pytest.fixture
def feed(array, blocks, monkeypatch):
    def once(*args, seed, stream, block, **options):
        key = (seed, stream, block, args)
        if key not in blocks:
            blocks[key] = simulate_block(*args, seed=seed, stream=stream, block=block, **options)
        return blocks[key]

    monkeypatch.setattr(feeds, "simulate_block", once)

    def make(model=MODEL, **options):
        settings = {"token_budget": 400, "events_per_epoch": 1000, "seed": 3, "block_size": BLOCK, **options}
        return SimulatedFeed(model, array, icecube86(), **settings)

    return make


def same(a, b):
    assert torch.equal(a.features_TF, b.features_TF)
    assert torch.equal(a.offsets_E1, b.offsets_E1)
    assert torch.equal(a.target_E3, b.target_E3)
    assert np.array_equal(a.index_E, b.index_E)


def test_batches_are_the_blocks_events_one_after_another(feed, array):
    batches = list(islice(feed(), 6))
    index_E = np.concatenate([batch.index_E for batch in batches])
    last = int(index_E[-1] >> 14)
    assert last >= 1, "the batches should reach the second block"
    expected = []
    for number in range(last + 1):
        pulses, _ = simulate_block(BLOCK, seed=3, stream=FEED_STREAM, block=number)
        expected.append((number << 14) + np.arange(pulses.n_events))
    assert np.array_equal(index_E, np.concatenate(expected)[: len(index_E)])
    for batch, after in pairwise(batches):
        assert batch.n_tokens <= 400
        first = int(after.offsets_E1[1])  # tokens of the next event
        assert batch.n_tokens + first > 400 or batch.n_events == feed().event_capacity
    # an event in the middle, made by hand
    number, place = divmod(int(batches[-1].index_E[1]), 1 << 14)
    pulses, _ = simulate_block(BLOCK, seed=3, stream=FEED_STREAM, block=number)
    alone = build_tokens(slice_events(pulses, place, place + 1), MODEL, array)
    low, high = batches[-1].offsets_E1[1:3].tolist()
    assert torch.equal(batches[-1].features_TF[low:high], alone.features_TF)
    assert torch.equal(batches[-1].target_E3[1], alone.target_E3[0])


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_feed_goes_on_where_it_was_stopped(feed, taken):
    whole = list(islice(feed(rotate=True), 7))
    first = feed(rotate=True, prefetch=2)
    for expected, batch in zip(whole, islice(first, taken), strict=False):
        same(batch, expected)
    state = first.state_dict()
    first.close()
    again = feed(rotate=True)
    again.load_state_dict(state)
    for expected, batch in zip(whole[taken:], again, strict=False):
        same(batch, expected)


def test_ranks_share_no_event_and_make_up_the_whole(feed):
    both = [np.concatenate([b.index_E for b in islice(feed(rank=rank, world=2), 5)]) for rank in (0, 1)]
    assert not np.intersect1d(*both).size
    for rank, index_E in enumerate(both):
        assert set(index_E >> 14) <= set(range(rank, 100, 2))
        assert (np.diff(index_E) > 0).all()
    assert feed(world=2).steps_per_epoch == pytest.approx(feed().steps_per_epoch / 2)


def test_steps_per_epoch_is_about_right(feed):
    one = feed(token_budget=600)
    sizes = [batch.n_events for batch in islice(one, 12)]
    assert one.events_per_epoch / one.steps_per_epoch == pytest.approx(np.mean(sizes), rel=0.15)


def test_static_batches_have_one_shape_and_rotation_turns_everything(feed):
    for plain, padded, turned in islice(zip(feed(), feed(static=True), feed(rotate=True), strict=True), 3):
        assert padded.features_TF.shape == (400, 10)
        assert padded.target_E3.shape == (feed().event_capacity, 3)
        assert torch.equal(padded.features_TF[: plain.n_tokens], plain.features_TF)
        same_z = turned.features_TF[:, 2:] == plain.features_TF[:, 2:]
        assert same_z.all()
        dot = (plain.target_E3[:, :2] * turned.target_E3[:, :2]).sum(1)
        cross = plain.target_E3[:, 0] * turned.target_E3[:, 1] - plain.target_E3[:, 1] * turned.target_E3[:, 0]
        angle_E = torch.atan2(cross, dot)
        event_T = torch.repeat_interleave(torch.arange(plain.n_events), plain.offsets_E1.long().diff())
        by_hand = rotate_z(plain.features_TF[:, :3], angle_E[event_T])
        torch.testing.assert_close(by_hand, turned.features_TF[:, :3], atol=1e-4, rtol=0)


def test_mistakes_are_named(feed):
    with pytest.raises(BatchError, match="seeds from 0"):
        feed(seed=HELD_OUT_SEED)
    with pytest.raises(BatchError, match="raise tokens_per_batch"):
        next(feed(token_budget=20))
    state = feed().state_dict()
    with pytest.raises(BatchError, match="rank = 0, this feed has 1"):
        feed(rank=1, world=2).load_state_dict(state)


def test_held_out_events_are_the_same_every_time_and_know_their_truth():
    store, again = (held_out_store(30, device="cpu", geometry=icecube86()) for _ in range(2))
    assert store.n_events == 30
    assert np.array_equal(store.direction_E3, again.direction_E3)
    assert np.unique(store.event_id).size == 30
    assert store.event_id.min() == HELD_OUT_SEED << 31
    assert set(store.truth["type"]) <= {0, 1}
    assert (store.truth["energy"] > 100).all()
    pulses = store.gather(np.arange(30))
    assert np.array_equal(group_doms(pulses).offsets_E1.diff().numpy(), store.n_doms)


def test_no_block_to_train_on_is_another_one_or_a_held_out_one():
    """As far as the studies go and further, on a CPU, which looks at the lower 32 bits of a seed only."""

    def seeds(seed, stream, n_blocks):
        return [mix_seed(seed, stream, number) & 0xFFFFFFFF for number in range(n_blocks)]

    held_out = set(seeds(HELD_OUT_SEED, 0, 600))  # a CPU's block has some 490 events
    for seed in (0, 1, 2):
        to_train_on = seeds(seed, FEED_STREAM, 5000)
        assert len(set(to_train_on)) == 5000
        assert held_out.isdisjoint(to_train_on)


def test_prepare_holds_everything_out_and_asks_for_numbers(tmp_path):
    config = DataConfig(data="stream", store=str(tmp_path), train_events=100, val_events=10)
    prepared = prepare(config, seed=0, device="cpu")
    train_E, held_out_E = split(prepared.cache, config)
    assert (train_E.size, held_out_E.size) == (0, 10)
    assert prepared.label == "simulated data"
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"data.train_events"):
        prepare(replace(config, train_events=None), seed=0, device="cpu")


@pytest.mark.slow
def test_training_on_a_stream_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """With a moving average, stopped in the middle by an error."""
    monkeypatch.setitem(feeds.BLOCK_SIZE, "cpu", BLOCK)
    config = TrainConfig(
        model=MODEL,
        optim=OptimConfig(ema=0.9, vmf_weight=1.0, rotate=True),
        data=DataConfig(data="stream", train_events=120, val_events=20),
        epochs=1,
        tokens_per_batch=400,
        checkpoint_every=3,
        eval_every=1000,
        wandb="disabled",
    )

    def begin(name):
        run = Run.create(tmp_path / name, config, seed=0, project="test", resume_command="{path}", wandb="disabled")
        with run:
            fit(config, run, Dist())

    begin("whole")
    real, calls = SimulatedFeed.__next__, []

    def stops(self):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("pulled the plug")
        return real(self)

    monkeypatch.setattr(SimulatedFeed, "__next__", stops)
    with pytest.raises(RuntimeError, match="plug"):
        begin("stopped")
    monkeypatch.setattr(SimulatedFeed, "__next__", real)
    with Run.open(tmp_path / "stopped") as run:
        fit(config, run, Dist())
    first, second = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert first == second


@pytest.mark.gpu
def test_the_feed_on_a_gpu_is_ahead_and_resumes():
    tables = Tables.of(icecube86(), "cuda")

    def feed():
        return SimulatedFeed(
            MODEL, tables, icecube86(), token_budget=1 << 15, events_per_epoch=10_000, seed=1, static=True, rotate=True
        )

    first = feed()
    whole = [replace(batch, features_TF=batch.features_TF.clone()) for batch in islice(first, 12)]
    first.close()
    again = feed()
    for _ in range(5):
        next(again)
    state = again.state_dict()
    again.close()
    other = feed()
    other.load_state_dict(state)
    for expected, batch in zip(whole[5:], other, strict=False):
        same(batch, expected)
    other.close()
    assert len({tuple(batch.features_TF.shape) for batch in whole}) == 1
