"""Memory behind the data (E3 to E5): slots that see the data, and from which alone the prediction is read.

Data never sees slots, so one pass over T spacings serves R groups of M slots, group r standing where it sees the first
t_r spacings: R predictions a window, equal to those of R passes over [s_0 .. s_{t_r - 1}, M0 .. M7]. With one group at
t = T this is the seed's layout.

Shapes: B batch, T spacings, R groups, M slots, D channels, K components, H heads, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lab_shared.attention import Backend, Mask
from torch import Tensor, nn

from rh_memory.config import ModelConfig
from rh_memory.data.windows import WindowBatch
from rh_memory.mdn import MDNHead, Mixture
from rh_memory.models.backbone import Backbone, Context, Output, Positions, initialise
from rh_memory.models.slots import Slots, averaged, check_slots, eval_identities

_GROUPS_PER_PASS = 32
"""Groups of slots of one pass when many positions are asked for; bounds the T + R M tokens of the attention."""


class PostfixMDN(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_slots(config)
        self.config = config
        self.n_memory = config.n_memory
        self.backbone = Backbone(config, config.context + config.n_memory)
        self.slots = Slots(config)
        self.readout_M = nn.Parameter(torch.zeros(config.n_memory), requires_grad=config.readout_weight == "learned")
        self.head = MDNHead(config)
        initialise(self)

    def readout_contexts(self, n_data: int) -> list[int]:
        """The R numbers of spacings that the groups of a training pass over n_data spacings see; the last is n_data."""
        r = self.config.readouts
        return [n_data * (i + 1) // r for i in range(r)]

    def training_mask(self, n_data: int, device: torch.device) -> Mask:
        """The mask that `forward` wants, to be made once before the loop."""
        return self._mask(n_data, self.readout_contexts(n_data), device)

    def forward(self, data: Context, mask: Mask, id_perm_M: Tensor | None = None) -> Output:
        """Mixture tensors (B, R, K), group r's of the spacing that follows the first t_r. id_perm_M: see Slots."""
        slots = self.slots(id_perm_M, identities=self.config.slot_id_mode != "off")
        n, r = data.s_BT.size(1), self.config.readouts
        seen_R = torch.arange(1, r + 1, device=data.s_BT.device) * n // r  # readout_contexts, on the device
        h_BRMD = self.states(data, seen_R, mask, slots)
        keep = self._dropped(h_BRMD) if self.training and self.config.slot_dropout else None
        return Output(self.head(self.pool(h_BRMD, keep=keep)), self.slots.predict_aux(h_BRMD[:, -1]))

    def states(
        self,
        data: Context,
        seen_R: Tensor,
        mask: Mask,
        slots: Tensor,
        *,
        position_perm_M: Tensor | None = None,
        backend: Backend | None = None,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """Final slot states (B, R, M, D) of groups that see the first seen_R[r] spacings.

        slots: tokens (M, D) or (B, M, D), the same in every group, or (1, R, M, D). mask: over [data, R groups].
        """
        data = self.backbone.see(data)
        m, r, (b, t) = self.n_memory, seen_R.numel(), data.s_BT.shape
        device = data.s_BT.device
        if position_perm_M is not None:  # place p in a group is taken by the slot whose position is p
            slots = slots.index_select(-2, position_perm_M.argsort())
        x_BTD = self.backbone.embed(data)
        slots = slots if slots.dim() == 4 else slots.unsqueeze(-3)
        x_BRMD = slots.to(x_BTD.dtype).expand(b, r, m, -1)
        if self.config.seed_slots:
            x_BRMD = x_BRMD + x_BTD[:, seen_R - 1, None]
        place_M = torch.arange(m, device=device) * int(self.config.slot_position)
        position = torch.cat([torch.arange(t, device=device), (seen_R[:, None] + place_M).flatten()])
        gamma = torch.cat([data.gamma_BT, data.gamma_BT[:, seen_R - 1].repeat_interleave(m, 1)], 1)
        x = torch.cat([x_BTD, x_BRMD.flatten(1, 2)], 1)
        h_BRMD = self.backbone(x, position, gamma, mask, backend, kept)[:, t:].unflatten(1, (r, m))
        return h_BRMD if position_perm_M is None else h_BRMD[:, :, position_perm_M]

    def pool(self, h_BRMD: Tensor, *, keep: Tensor | None = None, weight_perm_M: Tensor | None = None) -> Tensor:
        """sum_i softmax(w)_i h_i (..., D), the softmax over the slots that `keep` (..., M) leaves."""
        weight = self.pooling_weights(keep=keep, weight_perm_M=weight_perm_M)
        return (h_BRMD * weight.to(h_BRMD.dtype)[..., None]).sum(-2)

    def pooling_weights(self, *, keep: Tensor | None = None, weight_perm_M: Tensor | None = None) -> Tensor:
        """softmax(w) (..., M) over the slots that `keep` (..., M) leaves."""
        logit_M = self.readout_M if weight_perm_M is None else self.readout_M[weight_perm_M]
        return (logit_M if keep is None else logit_M.masked_fill(~keep, -torch.inf)).softmax(-1)

    def _dropped(self, h_BRMD: Tensor) -> Tensor:
        """bool (B, 1, M): slots kept in the pooling of each window; all where none would be left."""
        keep = torch.rand(h_BRMD.size(0), 1, self.n_memory, device=h_BRMD.device) >= self.config.slot_dropout
        return keep | ~keep.any(-1, keepdim=True)

    def _mask(self, n_data: int, contexts: Sequence[int], device: torch.device, gone_M: Tensor | None = None) -> Mask:
        """gone_M: bool by place, slots that nobody may look at (their own states mean nothing); or (R, M), by group."""
        m, causal = self.n_memory, self.config.causal_slots
        if gone_M is None:
            whole = list(contexts) == [n_data]
            return Mask.memory_postfix(
                n_data, m, positions=None if whole else contexts, causal_slots=causal, device=device
            )
        written = Mask.memory_postfix(n_data, m, positions=list(contexts), causal_slots=causal, device=device)
        gone = torch.cat([gone_M.new_zeros(n_data), gone_M.expand(len(contexts), -1).flatten()])
        return Mask.dense(written.allowed_dense & ~gone)

    def predict(
        self,
        batch: WindowBatch,
        positions: Positions | Sequence[int] = "all",
        *,
        remove: Tensor | None = None,
        id_perm: Tensor | None = None,
        position_perm: Tensor | None = None,
        weight_perm: Tensor | None = None,
        content: Tensor | None = None,
        legacy_slot_off: int | None = None,
    ) -> Mixture:
        """Densities of the spacings that follow the first t: of the last one (B,), of the R readouts (B, R), of all
        (B, W - 1), or of a list of t (B, len).

        The last spacing of the batch is a target and is not seen. remove: bool (M,), slots taken out of keys and
        pooling. id_perm, position_perm, weight_perm (M,): slot i takes the identity, the position or the readout
        weight of another one. content, legacy_slot_off: see Slots.
        """
        data = Context.of(batch)
        t, device = data.s_BT.size(1), data.s_BT.device
        contexts = self._contexts(positions, t)
        keep = None if remove is None else ~remove
        identities, perms = eval_identities(self.config, device)
        mixtures = []
        for perm in perms if id_perm is None else [id_perm]:
            slots = self.slots(perm, content=content, identities=identities, legacy_slot_off=legacy_slot_off)
            pooled = []
            for first in range(0, len(contexts), _GROUPS_PER_PASS):
                some = contexts[first : first + _GROUPS_PER_PASS]
                mask = self._mask(t, some, device, _by_place(remove, position_perm))
                seen_R = _on_device(some, device)
                h_BRMD = self.states(data, seen_R, mask, slots, position_perm_M=position_perm)
                pooled.append(self.pool(h_BRMD, keep=keep, weight_perm_M=weight_perm))
            mixtures.append(self.head.mixture(torch.cat(pooled, 1)))
        mixture = averaged(mixtures)
        return mixture[:, 0] if positions == "last" else mixture

    def compare(self, batch: WindowBatch, changes: Sequence[Mapping[str, Any]]) -> Mixture:
        """Densities (B, V) of the last spacing under V changes, each of them keywords of `predict`.

        Equal to V calls of predict(batch, "last", **change). But data never sees slots, so one data stream serves them
        all: every change is a group of slots behind it. content: (M, D) only.
        """
        data = Context.of(batch)
        t, device = data.s_BT.size(1), data.s_BT.device
        own_M = torch.arange(self.n_memory, device=device)
        identities, perms = eval_identities(self.config, device)
        groups: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, pooling weights and removed slots, by place
        for change in changes:
            remove, position_perm = change.get("remove"), change.get("position_perm")
            at_place_M = own_M if position_perm is None else position_perm.argsort()
            gone_M = torch.zeros_like(own_M, dtype=torch.bool) if remove is None else remove
            weight_M = self.pooling_weights(keep=~gone_M, weight_perm_M=change.get("weight_perm"))
            for perm in perms:
                token_MD = self.slots(
                    change.get("id_perm", perm),
                    content=change.get("content"),
                    identities=identities,
                    legacy_slot_off=change.get("legacy_slot_off"),
                )
                groups.append((token_MD[at_place_M], weight_M[at_place_M], gone_M[at_place_M]))
        pooled = []
        for first in range(0, len(groups), _GROUPS_PER_PASS):
            token_RMD, weight_RM, gone_RM = map(
                torch.stack, zip(*groups[first : first + _GROUPS_PER_PASS], strict=True)
            )
            contexts = [t] * len(token_RMD)
            seen_R, mask = _on_device(contexts, device), self._mask(t, contexts, device, gone_RM)
            h_BRMD = self.states(data, seen_R, mask, token_RMD[None])
            pooled.append((h_BRMD * weight_RM.to(h_BRMD.dtype)[..., None]).sum(-2))
        mixture = self.head.mixture(torch.cat(pooled, 1))
        return averaged([mixture[:, p :: len(perms)] for p in range(len(perms))])

    def _contexts(self, positions: Positions | Sequence[int], n_data: int) -> list[int]:
        if positions == "all":
            return list(range(1, n_data + 1))
        if positions == "last":
            return [n_data]
        if positions == "readouts":
            return self.readout_contexts(n_data)
        if isinstance(positions, str) or not all(1 <= t <= n_data for t in positions):
            raise ValueError(f"positions={positions!r}: 'all', 'last', 'readouts' or numbers from 1 to {n_data}")
        return list(positions)

    def slot_states(
        self,
        batch: WindowBatch,
        *,
        remove: Tensor | None = None,
        id_perm: Tensor | None = None,
        position_perm: Tensor | None = None,
        content: Tensor | None = None,
        legacy_slot_off: int | None = None,
    ) -> Tensor:
        """Final slot states (B, M, D) with the whole context in view; `readout` turns them into the prediction.

        Arguments as in `predict`. Removed slots come back as zeros: leave them out of the readout with keep=~remove.
        """
        data = Context.of(batch)
        t, device = data.s_BT.size(1), data.s_BT.device
        identities, perms = eval_identities(self.config, device)
        perm = perms[0] if id_perm is None else id_perm
        slots = self.slots(perm, content=content, identities=identities, legacy_slot_off=legacy_slot_off)
        mask = self._mask(t, [t], device, _by_place(remove, position_perm))
        seen_R = _on_device([t], device)
        h_BMD = self.states(data, seen_R, mask, slots, position_perm_M=position_perm)[:, 0]
        return h_BMD if remove is None else h_BMD.masked_fill(remove[:, None], 0)

    def readout(self, h_BMD: Tensor, *, keep: Tensor | None = None, weight_perm: Tensor | None = None) -> Mixture:
        """The density (...) read from slot states (..., M, D). keep: bool (..., M), slots to pool over (some)."""
        return self.head.mixture(self.pool(h_BMD, keep=keep, weight_perm_M=weight_perm))

    def slot_embeddings(self) -> tuple[Tensor, Tensor]:
        """Contents and identities of the slots, (M, D) each."""
        return self.slots.capped_content(), self.slots.identity_MD

    @torch.no_grad()
    def attention_profile(self, batch: WindowBatch) -> Tensor:
        """Weights with which slots look at data (L, H, M, T), the whole context in view, mean over the batch."""
        data = Context.of(batch)
        t, device = data.s_BT.size(1), data.s_BT.device
        identities, perms = eval_identities(self.config, device)
        kept: list[Tensor] = []
        slots = self.slots(perms[0], identities=identities)
        seen_R = _on_device([t], device)
        self.states(data, seen_R, self._mask(t, [t], device), slots, backend="reference", kept=kept)
        return torch.stack([weights[:, :, t:, :t].mean(0) for weights in kept])


def _on_device(contexts: Sequence[int], device: torch.device) -> Tensor:
    """(R,) int64; equal numbers, the common case, are filled in there instead of copied, which would wait for a GPU."""
    if len(set(contexts)) == 1:
        return torch.full((len(contexts),), contexts[0], device=device)
    return torch.tensor(contexts, device=device)


def _by_place(remove: Tensor | None, position_perm: Tensor | None) -> Tensor | None:
    """`remove` by slot -> by place in the group."""
    return remove if remove is None or position_perm is None else remove[position_perm.argsort()]
