"""Optimisers: which parameter is in which group, muon-optimizer and torch.optim.Muon as yardsticks, state."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.errors import UserError
from lab_shared.optim import clip_grads, make_optimizer, set_lr, split_params
from torch import Tensor, nn


class Net(nn.Module):
    """Every kind of parameter that the split tells apart."""

    def __init__(self, tied: bool = True, conv: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.project = nn.Linear(5, 16, bias=False)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16, bias=False), "norm": nn.LayerNorm(16)})
            for _ in range(3)
        )
        self.conv = nn.Conv1d(16, 8, 3, bias=False) if conv else None
        self.cls = nn.Parameter(torch.zeros(1, 16))
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(16, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def fill_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        fill_gradients(model, step)
        set_lr(optimizer, 1 / (1 + step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# parameter groups


def test_split_by_role() -> None:
    split = split_params(Net(), not_hidden=("project", "head"))
    hidden = {f"layers.{i}.{name}.weight" for i in range(3) for name in ("up", "down")}
    assert set(split.muon) == hidden | {"conv.weight"}
    assert set(split.decay) == {"embed.weight", "project.weight"}
    norms = {f"layers.{i}.norm.{name}" for i in range(3) for name in ("weight", "bias")}
    assert set(split.no_decay) == norms | {f"layers.{i}.up.bias" for i in range(3)} | {"cls", "scale"}


def test_tied_weight_is_hidden_only_if_all_its_uses_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert list(split_params(model).muon) == ["0.weight"]
    assert list(split_params(model, not_hidden=["1"]).decay) == ["0.weight"]


def test_prefixes_match_whole_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "ab": nn.Linear(3, 3, bias=False)})
    assert list(split_params(model, not_hidden=["a."]).muon) == ["ab.weight"]
    with pytest.raises(ValueError, match=r"'b' matches no parameter; the model has a, ab"):
        split_params(model, not_hidden=["b"])


KINDS = {
    "linear": lambda: nn.Linear(3, 4),
    "one_output": lambda: nn.Linear(3, 1),
    "embedding": lambda: nn.Embedding(5, 3),
    "norm": lambda: nn.LayerNorm(3),
    "conv": lambda: nn.Conv2d(2, 3, 2),
    "nested": lambda: nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3, bias=False))),
}


@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6), st.data())
@settings(deadline=None, max_examples=60)
def test_every_parameter_in_exactly_one_group(kinds: list[str], data: st.DataObject) -> None:
    modules = [KINDS[kind]() for kind in kinds]
    modules += data.draw(st.lists(st.sampled_from(modules), max_size=2))  # modules used twice
    model = nn.Sequential(*modules)
    prefixes = data.draw(st.lists(st.sampled_from([str(i) for i in range(len(modules))])))
    split = split_params(model, not_hidden=prefixes)
    grouped = [id(p) for group in split for p in group.values()]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert all(p.ndim >= 2 for p in split.muon.values())
    assert not any(name.split(".")[0] in prefixes for name in split.muon)
    names = dict(model.named_parameters())
    assert all(names[name] is p for group in split for name, p in group.items())


@pytest.mark.slow
def test_names_are_the_plain_models_under_compile() -> None:
    model = Net()
    assert split_params(torch.compile(model)).muon.keys() == split_params(model).muon.keys()


# against the published ones


def assert_no_further_apart_than_the_references(device: str) -> None:
    """Both references compute in bf16 and round in different places; that difference is the yardstick."""
    pytest.importorskip("muon")
    start = Net(conv=False).to(device)
    options = {"lr": 0.01, "muon_lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "not_hidden": ("project",)}
    weights = {}
    for impl in ("fused", "keller", "torch"):
        model = copy.deepcopy(start)
        train(model, make_optimizer(model, impl=impl, **options), range(6))
        weights[impl] = {name: p.detach() for name, p in model.named_parameters()}
    split = split_params(start, not_hidden=options["not_hidden"])
    for name, p in split.muon.items():
        ours, keller, torchs = (weights[impl][name] for impl in ("fused", "keller", "torch"))
        noise, moved = (keller - torchs).norm(), (keller - p.detach()).norm()
        assert noise < 0.05 * moved, name
        assert (ours - keller).norm() < 1.5 * noise, name
        assert (ours - torchs).norm() < 1.5 * noise, name
    for name in (*split.decay, *split.no_decay):
        assert torch.equal(weights["fused"][name], weights["keller"][name]), name


def test_fused_equals_the_published_implementations() -> None:
    assert_no_further_apart_than_the_references("cpu")


# one object


@pytest.mark.parametrize(
    ("kind", "impl"), [("muon", "fused"), ("muon", "keller"), ("muon", "torch"), ("adamw", "fused")]
)
def test_resume_is_bit_exact(kind: str, impl: str) -> None:
    if impl == "keller":
        pytest.importorskip("muon")
    model = Net(conv=False)
    options = {"lr": 0.01, "kind": kind, "impl": impl, "weight_decay": 0.1}
    optimizer = make_optimizer(model, **options)
    train(model, optimizer, range(3))

    saved = optimizer.state_dict()
    for state in saved["state"].values():
        assert all(isinstance(value, Tensor) for value in state.values())
    resumed = copy.deepcopy(model)
    state = {i: {k: v.clone() for k, v in s.items()} for i, s in saved["state"].items()}
    groups = json.loads(json.dumps(saved["param_groups"]))  # numbers and strings only
    other = make_optimizer(resumed, **options)
    other.load_state_dict({"state": state, "param_groups": groups})

    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    for (name, a), b in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name
    for a, b in zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_hyper_parameters_come_from_the_configuration() -> None:
    model = Net()
    old = make_optimizer(model, lr=1.0, muon_lr=2.0, weight_decay=0.1, betas=(0.8, 0.9))
    train(model, old, range(2))
    new = make_optimizer(model, lr=3.0, muon_lr=4.0, momentum=0.5, betas=(0.7, 0.6))
    new.load_state_dict(old.state_dict())
    assert [g["lr"] for g in new.param_groups] == [1.0, 0.5, 0.5]  # the current rate is state
    set_lr(new, 0.5)
    assert [g["lr"] for g in new.param_groups] == [2.0, 1.5, 1.5]
    assert [g["weight_decay"] for g in new.param_groups] == [0, 0, 0]
    assert new.param_groups[0]["momentum"] == 0.5
    assert new.param_groups[1]["betas"] == (0.7, 0.6)
    before = model.head.weight.detach().clone()
    train(model, new, range(2, 3))  # the parts follow the loaded groups and state
    assert not torch.equal(before, model.head.weight)
    assert new.state_dict()["state"][len(new.param_groups[0]["params"])]["step"] == 3


def test_foreign_state_is_refused() -> None:
    model = Net()
    optimizer = make_optimizer(model, lr=1.0)
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"'head\.weight' is in one only"):
        make_optimizer(Net(tied=False), lr=1.0).load_state_dict(state)
    with pytest.raises(ValueError, match="same names in other groups"):
        make_optimizer(model, lr=1.0, not_hidden=["conv"]).load_state_dict(state)
    state["state"] = {str(key): value for key, value in state["state"].items()}
    with pytest.raises(ValueError, match="entry '0', which no parameter group lists"):
        optimizer.load_state_dict(state)


def test_weight_decay_is_decoupled_and_on_matrices_only() -> None:
    model = Net()
    start = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, lr=0.1, muon_lr=0.3, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    split = split_params(model)
    for group, factor in ((split.muon, 1 - 0.3 * 0.5), (split.decay, 1 - 0.1 * 0.5), (split.no_decay, 1.0)):
        for name, p in group.items():
            torch.testing.assert_close(p.detach(), start[name] * factor, msg=name)


def test_missing_gradients() -> None:
    pytest.importorskip("muon")
    for impl in ("fused", "torch", "keller"):
        model = Net(conv=False)
        optimizer = make_optimizer(model, lr=0.1, impl=impl, weight_decay=0.1)
        fill_gradients(model, 0)
        model.layers[1]["up"].weight.grad = None
        before = model.layers[1]["up"].weight.detach().clone()
        if impl == "keller":
            with pytest.raises(RuntimeError, match=r"'layers\.1\.up\.weight' has no gradient"):
                optimizer.step()
        else:
            optimizer.step()
        assert torch.equal(before, model.layers[1]["up"].weight)


def test_closure() -> None:
    model = Net(conv=False)
    optimizer = make_optimizer(model, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in model.parameters())
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_make_optimizer_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown optimizer kind 'sgd'"):
        make_optimizer(Net(), lr=0.1, kind="sgd")
    with pytest.raises(ValueError, match="unknown Muon impl 'fast'"):
        make_optimizer(Net(), lr=0.1, impl="fast")
    with pytest.raises(ValueError, match="no hidden matrix"):
        make_optimizer(nn.LayerNorm(3), lr=0.1)
    with pytest.raises(ValueError, match=r"'conv\.weight' has 3: use impl='fused'"):
        make_optimizer(Net(), lr=0.1, impl="torch")
    monkeypatch.setitem(sys.modules, "muon", None)
    with pytest.raises(UserError, match="muon-optimizer"):
        make_optimizer(Net(conv=False), lr=0.1, impl="keller")


# CUDA


@pytest.mark.gpu
def test_fused_equals_the_published_implementations_on_cuda() -> None:
    assert_no_further_apart_than_the_references("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_step_does_not_wait_for_the_gpu(kind: str) -> None:
    model = Net().cuda()
    optimizer = make_optimizer(model, lr=0.01, kind=kind)
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        torch.cuda.set_sync_debug_mode("default" if step == 0 else "error")  # the first step compiles
        try:
            clip_grads(model.parameters(), 1.0)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_resume_is_bit_exact_on_cuda() -> None:
    model = Net().cuda()
    optimizer = make_optimizer(model, lr=0.01)
    train(model, optimizer, range(3))
    resumed = copy.deepcopy(model)
    other = make_optimizer(resumed, lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
