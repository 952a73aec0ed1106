"""What the models share: parameters with declared roles, the optimizer built from them, head temperatures, the output.

Shapes: B windows, N tokens, V symbols, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from lab_shared.muon import BatchedMuon
from lab_shared.optim import MuonAdamW
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gauge_attn.config import KappaMode, OptimConfig
from gauge_attn.irreps import Irreps
from gauge_attn.so3 import frames_for, packed_frames, unpack

Role = Literal["mean", "log_sigma", "frame", "log_kappa", "embedding", "hidden", "vector", "readout"]
"""What a parameter is, which decides its learning rate and decay: means of beliefs and position vectors, log variances,
frames, log temperatures and slopes, token embeddings, matrices between hidden layers, gains and biases, the readout."""

LOG_SIGMA_BOUND = math.log(1e3)


class Output(NamedTuple):
    """What every model's forward returns."""

    logits_BNV: Tensor
    alignment: Tensor | None
    """0-d: the alignment loss of the batch with the configured reduction; None unless it is trained on."""


def declare(parameter: nn.Parameter, role: Role) -> nn.Parameter:
    """Give a parameter its role; `build_optimizer` refuses one without."""
    parameter.role = role  # type: ignore[attr-defined]
    return parameter


def normal(*shape: int, std: float, role: Role) -> nn.Parameter:
    """A parameter drawn from N(0, std^2)."""
    return declare(nn.Parameter(torch.randn(*shape) * std), role)


def constant(*shape: int, value: float, role: Role) -> nn.Parameter:
    return declare(nn.Parameter(torch.full(shape, value)), role)


def matrix(n_out: int, n_in: int, *, role: Role = "hidden", gain: float = 1.0) -> nn.Parameter:
    """A matrix for F.linear with entries of std gain / sqrt(n_in); gain = 0 makes a branch start silent."""
    return normal(n_out, n_in, std=gain / math.sqrt(n_in), role=role)


def bounded_log_sigma(raw: Tensor) -> Tensor:
    """Log variance that is `raw` near 0 and never leaves [-log 1000, log 1000]."""
    return LOG_SIGMA_BOUND * torch.tanh(raw / LOG_SIGMA_BOUND)


def token_frames(irreps: Irreps, phi_V3: Tensor, tokens_BN: Tensor) -> dict[int, Tensor]:
    """{l: (B, N, d, d)}, the frames of tokens by their symbols' phi.

    A batch larger than the vocabulary looks up its symbols' frames rather than making each anew.
    """
    if len(phi_V3) > tokens_BN.numel():
        return frames_for(irreps, F.embedding(tokens_BN, phi_V3))
    every = unpack(F.embedding(tokens_BN, packed_frames(phi_V3, irreps.lmax)), irreps.lmax)
    return {l: every[l] for l in irreps.ls}


class Temperature(nn.Module):
    """kappa (H,) of the heads of one layer.

    dims: the heads' dimensions. base: kappa of the configuration. mode: see `gauge_attn.config.ModelConfig`. A
    standardised temperature is `base` until `calibrate` has seen the heads' KL.

    For ablations, not saved: scale_H multiplies kappa (infinite for uniform attention), gain_H what a head gives.
    """

    def __init__(self, dims: Sequence[int], base: float, mode: KappaMode) -> None:
        super().__init__()
        self.mode, self.base = mode, base
        power = {"dim": 1.0, "sqrt_dim": 0.5}.get(mode, 0.0)
        start_H = base * torch.tensor(dims, dtype=torch.float32) ** power
        self.kappa_H: Tensor
        if mode == "learnable":
            self.log_kappa_H = declare(nn.Parameter(start_H.log()), "log_kappa")
        else:
            self.register_buffer("kappa_H", start_H)
        self.scale_H: Tensor
        self.gain_H: Tensor
        self.register_buffer("scale_H", torch.ones(len(dims)), persistent=False)
        self.register_buffer("gain_H", torch.ones(len(dims)), persistent=False)

    def forward(self) -> Tensor:
        kappa_H = self.log_kappa_H.exp() if self.mode == "learnable" else self.kappa_H
        return kappa_H * self.scale_H

    @torch.no_grad()
    def calibrate(self, kl_std_H: Tensor) -> None:
        """Make the logits' std over keys 1 / base: kappa_H = base * kl_std_H, not below 1e-6."""
        self.kappa_H.copy_(self.base * kl_std_H.clamp(min=1e-6))


def build_optimizer(model: nn.Module, config: OptimConfig) -> MuonAdamW:
    """The optimizer with one group per role. Raises ValueError for a parameter that declares none."""
    rate: dict[str, float] = {
        "mean": config.mean_lr,
        "log_sigma": config.sigma_lr,
        "frame": config.phi_lr,
        "log_kappa": config.kappa_lr,
        "embedding": config.lr,
        "hidden": config.lr,
        "vector": config.lr,
        "readout": config.readout_lr,
    }
    members: dict[str, list[tuple[str, nn.Parameter]]] = {role: [] for role in get_args(Role)}
    muon: list[tuple[str, nn.Parameter]] = []
    for name, p in model.named_parameters():
        role = getattr(p, "role", None)
        if role not in members:
            raise ValueError(
                f"parameter {name} has role {role!r}: declare one of {', '.join(members)} where it is made"
            )
        if not p.requires_grad:
            continue
        # A matrix of one row or column has one singular value: Muon would only fix its length.
        if role == "hidden" and config.optimizer == "muon" and min(p.shape) > 1:
            muon.append((name, p))
        else:
            members[role].append((name, p))
    parts: list[Optimizer] = []
    if muon:
        group = {"params": muon, "lr": config.muon_lr, "base_lr": config.muon_lr, "weight_decay": config.weight_decay}
        parts.append(BatchedMuon([group], momentum=0.95))
    groups = [
        {
            "params": params,
            "lr": rate[role],
            "base_lr": rate[role],
            "weight_decay": config.weight_decay if role in ("hidden", "readout") else 0.0,
        }
        for role, params in members.items()
        if params
    ]
    parts.append(torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True))
    return MuonAdamW(parts)
