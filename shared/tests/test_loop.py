"""The training loop's chores, in this process; test_loop_faults.py kills processes."""

from __future__ import annotations

import math
import signal
import threading
from dataclasses import dataclass

import pytest
import torch
from lab_shared.checkpoint import CheckpointError, load_weights, model_tensors
from lab_shared.dist import Dist
from lab_shared.loop import NonFiniteLoss, ticks
from lab_shared.meters import FiniteGuard
from lab_shared.optim import make_optimizer
from lab_shared.run import Run, read_metrics
from lab_shared.testing import assert_parity
from torch import nn


@dataclass(frozen=True)
class Config:
    steps: int = 6


@pytest.fixture
def parts(tmp_path):
    """A run, a model and its optimizer; y = 2 x is to be learned."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    with Run.create(
        tmp_path / "run", Config(), seed=0, project="p", resume_command="resume {path}", wandb="disabled"
    ) as run:
        yield {"run": run, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


def step_loss(model, scale=1.0):
    return (model(torch.ones(4, 1)) - 2).square().mean() * scale


@pytest.mark.parametrize(
    ("poison", "what"), [(math.nan, "the loss"), (math.inf, "the loss"), ("gradient", "the gradient norm")]
)
def test_non_finite_names_step_ids_and_checkpoint_and_leaves_the_weights(parts, poison, what):
    model, run = parts["model"], parts["run"]
    before = {}

    def loop():
        for tick in ticks(**parts, steps=6, checkpoint_every=2):
            before.update({name: x.clone() for name, x in model_tensors(model).items()})
            if tick.step < 5:
                loss = step_loss(model)
            elif poison == "gradient":
                loss = (model.weight * 0).sqrt().sum()  # 0, with an infinite derivative
            else:
                loss = step_loss(model, poison)
            tick.update(loss, ids=torch.arange(10 * tick.step, 10 * tick.step + 30))

    with pytest.raises(NonFiniteLoss) as caught:
        loop()
    error = caught.value
    assert (error.step, error.ids) == (5, list(range(50, 80)))
    assert error.checkpoint == str(run.checkpoints / "step_000000004.safetensors")
    assert f"{what} is not finite at step 5, batch ids [50, 51," in str(error)
    assert "(30 in all)" in str(error)
    for name, x in model_tensors(model).items():
        assert torch.equal(x, before[name])


def test_a_weight_that_is_not_finite_is_never_saved(parts):
    def loop():
        for tick in ticks(**parts, steps=6, checkpoint_every=2):
            tick.update(step_loss(parts["model"]))
            if tick.step == 2:
                parts["model"].weight.data.fill_(math.inf)
                assert not tick.keep_best(0.0)

    with pytest.raises(NonFiniteLoss, match=r"a weight is not finite at step 2.*There is no checkpoint yet"):
        loop()
    assert not list(parts["run"].path.rglob("*.safetensors"))


def test_the_guard_finds_the_first_bad_step_long_after_it():
    guard, good, bad = FiniteGuard(torch.device("cpu"), Dist()), torch.tensor(1.0), torch.tensor(math.nan)
    assert guard.agree(stop=False) == (None, False)
    assert guard.agree(stop=True) == (None, True)
    for step, (loss, norm) in enumerate([(good, good), (good, bad), (bad, bad), (good, good)], start=7):
        guard.watch(step, loss, norm, ids=[step])
    assert guard.agree(stop=False) == (("the gradient norm", 8, [8]), False)
    guard = FiniteGuard(torch.device("cpu"), Dist())
    guard.watch(3, bad, bad, ids="windows of step 3")  # one name, not letters
    assert guard.agree(stop=False) == (("the loss", 3, ["windows of step 3"]), False)


def test_logged_means_weigh_metrics_by_examples_and_losses_by_steps(parts):
    sizes = [1, 2, 3, 10, 20, 30]
    for tick in ticks(**parts, steps=6, log_every=3, unit="events"):
        loss = step_loss(parts["model"]) * 0 + tick.step
        n = torch.tensor(sizes[tick.step - 1]) if tick.step % 2 else sizes[tick.step - 1]
        tick.update(loss, n=n, angle=torch.tensor(float(tick.step)), half=0.5)
    first, second = read_metrics(parts["run"].path, "train")
    assert (first["step"], second["step"]) == (3, 6)
    assert (first["loss"], second["loss"]) == (2.0, 5.0)
    assert_parity(first["angle"], (1 * 1 + 2 * 2 + 3 * 3) / 6, atol=1e-12)
    assert_parity(second["angle"], (10 * 4 + 20 * 5 + 30 * 6) / 60, atol=1e-12)
    assert first["half"] == 0.5
    assert_parity(second["events_per_s"] / second["it_per_s"], 20.0, atol=1e-9)
    assert {"grad_norm", "lr", "time"} <= first.keys()


def test_the_step_is_what_it_would_be_by_hand(parts):
    model, twin = parts["model"], nn.Linear(1, 1)
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    factors = [0.0, 0.5, 1.0, 0.25]
    for tick in ticks(**parts, steps=4, lr=lambda step: factors[step], clip=0.3):
        tick.update(step_loss(model))
        optimizer.zero_grad()
        step_loss(twin).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
        optimizer.param_groups[0]["lr"] = 0.1 * factors[tick.step - 1]
        optimizer.step()
        assert model.weight.grad is None
    assert_parity(model.weight, twin.weight, atol=1e-6)
    assert read_metrics(parts["run"].path)[-1]["lr"] == 0.025


def test_the_base_rate_comes_from_the_configuration(parts):
    for tick in ticks(**parts, steps=2, lr=lambda _: 0.5):
        tick.update(step_loss(parts["model"]))
    changed = torch.optim.SGD(parts["model"].parameters(), lr=0.3)
    for tick in ticks(parts["run"], 3, model=parts["model"], optimizer=changed, lr=lambda _: 0.5):
        assert tick.step == 3
        tick.update(step_loss(parts["model"]))
    assert changed.param_groups[0]["lr"] == 0.15


def test_every_and_last(parts):
    seen = []
    for tick in ticks(**parts, steps=5):
        seen.append((tick.step, tick.every(2), tick.last))
        tick.update(step_loss(parts["model"]))
    assert seen == [(1, False, False), (2, True, False), (3, False, False), (4, True, False), (5, True, True)]


def test_keep_best_keeps_the_lowest_also_over_a_resume(parts):
    def run_to(steps, values):
        for tick in ticks(**parts, steps=steps):
            tick.update(step_loss(parts["model"]))
            kept.append(tick.keep_best(values[tick.step]))

    kept: list[bool] = []
    run_to(3, {1: 5.0, 2: math.nan, 3: 4.0})
    run_to(5, {4: 4.5, 5: 3.0})
    assert kept == [True, False, True, False, True]
    metadata = load_weights(parts["run"].path / "best.safetensors", parts["model"])
    assert (metadata["step"], metadata["value"]) == ("5", "3.0")


def test_misuse_is_told(parts):
    model = parts["model"]

    def first_step(body):
        for tick in ticks(**parts, steps=3):
            body(tick)

    with pytest.raises(RuntimeError, match="called twice in step 1"):
        first_step(lambda tick: [tick.update(step_loss(model)) for _ in range(2)])
    with pytest.raises(RuntimeError, match=r"did not call tick\.update in step 1"):
        first_step(lambda tick: None)
    with pytest.raises(ValueError, match=r"takes one number, got shape \(4, 1\)"):
        first_step(lambda tick: tick.update(model(torch.ones(4, 1))))
    with pytest.raises(ValueError, match=r"metric 'angle' must be one number, got shape \(2,\)"):
        first_step(lambda tick: tick.update(step_loss(model), angle=torch.zeros(2)))
    with pytest.raises(ValueError, match="'lr' is taken"):
        first_step(lambda tick: tick.update(step_loss(model), lr=1.0))
    with pytest.raises(ValueError, match=r"\['b'\] are not those of the steps before, \['a'\]"):
        first_step(lambda tick: tick.update(step_loss(model), **{"b" if tick.step == 2 else "a": 1.0}))
    with pytest.raises(ValueError, match="log_every=0 must be at least 1"):
        next(ticks(**parts, steps=3, log_every=0))


def test_a_checkpoint_of_another_model_or_state_is_refused(parts):
    for tick in ticks(**parts, steps=1):
        tick.update(step_loss(parts["model"]))
    with pytest.raises(CheckpointError, match=r"holds the state of \['meter'\], not of \['data', 'meter'\]"):
        next(ticks(**parts, steps=2, state={"data": parts["optimizer"]}))
    other = nn.Linear(2, 1)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 1 .*weight has shape \(1, 1\)"):
        next(ticks(parts["run"], 2, model=other, optimizer=torch.optim.SGD(other.parameters(), lr=1.0)))


def test_leaving_the_loop_gives_the_signals_back(parts):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for tick in ticks(**parts, steps=3):
        assert signal.getsignal(signal.SIGINT) != handlers[0]
        tick.update(step_loss(parts["model"]))
        break
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert not list(parts["run"].checkpoints.glob("*"))


def test_a_loop_in_another_thread_runs_without_signals(parts):
    seen = []

    def work():
        for tick in ticks(**parts, steps=2):
            tick.update(step_loss(parts["model"]))
            seen.append(tick.step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1, 2]


@pytest.mark.gpu
def test_on_cuda_nothing_waits_for_the_device_between_log_points(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x = torch.randn(16, 8, device="cuda")
    options = {"seed": 0, "project": "p", "resume_command": "r {path}", "wandb": "disabled"}
    with Run.create(tmp_path / "run", Config(), **options) as run:
        try:
            for tick in ticks(run, 12, model=model, optimizer=optimizer, clip=1.0, log_every=10, checkpoint_every=10):
                loss = model(x).square().mean()
                torch.cuda.set_sync_debug_mode("default" if tick.every(10) else "error")
                tick.update(loss, ids=x[:, 0], n=16, size=loss.detach())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert [line["step"] for line in read_metrics(run.path)] == [10, 12]


@pytest.mark.gpu
def test_on_cuda_a_bad_loss_is_found_before_the_checkpoint(tmp_path):
    model = nn.Linear(1, 1).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    options = {"seed": 0, "project": "p", "resume_command": "r {path}", "wandb": "disabled"}
    with Run.create(tmp_path / "run", Config(), **options) as run:

        def loop(steps, bad_step=None):
            for tick in ticks(run, steps, model=model, optimizer=optimizer, log_every=10, checkpoint_every=4):
                loss = model(torch.ones(4, 1, device="cuda")).mean()
                tick.update(loss * (math.nan if tick.step == bad_step else 1.0), ids=[tick.step])
            return tick.step

        with pytest.raises(NonFiniteLoss, match=r"not finite at step 5, batch ids \[5\].*step_000000004"):
            loop(20, bad_step=5)
        assert [p.name for p in run.checkpoints.iterdir()] == ["step_000000004.safetensors"]
        assert loop(8) == 8


def test_the_state_of_another_optimiser_or_program_is_one_line(tmp_path):
    from lab_shared.checkpoint import newest_checkpoint, save_checkpoint
    from lab_shared.errors import UserError

    options = {"seed": 0, "project": "p", "resume_command": "r {path}", "wandb": "disabled"}

    def go(run, kind):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        optimizer = make_optimizer(model, lr=1e-3, kind=kind)
        with run:
            for tick in ticks(run, 4, model=model, optimizer=optimizer, checkpoint_every=1):
                tick.update(model(torch.ones(3, 4)).square().mean())
                if tick.step == 2:
                    break

    go(Run.create(tmp_path / "run", Config(), **options), "muon")
    with pytest.raises(UserError, match="another kind of optimizer"):
        go(Run.open(tmp_path / "run"), "adamw")
    folder = tmp_path / "run" / "checkpoints"
    tree, _ = newest_checkpoint(folder)
    save_checkpoint(folder, 1, {name: x for name, x in tree.items() if name != "model"})
    with pytest.raises(UserError, match=r"does not fit.*'model'"):
        go(Run.open(tmp_path / "run"), "muon")
    save_checkpoint(folder, 1, {"loop": []})
    with pytest.raises(UserError, match="none of a training"):
        go(Run.open(tmp_path / "run"), "muon")
