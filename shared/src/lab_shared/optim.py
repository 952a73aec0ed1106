"""Optimisers: Muon for hidden matrices and AdamW for the rest, as one object; schedules and clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lab_shared.dist import unwrap
from lab_shared.errors import needs
from lab_shared.muon import BatchedMuon, evaluate

Kind = Literal["muon", "adamw"]
Impl = Literal["fused", "keller", "torch"]
Schedule = Literal["constant", "cosine", "one_cycle", "wsd"]


class ParamSplit(NamedTuple):
    """Name -> parameter; every parameter of the model is in exactly one of the three."""

    muon: dict[str, nn.Parameter]
    decay: dict[str, nn.Parameter]
    no_decay: dict[str, nn.Parameter]


def split_params(model: nn.Module, *, not_hidden: Iterable[str] = ()) -> ParamSplit:
    """Sort a model's parameters by how they are optimised.

    muon: matrices of hidden layers; more than two dimensions count as rows x everything else (convolutions).
    decay: all other matrices, for AdamW with weight decay: weights of nn.Embedding, and names under a prefix
    in `not_hidden` (input projections, output heads).
    no_decay: vectors and scalars, for AdamW without decay; a matrix of one row or one column is a vector.

    A tied weight appears once, under its first name, and counts as hidden only if no use of it says
    otherwise. Frozen parameters are sorted too. Names are the plain model's, whatever DDP or torch.compile
    put around it.

    Raises ValueError when a prefix in `not_hidden` matches no parameter.
    """
    model = unwrap(model)
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(p, []).append(name)
    prefixes = [prefix.rstrip(".") for prefix in not_hidden]
    for prefix in prefixes:
        if not any(_under(name, prefix) for name in chain(*names_of.values())):
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name in chain(*names_of.values())))
            raise ValueError(f"not_hidden prefix {prefix!r} matches no parameter; the model has {known}")

    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    split = ParamSplit({}, {}, {})
    for p, names in names_of.items():
        if p.ndim < 2 or min(p.shape[0], p[0].numel()) == 1:
            group = split.no_decay
        elif p in embeddings or any(_under(name, prefix) for name in names for prefix in prefixes):
            group = split.decay
        else:
            group = split.muon
        group[names[0]] = p
    return split


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


class MuonAdamW(Optimizer):
    """Several optimisers as one: one step, one state_dict, one list of groups, one dict of state.

    The state_dict has torch's layout and holds tensors, numbers and strings only. Loading takes the state
    and the current `lr` from it; every other hyper-parameter, `base_lr` included, stays what the
    configuration says.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts
        self._link()

    def _link(self) -> None:
        """Make the parts work on this object's groups and state rather than on copies."""
        start = 0
        for part in self._parts:
            stop = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:stop], self.state
            start = stop

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every group; returns the closure's loss if there is one."""
        loss = evaluate(closure)
        for part in self._parts:
            if type(part).__module__ == "muon":
                _require_gradients(part)
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Raises ValueError when it belongs to other parameters."""
        saved_groups, groups = state_dict["param_groups"], self.param_groups
        saved_names = [list(g["param_names"]) for g in saved_groups]
        names = [g["param_names"] for g in groups]
        if saved_names != names:
            differ = sorted(set(chain(*saved_names)) ^ set(chain(*names)))
            reason = f"{differ[0]!r} is in one only" if differ else "same names in other groups or order"
            raise ValueError(
                f"optimizer state of other parameter groups ({reason}): make the optimizer as that run did"
            )
        if any(("betas" in saved) != ("betas" in ours) for saved, ours in zip(saved_groups, groups, strict=True)):
            raise ValueError("optimizer state of another kind of optimizer: make the optimizer as that run did")
        ids = set(chain(*(g["params"] for g in saved_groups)))
        # torch keeps unknown entries without a word: keys that JSON turned into strings would lose all
        # state.
        if unknown := [key for key in state_dict["state"] if key not in ids]:
            raise ValueError(f"optimizer state has entry {unknown[0]!r}, which no parameter group lists")
        merged = [
            {**ours, "params": saved["params"], "lr": saved["lr"]}
            for ours, saved in zip(groups, saved_groups, strict=True)
        ]
        super().load_state_dict({"state": state_dict["state"], "param_groups": merged})
        self._link()


def _require_gradients(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if p.grad is None:
                raise RuntimeError(f"{name!r} has no gradient, which muon-optimizer cannot take: use impl='fused'")


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    muon_lr: float = 0.02,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    momentum: float = 0.95,
    kind: Kind = "muon",
    impl: Impl = "fused",
    not_hidden: Iterable[str] = (),
    compile: bool | None = None,
) -> MuonAdamW:
    """The optimiser of a model: Muon on hidden matrices and AdamW on the rest, or AdamW on everything.

    lr: peak rate of AdamW. muon_lr: peak rate of Muon, a spectral norm per step. weight_decay: decoupled
    (multiplied by the rate), on matrices only. not_hidden: see `split_params`. compile: see `BatchedMuon`.
    impl: whose Muon. "fused" is `BatchedMuon`; "keller" (muon-optimizer) and "torch" (torch.optim.Muon) are
    the references it is held to, slow on a GPU and for exactly two dimensions.

    Each group carries `base_lr`, which `set_lr` multiplies. Raises ValueError for an unknown kind or impl,
    and for a model without hidden matrices or one that impl cannot take; UserError when impl="keller" lacks
    its package.
    """
    if kind not in ("muon", "adamw"):
        raise ValueError(f"unknown optimizer kind {kind!r}: choose 'muon' or 'adamw'")
    hidden, decay, no_decay = split_params(model, not_hidden=not_hidden)
    if kind == "adamw":
        hidden, decay = {}, {**hidden, **decay}
    elif not hidden:
        raise ValueError("the model has no hidden matrix for Muon: use kind='adamw'")

    def group(params: dict[str, nn.Parameter], lr: float, weight_decay: float) -> dict[str, Any]:
        return {"params": list(params.items()), "lr": lr, "base_lr": lr, "weight_decay": weight_decay}

    parts: list[Optimizer] = []
    if hidden:
        parts.append(_make_muon(group(hidden, muon_lr, weight_decay), momentum, impl, compile))
    adamw = [group(params, lr, wd) for params, wd in ((decay, weight_decay), (no_decay, 0.0)) if params]
    if adamw:
        fused = all(p.device.type in ("cuda", "cpu") for p in chain(decay.values(), no_decay.values()))
        parts.append(torch.optim.AdamW(adamw, lr=lr, betas=betas, fused=fused or None))
    return MuonAdamW(parts)


def _make_muon(group: dict[str, Any], momentum: float, impl: Impl, compile: bool | None) -> Optimizer:
    if impl == "fused":
        return BatchedMuon([group], momentum=momentum, compile=compile)
    if impl not in ("keller", "torch"):
        raise ValueError(f"unknown Muon impl {impl!r}: choose 'fused', 'keller' or 'torch'")
    for name, p in group["params"]:
        if p.ndim > 2:
            raise ValueError(f"impl={impl!r} takes two dimensions, {name!r} has {p.ndim}: use impl='fused'")
    # All passed, because their defaults differ (torch: lr 1e-3, weight decay 0.1).
    options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "momentum": momentum}
    if impl == "torch":
        return torch.optim.Muon([group], **options)
    with needs("impl='keller'", "use impl='fused'"):
        from muon import SingleDeviceMuon
    return SingleDeviceMuon([group], **options)


def lr_multiplier(
    kind: Schedule,
    step: int,
    total: int,
    *,
    warmup: int = 0,
    final: float | None = None,
    decay: int | None = None,
) -> float:
    """Factor on the peak learning rate at `step` (0 .. total - 1; later steps keep the last value).

    warmup: steps at the start. decay: steps at the end of wsd (total / 5). final: the factor at the end.
    constant: linear warm-up, (step + 1) / warmup, then 1.
    cosine: the same warm-up, then half a cosine to `final` (0).
    wsd: the same warm-up, then 1, then linear to `final` (0).
    one_cycle: half a cosine from 1/25 up to 1, then half a cosine down to `final` (4e-5); torch's OneCycleLR.

    Raises ValueError for an unknown kind or a number out of its range.
    """
    if step < 0 or total < 1:
        raise ValueError(f"step {step} of {total}: need step >= 0 and total >= 1")
    if not 0 <= warmup <= total or 0 < warmup < 1:
        raise ValueError(f"warmup={warmup} is a number of steps out of total={total}, not a fraction")
    if decay is None:
        decay = max(1, total // 5)
    if not 1 <= decay <= total:
        raise ValueError(f"decay={decay} is a number of steps from 1 to total={total}, not a fraction")
    if final is None:
        final = 1 / 25 / 1000 if kind == "one_cycle" else 0.0
    if kind == "one_cycle":
        peak = max(warmup - 1, 0)
        if step < peak:
            return _half_cosine(1 / 25, 1.0, step / peak)
        return _half_cosine(1.0, final, (step - peak) / max(total - 1 - peak, 1))
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if kind == "constant":
        return up
    if kind == "cosine":
        return up if step < warmup else _half_cosine(1.0, final, (step - warmup) / max(total - warmup, 1))
    if kind == "wsd":
        left = min(1.0, max(0.0, (total - step) / decay))
        return min(up, final + (1 - final) * left)
    raise ValueError(f"unknown schedule {kind!r}: choose 'constant', 'cosine', 'one_cycle' or 'wsd'")


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def set_lr(optimizer: Optimizer, multiplier: float) -> None:
    """Set every group's lr to base_lr * multiplier. Raises KeyError for a group without base_lr."""
    for i, group in enumerate(optimizer.param_groups):
        if "base_lr" not in group:
            raise KeyError(f"param_groups[{i}] has no 'base_lr': build the optimizer with make_optimizer")
        group["lr"] = group["base_lr"] * multiplier


@torch.no_grad()
def clip_grads(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most `max_norm`; returns the norm before, 0-d.

    Nothing is read back to the host. A norm that is not finite leaves the gradients as they are, for the
    caller's finite check to see. max_norm = inf only measures. Raises ValueError unless max_norm > 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be positive")
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if grads and math.isfinite(max_norm):
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        # A number in place of ones_like would be copied from the host, and waited for.
        torch._foreach_mul_(grads, torch.where(norm.isfinite(), scale, torch.ones_like(scale)))
    return norm
