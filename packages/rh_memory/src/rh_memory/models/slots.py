"""Memory slots: a learned content plus an identity, with every mode of both.

Shapes: M slots, D channels, A auxiliary targets.
"""

from __future__ import annotations

import torch
from lab_shared.errors import UserError
from torch import Tensor, nn

from rh_memory.config import ModelConfig
from rh_memory.mdn import Mixture, average
from rh_memory.q3 import N_TARGETS


class Slots(nn.Module):
    """content_MD + identity_MD, and what the slots predict besides (aux), if they do.

    The identities start orthogonal: the seed meant them to, but its initialisation overwrote them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.n_memory, config.d_model)
        if config.content_mode == "normal":
            self.content_MD = nn.Parameter(torch.randn(shape) * 0.02)
        else:
            self.register_buffer("content_MD", torch.zeros(shape), persistent=False)
        if config.slot_id_mode != "off":
            self.identity_MD = nn.Parameter(nn.init.orthogonal_(torch.empty(shape)) * 0.02 * config.d_model**0.5)
        else:
            self.register_buffer("identity_MD", torch.zeros(shape), persistent=False)
        self.aux = nn.Linear(config.d_model, N_TARGETS[config.aux_target]) if config.use_aux_loss else None

    def capped_content(self) -> Tensor:
        """(M, D), scaled down to norm_cap where longer."""
        if self.config.norm_cap is None:
            return self.content_MD
        norm_M1 = self.content_MD.norm(dim=-1, keepdim=True)
        return self.content_MD * (self.config.norm_cap / norm_M1.clamp(min=1e-12)).clamp(max=1)

    def forward(
        self,
        id_perm_M: Tensor | None = None,
        *,
        content: Tensor | None = None,
        identities: bool = True,
        legacy_slot_off: int | None = None,
    ) -> Tensor:
        """Slot tokens (M, D), or (B, M, D) when `content` is.

        id_perm_M: slot i takes the identity of slot id_perm_M[i]. content: instead of the learned one.
        identities=False leaves them out. legacy_slot_off: zero this slot's token, as the seed's ablation did (the
        slot keeps its position, sees all data and is pooled: it is not removed).
        """
        token = self.capped_content() if content is None else content
        if identities:
            token = token + (self.identity_MD if id_perm_M is None else self.identity_MD[id_perm_M])
        if legacy_slot_off is not None:
            keep_M = torch.arange(self.config.n_memory, device=token.device) != legacy_slot_off
            token = token * keep_M[:, None]
        return token

    def predict_aux(self, h_BMD: Tensor) -> Tensor | None:
        """(B, M, A): every slot's prediction of every auxiliary target, float32."""
        if self.aux is None:
            return None
        with torch.autocast(h_BMD.device.type, enabled=False):
            return nn.functional.linear(h_BMD.float(), self.aux.weight, self.aux.bias)


def eval_identities(config: ModelConfig, device: torch.device) -> tuple[bool, list[Tensor | None]]:
    """How slots are identified outside training: whether at all, and the permutations to average over."""
    mode = config.slot_id_mode if config.eval_slot_id_mode == "same" else config.eval_slot_id_mode
    if mode != "permute_per_batch":
        return mode != "off", [None]
    generator = torch.Generator().manual_seed(config.eval_perm_seed)
    n = config.eval_perm_average
    return True, [torch.randperm(config.n_memory, generator=generator).to(device) for _ in range(n)]


def averaged(mixtures: list[Mixture]) -> Mixture:
    return mixtures[0] if len(mixtures) == 1 else average(mixtures)


def check_slots(config: ModelConfig) -> None:
    """Raises UserError for options that cannot go together."""
    if config.eval_perm_average < 1:
        raise UserError(f"model.eval_perm_average is {config.eval_perm_average}: it must be at least 1")
    if config.slot_id_mode == "off" and config.eval_slot_id_mode in ("fixed", "permute_per_batch"):
        raise UserError("model.eval_slot_id_mode needs identities, but model.slot_id_mode = off leaves none")
    if not 0 <= config.slot_dropout < 1:
        raise UserError(f"model.slot_dropout is {config.slot_dropout}: it is a probability below 1")
