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
from rh_memory import train as train_module
from rh_memory.bench import bench
from rh_memory.config import PRESETS, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from rh_memory.data.unfold import Spacings
from rh_memory.data.windows import SpacingData, WindowBatch, split
from rh_memory.dataset import Dataset, load_dataset
from rh_memory.losses import drift_loss, orthogonality
from rh_memory.models import build_model
from rh_memory.objective import Objective, check_losses, validate
from rh_memory.train import WindowStream, make_optimizer
from rh_memory.zeros.store import Zeros, save

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


def made_up_heights(n=5300):
    """Gaps that follow a simple rule (each from the two before it), from height 6e5."""
    s = 1 + 0.4 * np.sin(1.1 * np.arange(n))
    return 6e5 + np.cumsum(s) * (2 * np.pi / 11.5)


def toy_dataset(context=32):
    gamma = made_up_heights()
    s = np.diff(gamma) * 11.5 / (2 * np.pi)
    centre = np.floor(gamma[1:])
    log_height = np.full(len(s), 11.5, np.float32)
    spacings = Spacings(s.astype(np.float32), centre, gamma[1:] - centre, log_height)
    width = context + 1
    return Dataset(spacings, SpacingData(spacings), split(len(s), width=width), "made-up spacings", width, False)


def steps(config, n, dataset=None, batch=8, seed=0):
    """Losses of n training steps at a constant rate, and the model."""
    dataset = dataset or toy_dataset()
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
def test_golden_losses(name):
    losses, _ = steps(CASES[name], 20)
    # another CPU's kernels stay inside, a changed model does not
    golden(Path(__file__).parent / "golden" / f"{name}.json", losses, rtol=2e-5)


def test_overfits_a_rule():
    """The made-up spacings follow from any two: the density must become far narrower than their marginal."""
    losses, model = steps(CASES["explicit"], 40)
    dataset = toy_dataset()
    found = validate(model, dataset, dataset.starts("val", 64), CASES["explicit"])
    assert losses[0] > 0.4
    assert found["nll_last"] < -1.2


# --- losses ---------------------------------------------------------------------------------------


def test_orthogonality_is_zero_for_an_orthogonal_set_only():
    assert float(orthogonality(3 * torch.eye(4, 8))) == pytest.approx(0, abs=1e-10)
    assert float(orthogonality(torch.ones(3, 8))) == pytest.approx(6, rel=1e-5)


def test_drift_loss_is_the_rollout_written_out():
    dataset = toy_dataset()
    torch.manual_seed(0)
    model = build_model(replace(EXPLICIT, context=32)).eval()
    batch = dataset.data.window(dataset.starts("train", 3), 33)
    fast = drift_loss(model, batch, context=10, horizon=4)
    s, gamma = batch.s_BW[:, :10], batch.gamma_BW[:, :10]
    predicted = []
    for _ in range(4):
        padded = torch.cat([s, torch.zeros(3, 1)], 1)  # predict leaves out the last spacing
        log_height = torch.full_like(padded, 11.5)
        window = WindowBatch(padded, log_height, torch.cat([gamma, gamma[:, -1:]], 1))
        mean = model.predict(window, "last").mean()
        predicted.append(mean)
        s = torch.cat([s, mean.detach()[:, None]], 1)
        gamma = torch.cat([gamma, gamma[:, -1:] + mean.detach()[:, None] * (2 * math.pi / 11.5)], 1)
    error = (torch.stack(predicted, 1) - batch.s_BW[:, 10:14]).cumsum(1).abs()
    assert_parity(fast, (error * torch.tensor([0.25, 0.5, 0.75, 1.0])).mean(), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        ({"memory": "postfix"}, {"drift_weight": 0.1}, "memory = none or prefix"),
        ({}, {"drift_weight": 0.1, "drift_horizon": 30}, "= 40 exceeds model.context = 32"),
        ({"use_aux_loss": True}, {}, "model.memory = none"),
        ({"memory": "postfix", "content_mode": "zeroed"}, {"ortho_weight": (1e-3, 1e-2)}, "content_mode = zeroed"),
        ({"memory": "postfix", "use_aux_loss": True, "n_memory": 3}, {"aux_mode": "diagonal"}, "n_memory = 3"),
    ],
)
def test_losses_the_model_cannot_have_are_refused(model, loss, message):
    config = TrainConfig(model=replace(TINY, **model), loss=replace(LossConfig(), **loss))
    with pytest.raises(UserError, match=message):
        check_losses(config)


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


def test_the_stream_goes_on_where_it_stood():
    dataset = toy_dataset()
    streams = [WindowStream(dataset.data, dataset.starts("train"), 33, 5, seed=s) for s in (1, 2)]
    next(streams[0])
    streams[1].load_state_dict(streams[0].state_dict())
    (a, starts_a), (b, starts_b) = next(streams[0]), next(streams[1])
    assert torch.equal(starts_a, starts_b)
    assert torch.equal(a.s_BW, b.s_BW)
    assert_parity(a.s_BW[:, 0], dataset.spacings.s[starts_a.numpy()], atol=0)


@pytest.fixture
def made_up_file(tmp_path):
    gamma = made_up_heights()
    save(tmp_path / "made_up.npy", Zeros(np.floor(gamma), gamma - np.floor(gamma)))
    return str(tmp_path / "made_up.npy")


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


@pytest.mark.parametrize("name", ["e2", "e5"])
def test_stopped_and_resumed_is_bit_identical(name, made_up_file, tmp_path, no_report, monkeypatch):
    config = run_config(name, made_up_file)
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
    from safetensors.torch import load_file

    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_that_does_not_divide_is_refused(made_up_file):
    config = run_config("e0", made_up_file, batch_size=3)
    with pytest.raises(UserError, match="batch_size = 3 does not divide among 2 processes"):
        train_module._train(config, None, Dist(world=2))


def test_bench_counts_whole_steps():
    small = replace(CASES["explicit"], batch_size=4)
    PRESETS["test-only"] = ("", small)
    try:
        (row,) = bench("cpu", ["test-only"], repeats=2)
    finally:
        del PRESETS["test-only"]
    assert row["targets_per_s"] == pytest.approx(32 * row["windows_per_s"])
    assert row["windows_per_s"] == pytest.approx(4 / row["median_s"])
    json.dumps(row)
    with pytest.raises(UserError, match="no preset 'e9'"):
        bench("cpu", ["e9"])


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_training_learns_on_a_gpu(name):
    dataset = toy_dataset()
    dataset = replace(dataset, data=SpacingData(dataset.spacings, "cuda"))
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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("source", "zeros", "low", "high"), [("shuffled", 2_001_052, 0.498, 0.506), ("gue", 400_000, 0.42, 0.45)]
)
def test_controls_stay_at_what_is_known_of_them(source, zeros, low, high, tmp_path, no_report):
    """Below would be leakage: nothing but the marginal is left in shuffled spacings, no primes in random matrices.

    Each spacing is a target a dozen times at most: after hundreds of times the model knows shuffled spacings by heart.
    """
    config = PRESETS["explicit-small"][1]
    data = replace(config.data, source=source, folder=str(tmp_path / "zeros"), zeros=zeros)
    config = replace(config, data=data, eval_every=config.steps, eval_windows=8192, wandb="disabled")
    train_module.train(config, tmp_path / "run")
    assert low < read_metrics(tmp_path / "run", "val")[-1]["nll_last"] < high
