"""The training loop: its losses, its optimiser groups, golden losses, exact resume, early stopping."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_shared.checkpoint import load_tree
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.optim import clip_grads
from lab_shared.run import read_metrics
from lab_shared.testing import assert_parity, golden
from rh_memory import bench as bench_module
from rh_memory import train as train_module
from rh_memory.bench import bench
from rh_memory.config import PRESETS, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from rh_memory.data.windows import SpacingData
from rh_memory.dataset import load_dataset
from rh_memory.models import build_model
from rh_memory.objective import Objective, validate
from rh_memory.train import WindowStream, make_optimizer
from safetensors.torch import load_file

TINY = ModelConfig(context=32, d_model=32, layers=2, heads=2, dropout=0.1, n_memory=8, pos="rope", sigma_floor=1e-3)
EXPLICIT = replace(TINY, inputs="height", values="prime_rotary", dropout=0.0, head_init="spread")
E5 = replace(
    TINY, memory="postfix", readouts=4, seed_slots=True, slot_id_mode="permute_per_batch", use_aux_loss=True,
    slot_dropout=0.2, norm_cap=1.0, block_norm=True,
)  # fmt: skip
FAST = OptimConfig(lr=3e-3, weight_decay=0.1, warmup=5, final=0.1)
CASES = {
    "e0": TrainConfig(model=replace(TINY, pos="learned"), optim=FAST, loss=LossConfig(entropy_weight=0.005)),
    "explicit": TrainConfig(model=EXPLICIT, optim=FAST),
    "e2": TrainConfig(
        model=replace(TINY, memory="prefix"),
        optim=FAST,
        loss=LossConfig(drift_weight=0.1, drift_every=5, drift_horizon=6, drift_batch=4),
    ),
    "e5": TrainConfig(
        model=E5,
        optim=FAST,
        loss=LossConfig(aux_mode="diagonal", aux_ramp=(5, 10), ortho_weight=(1e-3, 1e-2), ortho_ramp=(5, 10)),
    ),
}


def steps(config, n, dataset, batch=8, seed=0):
    """Losses of n training steps at a constant rate, and the model."""
    torch.manual_seed(seed)
    model = build_model(config.model)
    optimizer, objective = make_optimizer(model, config.optim), Objective(config, model, dataset, Dist())
    stream = WindowStream(dataset.data, dataset.starts("train"), dataset.width, batch, seed)
    losses = []
    for step in range(1, n + 1):
        loss, _ = objective(next(stream)[0], step)
        loss.backward()
        clip_grads(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("name", CASES)
def test_golden_losses(name, toy_dataset):
    losses, _ = steps(CASES[name], 20, toy_dataset)
    # another CPU's kernels stay inside, a changed model does not
    golden(Path(__file__).parent / "golden" / f"{name}.json", losses, rtol=2e-5)


def test_overfits_a_rule(toy_dataset):
    """The made-up spacings follow from any two: the density must become far narrower than their marginal."""
    losses, model = steps(CASES["explicit"], 40, toy_dataset)
    found = validate(model, toy_dataset, toy_dataset.starts("val", 64), CASES["explicit"])
    assert losses[0] > 0.4
    assert found["nll_last"] < -1.2


# --- optimiser and data ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_with_its_rate_and_decay(kind):
    model = build_model(replace(E5, pos="learned"))
    groups = make_optimizer(model, replace(FAST, optimizer=kind)).param_groups
    of = {name: group for group in groups for name in group["param_names"]}
    assert sorted(of) == sorted(name for name, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(of)
    for name in ("slots.content_MD", "slots.identity_MD", "readout_M"):
        assert of[name]["lr"] == pytest.approx(0.3 * FAST.lr)
    for name, group in of.items():
        # embed_data is a matrix of one column, which counts as a vector
        matrix = name.endswith("weight") and not any(part in name for part in ("norm", "position", "embed_data"))
        assert group["weight_decay"] == (FAST.weight_decay if matrix else 0.0), name
    assert (of["backbone.blocks.0.up.weight"]["lr"] == FAST.muon_lr) == (kind == "muon")


def test_the_stream_goes_on_where_it_stood(toy_dataset):
    dataset = toy_dataset
    streams = [WindowStream(dataset.data, dataset.starts("train"), 33, 5, seed=s) for s in (1, 2)]
    next(streams[0])
    streams[1].load_state_dict(streams[0].state_dict())
    (a, starts_a), (b, starts_b) = next(streams[0]), next(streams[1])
    assert torch.equal(starts_a, starts_b)
    assert torch.equal(a.s_BW, b.s_BW)
    assert_parity(a.s_BW[:, 0], dataset.spacings.s[starts_a.numpy()], atol=0)


def test_datasets_of_every_kind(made_up_file):
    base = TrainConfig(model=TINY, data=DataConfig(file=made_up_file))
    cpu = torch.device("cpu")
    zeta = load_dataset(base, cpu)
    assert zeta.width == 33
    assert zeta.label.endswith("made_up.npy")
    assert zeta.starts("val", 7).numel() == 7
    control = load_dataset(replace(base, data=replace(base.data, source="shuffled")), cpu)
    assert control.label.startswith("shuffled spacings of")
    assert sorted(control.spacings.s) == sorted(zeta.spacings.s)
    assert not np.array_equal(control.spacings.s, zeta.spacings.s)
    by_rows = load_dataset(replace(base, data=replace(base.data, windows="rows")), cpu)
    assert by_rows.width == 256
    assert (by_rows.starts("train") % 256 == 0).all()


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def no_report(monkeypatch):
    """Scores and report have tests of their own, and need more zeros than these runs have."""
    monkeypatch.setattr(train_module, "_finish", lambda run, *_: run.finish({}) or "done")


def run_config(name, made_up_file, **changes):
    short = {"steps": 14, "batch_size": 4, "eval_every": 6, "eval_windows": 16, "checkpoint_every": 5, "log_every": 3}
    data = DataConfig(file=made_up_file)
    return replace(CASES[name], data=data, wandb="disabled", **{**short, **changes})


class Unplugged(Exception):
    pass


def unplug(monkeypatch, at):
    """Training ends in the middle of step `at`."""
    whole_step = Objective.__call__

    def until(self, batch, step):
        if step == at:
            raise Unplugged
        return whole_step(self, batch, step)

    monkeypatch.setattr(Objective, "__call__", until)


@pytest.mark.parametrize(("name", "ema"), [("e2", 0.0), ("e2", 0.9), ("e5", 0.9)])
def test_stopped_and_resumed_is_bit_identical(name, ema, made_up_file, tmp_path, no_report, monkeypatch):
    config = run_config(name, made_up_file)
    config = replace(config, optim=replace(config.optim, ema=ema))
    assert train_module.train(config, tmp_path / "whole") == "done"

    with monkeypatch.context() as patch:
        unplug(patch, at=12)
        with pytest.raises(Unplugged):
            train_module.train(config, tmp_path / "part")
    assert train_module.resume(tmp_path / "part") == "done"
    for file in ("weights.safetensors", "config.json"):
        assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    newest = sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1].name
    states = [load_tree(tmp_path / part / "checkpoints" / newest) for part in ("whole", "part")]
    assert torch.equal(states[0]["rng"][0]["torch"], states[1]["rng"][0]["torch"])
    lines = [[{**r, "time": 0} for r in read_metrics(tmp_path / part, "val")] for part in ("whole", "part")]
    assert lines[0] == lines[1]
    assert {"nll", "nll_last", "plateau"} <= lines[0][0].keys()


def test_half_of_the_windows_are_mirrored_where_that_is_asked_for(made_up_file):
    dataset = load_dataset(run_config("e0", made_up_file), torch.device("cpu"))
    parts = (dataset.data, dataset.starts("train"), dataset.width, 400, 0)
    batch, starts = next(WindowStream(*parts, mirror=True))
    upwards = (batch.s_BW == dataset.data.window(starts, dataset.width).s_BW).all(1)
    assert 150 < int(upwards.sum()) < 250
    whole, _ = next(WindowStream(*parts))
    assert (whole.s_BW == dataset.data.window(starts, dataset.width).s_BW).all()
    of_rank_1, _ = next(WindowStream(*parts, mirror=True, rank=1, world=2))
    assert torch.equal(of_rank_1.s_BW, batch.s_BW[1::2])


def test_the_weights_kept_are_the_average_where_one_is_asked_for(made_up_file, tmp_path, no_report):
    config = run_config("explicit", made_up_file, steps=15)
    train_module.train(replace(config, optim=replace(config.optim, ema=0.9)), tmp_path / "run")
    state = load_tree(tmp_path / "run" / "checkpoints" / "step_000000015.safetensors")
    kept = load_file(tmp_path / "run" / "weights.safetensors")
    average = state["state"][0]["ema"]["shadow"]
    assert all(torch.equal(kept[name], average[name]) for name in average)
    assert any(not torch.equal(kept[name], state["model"][name]) for name in average)


@pytest.mark.parametrize("resumed", [False, True])
def test_early_stopping_keeps_the_best_weights(resumed, made_up_file, tmp_path, no_report, monkeypatch):
    """At rate 0 nothing improves after the first look, and patience counts optimiser steps, also over a restart."""
    short = {"patience": 4, "steps": 40, "eval_every": 2, "checkpoint_every": 3}
    config = run_config("explicit", made_up_file, early_stop=True, **short)
    config = replace(config, optim=replace(config.optim, lr=0.0))
    if resumed:
        with monkeypatch.context() as patch:
            unplug(patch, at=4)
            with pytest.raises(Unplugged):
                train_module.train(config, tmp_path / "run")
        train_module.resume(tmp_path / "run")
    else:
        train_module.train(config, tmp_path / "run")
    looks = [record["step"] for record in read_metrics(tmp_path / "run", "val")]
    assert looks == [2, 4, 6]
    best, final = (tmp_path / "run" / f"{name}.safetensors" for name in ("best", "weights"))
    assert load_weights_equal(best, final)
    assert (tmp_path / "run" / "DONE.json").exists()


def load_weights_equal(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_that_does_not_divide_is_refused(made_up_file):
    config = run_config("e0", made_up_file, batch_size=3)
    with pytest.raises(UserError, match="batch_size = 3 does not divide among 2 processes"):
        train_module._train(config, None, Dist(world=2))


def test_bench_counts_whole_steps(monkeypatch):
    monkeypatch.setitem(PRESETS, "test-only", ("", replace(CASES["explicit"], batch_size=4)))
    rows = bench("cpu", ["test-only"], repeats=2)
    assert [row["name"] for row in rows] == ["train test-only", "train test-only, bfloat16"]
    for row in rows:
        assert row["targets_per_s"] == pytest.approx(32 * row["windows_per_s"])
        assert row["windows_per_s"] == pytest.approx(4 / row["median_s"])
    json.dumps(rows)
    timed = []
    monkeypatch.setattr(bench_module.Objective, "_drift", lambda self, batch: timed.append(1) or batch.s_BW.sum() * 0)
    monkeypatch.setitem(PRESETS, "test-only", ("", replace(CASES["e2"], batch_size=4)))
    bench("cpu", ["test-only"], repeats=2)
    assert len(timed) == 8  # in both number formats two to warm up and two timed, each a round of five steps
    with pytest.raises(UserError, match="no preset 'e9'"):
        bench("cpu", ["e9"])


def test_a_taken_folder_is_refused_before_data_are_made(tmp_path, made_up_file, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(train_module, "_checked_data", lambda *_: pytest.fail("data were made"))
    with pytest.raises(UserError, match="already holds a run"):
        train_module.train(run_config("e0", made_up_file), tmp_path)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_training_learns_on_a_gpu(name, toy_dataset):
    dataset = replace(toy_dataset, data=SpacingData(toy_dataset.spacings, "cuda"))
    torch.manual_seed(0)
    config = CASES[name]
    model = build_model(config.model).cuda()
    dist = Dist(device=torch.device("cuda"))
    optimizer, objective = make_optimizer(model, config.optim), Objective(config, model, dataset, dist)
    stream = WindowStream(dataset.data, dataset.starts("train"), 33, 64, 0)
    losses = []
    for step in range(1, 61):
        loss, _ = objective(next(stream)[0], step)
        loss.backward()
        clip_grads(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses).cpu()
    assert torch.isfinite(losses).all()
    assert losses[-5:].mean() < losses[:5].mean() - 0.2
    found = validate(model, dataset, dataset.starts("val", 64), config)
    assert math.isfinite(found["nll_last"])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(CASES["e5"], model=replace(E5, n_memory=4)), "model.n_memory = 4"),
        (replace(CASES["e5"], model=replace(E5, context=16)), "at least; lengthen"),
        (replace(CASES["e0"], batch_size=7), "does not divide among 2"),
        (replace(CASES["e0"], data=DataConfig(file="/nowhere.npy")), "/nowhere.npy"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(tmp_path, monkeypatch, config, said):
    monkeypatch.setattr(train_module, "init", lambda: Dist(world=2 if config.batch_size == 7 else 1))
    with pytest.raises(UserError, match=said):
        train_module.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
