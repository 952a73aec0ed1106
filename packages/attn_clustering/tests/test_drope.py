"""Phase 2: positions removed, one stream for all conditions, and an honest verdict."""

import json
from dataclasses import replace

import pytest
import torch
from attn_clustering import drope, runs, train
from attn_clustering.config import DataConfig, ModelConfig, OptimConfig, Recalibration
from attn_clustering.data.ordering import beginning, plan
from attn_clustering.data.settings import LANGUAGES
from attn_clustering.experiments import EXPERIMENTS, phase2_config, run_config
from attn_clustering.model import build_model
from lab_shared.errors import UserError

LANGUAGE = replace(LANGUAGES["smoke"], vocab=32, seq_len=32, min_segment=8, train_sequences=60, val_sequences=8)
TINY = replace(
    EXPERIMENTS["smoke"][1],
    model=ModelConfig(vocab=32, d_model=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=24),
    data=DataConfig(LANGUAGE, partial="cut"),
    optim=OptimConfig(steps=10, batch=4, warmup=2, lr=3e-3, eval_every=10, eval_sequences=8),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drope") / "mha-topic_ordered-s0"
    config = run_config(TINY, "mha", "topic_ordered", 0)
    train.train(config, folder, device="cpu")
    return folder, config


def test_removing_positions_gives_the_nope_model_of_the_same_weights():
    tokens = torch.arange(20).reshape(2, 10) % 32
    dropped, nope = build_model(TINY.model, 0), build_model(replace(TINY.model, rope=False), 0)
    before = dropped(tokens)
    assert torch.equal(drope.remove_rope(dropped)(tokens), nope(tokens))
    assert (before - nope(tokens)).abs().max() > 1e-5


def test_every_condition_of_a_seed_gets_the_same_shuffled_stream():
    orders = []
    for attention, ordering in (("mha", "shuffled"), ("mha", "topic_ordered"), ("gqa", "homogeneous_blocks")):
        config = run_config(TINY, attention, ordering, 0)
        for phase in ("drope", "extra"):
            sequences, plan = runs.training_data(phase2_config(config, Recalibration(0.5), phase), "cpu")
            orders.append((sequences.tokens_NT[plan.index_S], plan.kind))
    assert all(kind == "shuffled" and torch.equal(tokens, orders[0][0]) for tokens, kind in orders)
    training = runs.training_data(run_config(TINY, "mha", "shuffled", 0), "cpu")[1]
    assert not training.index_S[:20].equal(plan.index_S)


@pytest.mark.parametrize("ordering", ["shuffled", "topic_ordered"])
@pytest.mark.parametrize("data", [{"partial": "cut"}, {"partial": "matched"}, {"mode": "fresh", "cooldown": 0.4}])
def test_own_order_is_the_beginning_of_phase_1(ordering, data, tmp_path):
    """Whatever made that order: a whole pass, a subset of one, or fresh sequences before a cooldown."""
    config = run_config(replace(TINY, data=DataConfig(LANGUAGE, **data)), "mha", ordering, 0)
    (tmp_path / config.name).mkdir()
    sequences, whole = runs.training_data(config, "cpu")
    whole.save(tmp_path / config.name / "plan.npz")

    def own(fraction):
        recal = phase2_config(config, Recalibration(fraction, order="own"))
        return runs.training_data(recal, "cpu", tmp_path / recal.name)

    for steps in (3, 8, 10):
        again, plan = own(steps / 10)
        assert again.tokens_NT.equal(sequences.tokens_NT)
        assert plan.index_S.equal(whole.index_S[: 4 * steps])
        assert plan.cooldown_steps == (max(0, steps - 6) if "cooldown" in data else 0)
        assert plan.epochs == pytest.approx(4 * steps / len(sequences))
    with pytest.raises(UserError, match="an order that has 10"):
        own(1.5)


def test_the_first_runs_own_order_is_what_a_plan_of_fewer_steps_would_be(tmp_path):
    """Where passes are whole and cut, as in the runs that were recalibrated so."""
    config = run_config(TINY, "mha", "topic_ordered", 0)
    order = {"batch": 4, "seed": 0, "partial": "cut"}
    dominant = runs.training_data(config, "cpu")[0].dominant_N
    whole, few = (plan("topic_ordered", dominant, steps=steps, **order) for steps in (40, 17))
    assert beginning(whole, 17, len(dominant)).hash == few.hash


def test_fresh_recalibration_uses_sequences_never_trained_on():
    fresh = replace(TINY, data=replace(TINY.data, mode="fresh"))
    config = run_config(fresh, "mha", "topic_ordered", 0)
    trained_on = {tuple(row) for row in runs.training_data(config, "cpu")[0].tokens_NT.tolist()}
    sequences, plan = runs.training_data(phase2_config(config, Recalibration(0.5)), "cpu")
    assert len(sequences) == plan.index_S.numel() == 20
    assert not trained_on & {tuple(row) for row in sequences.tokens_NT.tolist()}


def test_rates_and_steps_of_phase_2(trained):
    _, config = trained
    recal = phase2_config(config, Recalibration(0.5, 0.1))
    assert recal.optim.steps == 5
    assert recal.optim.warmup == 2
    assert recal.optim.muon_lr == pytest.approx(0.002)
    assert recal.optim.lr == pytest.approx(3e-4)
    assert recal.name == "mha-topic_ordered-s0-drope-50pct-x0.1"


def test_recalibration_starts_from_the_trained_weights_without_positions(trained, capsys):
    folder, config = trained
    for phase in ("drope", "extra"):
        recal = phase2_config(config, Recalibration(0.2, 0.1), phase)
        summary = train.train(recal, folder.parent / recal.name, device="cpu")
        assert summary["parent_val_loss"] == runs.read_summary(folder)["val_loss"]
        model, _ = runs.load_run(folder.parent / recal.name)
        assert model.rope_on == (phase == "extra")
        if phase == "extra":  # nothing was removed: it starts where its parent ended
            assert summary["val_loss_at_start"] == pytest.approx(summary["parent_val_loss"], abs=1e-6)
    assert "recovered: validation loss" in capsys.readouterr().err


def test_zero_steps_remove_the_positions_and_train_nothing(trained):
    folder, config = trained
    recal = phase2_config(config, Recalibration(0.0, 1.0))
    summary = train.train(recal, folder.parent / recal.name, device="cpu")
    assert summary["steps"] == 0
    assert summary["val_loss"] == summary["val_loss_at_start"]
    before, after = runs.load_run(folder)[0], runs.load_run(folder.parent / recal.name)[0]
    assert all(torch.equal(a, after.state_dict()[name]) for name, a in before.state_dict().items())
    assert before.rope_on
    assert not after.rope_on


def test_the_gate_is_two_hundredths_of_a_nat(tmp_path):
    config = phase2_config(run_config(TINY, "mha", "shuffled", 0), Recalibration())
    parent = tmp_path / "mha-shuffled-s0"
    parent.mkdir()
    (parent / "DONE.json").write_text(json.dumps({"summary": {"val_loss": 3.0}}))
    good, bad = (drope.verdict(config, tmp_path / "child", loss) for loss in (3.0199, 3.0201))
    assert good["recovered"]
    assert not bad["recovered"]
    assert drope.verdict_line(bad).startswith("not recovered")


def test_a_wrong_or_unfinished_parent_is_refused(trained, tmp_path):
    folder, config = trained
    with pytest.raises(UserError, match="no finished run"):
        train.train(phase2_config(config, Recalibration()), tmp_path / "child", device="cpu")
    other = phase2_config(run_config(TINY, "gqa", "topic_ordered", 0), Recalibration(), folder=folder.name)
    with pytest.raises(UserError, match="no RoPE run of gqa"):
        train.train(other, folder.parent / "other", device="cpu")
