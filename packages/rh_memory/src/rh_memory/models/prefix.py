"""Memory in front of the data (E1, E2): slots that every spacing sees and that see no spacing.

Shapes: B batch, M slots, T spacings, D channels, H heads, L layers.
"""

from __future__ import annotations

import torch
from lab_shared.attention import Backend, Mask
from torch import Tensor, nn

from rh_memory.config import ModelConfig
from rh_memory.data.windows import WindowBatch
from rh_memory.mdn import MDNHead, Mixture
from rh_memory.models.backbone import Backbone, Context, Output, Positions, initialise, pick
from rh_memory.models.slots import Slots, averaged, check_slots, eval_identities


class PrefixMDN(nn.Module):
    """[M0 .. M7, s_0 .. s_T-1]: slots cannot depend on the data, so their final states are constants of the model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_slots(config)
        self.config = config
        self.n_memory = config.n_memory
        self.backbone = Backbone(config, config.n_memory + config.context)
        self.slots = Slots(config)
        self.head = MDNHead(config)
        initialise(self)

    def training_mask(self, n_data: int, device: torch.device) -> Mask:
        """The mask that `forward` wants, to be made once before the loop."""
        if self.config.causal_slots:
            # Slots in front that see earlier slots: plain causality, for which every GPU kernel has a fast path, also
            # with dropout of weights, that a mask of another kind would turn away.
            return Mask.causal()
        return Mask.memory_prefix(self.n_memory, n_data, causal_slots=False, device=device)

    def forward(self, data: Context, mask: Mask, id_perm_M: Tensor | None = None) -> Output:
        """Mixture tensors (B, T, K) of the data positions. id_perm_M: see Slots."""
        slots = self.slots(id_perm_M, identities=self.config.slot_id_mode != "off")
        h_BMD, h_BTD = self.states(data, mask, slots)
        return Output(self.head(h_BTD), self.slots.predict_aux(h_BMD))

    def states(
        self,
        data: Context,
        mask: Mask,
        slots: Tensor,
        *,
        position_perm_M: Tensor | None = None,
        backend: Backend | None = None,
        kept: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final states of slots (B, M, D) and data (B, T, D). slots: tokens (M, D) or (B, M, D)."""
        data = self.backbone.see(data)
        m, (b, t) = self.n_memory, data.s_BT.shape
        if position_perm_M is not None:
            slots = slots.index_select(-2, position_perm_M.argsort())
        x_BTD = self.backbone.embed(data)
        x = torch.cat([slots.to(x_BTD.dtype).expand(b, -1, -1), x_BTD], 1)
        position = torch.arange(m + t, device=x.device)
        if not self.config.slot_position:
            position = position.clamp(min=m - 1)
        gamma = torch.cat([data.gamma_BT[:, :1].expand(-1, m), data.gamma_BT], 1)
        h_BMD, h_BTD = self.backbone(x, position, gamma, mask, backend, kept).split([m, t], 1)
        return (h_BMD if position_perm_M is None else h_BMD[:, position_perm_M]), h_BTD

    def predict(
        self,
        batch: WindowBatch,
        positions: Positions = "all",
        *,
        remove: Tensor | None = None,
        id_perm: Tensor | None = None,
        position_perm: Tensor | None = None,
        content: Tensor | None = None,
        legacy_slot_off: int | None = None,
    ) -> Mixture:
        """Densities of the spacings 1..W-1 of each window (B, W - 1), or of the last one only (B,).

        The last spacing of the batch is a target and is not seen. remove: bool (M,), slots that nobody may look at.
        id_perm, position_perm (M,): slot i takes the identity or the position of another one. content,
        legacy_slot_off: see Slots.
        """
        data = Context.of(batch)
        mask = self._mask(data, remove, position_perm)
        identities, perms = eval_identities(self.config, data.s_BT.device)
        mixtures = []
        for perm in perms if id_perm is None else [id_perm]:
            slots = self.slots(perm, content=content, identities=identities, legacy_slot_off=legacy_slot_off)
            _, h_BTD = self.states(data, mask, slots, position_perm_M=position_perm)
            mixtures.append(self.head.mixture(pick(h_BTD, positions)))
        return averaged(mixtures)

    def _mask(self, data: Context, remove: Tensor | None, position_perm: Tensor | None = None) -> Mask:
        mask = self.training_mask(data.s_BT.size(1), data.s_BT.device)
        if remove is None:
            return mask
        m, total = self.n_memory, self.n_memory + data.s_BT.size(1)
        index = torch.arange(total, device=data.s_BT.device)
        seen = index <= index[:, None]
        if not self.config.causal_slots:
            seen = seen | ((index < m) & (index[:, None] < m))
        gone = torch.zeros(total, dtype=torch.bool, device=index.device)
        gone[:m] = remove if position_perm is None else remove[position_perm.argsort()]
        return Mask.dense(seen & ~gone)

    def slot_states(
        self,
        batch: WindowBatch,
        *,
        remove: Tensor | None = None,
        id_perm: Tensor | None = None,
        position_perm: Tensor | None = None,
        content: Tensor | None = None,
    ) -> Tensor:
        """Final slot states (B, M, D), the same for every window; removed slots are zero. Arguments as in `predict`."""
        data = Context.of(batch)
        identities, perms = eval_identities(self.config, data.s_BT.device)
        slots = self.slots(perms[0] if id_perm is None else id_perm, content=content, identities=identities)
        mask = self._mask(data, remove, position_perm)
        h_BMD, _ = self.states(data, mask, slots, position_perm_M=position_perm)
        return h_BMD if remove is None else h_BMD.masked_fill(remove[:, None], 0)

    def slot_embeddings(self) -> tuple[Tensor, Tensor]:
        """Contents and identities of the slots, (M, D) each."""
        return self.slots.capped_content(), self.slots.identity_MD

    @torch.no_grad()
    def attention_profile(self, batch: WindowBatch) -> Tensor:
        """Weights with which data looks at slots (L, H, M, T), mean over the batch (slots never look at data)."""
        data = Context.of(batch)
        identities, perms = eval_identities(self.config, data.s_BT.device)
        kept: list[Tensor] = []
        slots = self.slots(perms[0], identities=identities)
        self.states(data, self._mask(data, None), slots, backend="reference", kept=kept)
        m = self.n_memory
        return torch.stack([weights[:, :, m:, :m].mean(0).mT for weights in kept])
