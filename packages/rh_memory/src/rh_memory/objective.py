"""What one step of training computes, from a batch to a loss; and the same score on held-out windows.

Shapes: B windows, W spacings of a window, T targets of a window, M slots, A auxiliary targets.
"""

from __future__ import annotations

from typing import Any

import torch
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from torch import Tensor

from rh_memory import losses
from rh_memory.config import TrainConfig
from rh_memory.data.windows import WindowBatch
from rh_memory.dataset import Dataset
from rh_memory.evaluate import inference
from rh_memory.models import Context, Model, PostfixMDN
from rh_memory.q3 import BLOCK, N_TARGETS, aux_loss, aux_targets, constants, ramp


class Objective:
    """loss(batch, step) for a model, compiled and wrapped for data parallelism where that applies.

    dataset: for the constants of auxiliary targets and the length of windows.
    """

    def __init__(self, config: TrainConfig, model: Model, dataset: Dataset, dist: Dist) -> None:
        check_losses(config)
        self.config, self.model, self.device, self._world = config, model, dist.device, dist.world
        compiled = self.device.type == "cuda" if config.compile is None else config.compile
        forward: Any = torch.compile(model, dynamic=False) if compiled else model
        self._forward: Any = dist.wrap(forward)
        self._roll_forward: Any = forward  # once more in a step that DistributedDataParallel allows one forward pass
        self._likelihood: Any = torch.compile(losses.likelihood, dynamic=False) if compiled else losses.likelihood
        n_data = dataset.width - 1
        # block lists, or the written-out mask, are built here and not in the compiled region
        blocks = self.device.type == "cuda" and not config.model.attention_dropout
        backend: Any = "flex" if blocks else "sdpa"
        self._mask = model.training_mask(n_data, self.device).prepare(backend)
        if config.loss.drift_weight:
            length = config.loss.drift_context + config.loss.drift_horizon - 1
            self._roll_mask = model.training_mask(length, self.device).prepare(backend)
        self.index_T = target_index(model, n_data, self.device)
        self._z: tuple[Tensor, Tensor] | None = None
        if config.model.use_aux_loss:
            sample = dataset.data.window(dataset.starts("train", 4096), n_data)
            self._z = constants(sample.s_BW, config.model.aux_target)

    def __call__(self, batch: WindowBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `step` (from 1), 0-d, and its terms without gradient."""
        config, model = self.config, self.model
        with inference(config, self.device):
            output = self._forward(Context.of(batch), self._mask, self._permutation(step))
        target_BT = batch.s_BW[:, self.index_T]
        loss, nll = self._likelihood(output.mixture, config.model.mixture, target_BT, config.loss.entropy_weight)
        terms = {"nll": nll}
        if self._z is not None:
            mean_A, std_A = self._z
            z_BA = (aux_targets(batch.s_BW[:, :-1], config.model.aux_target) - mean_A) / std_A
            terms["aux"] = aux_loss(output.aux_BMA, z_BA, config.loss.aux_mode)
            loss = loss + ramp(step, config.loss.aux_ramp, config.loss.aux_weight) * terms["aux"]
        if any(config.loss.ortho_weight):
            assert model.n_memory, "check_losses refuses others"
            terms["ortho"] = losses.orthogonality(model.slots.capped_content())  # type: ignore[union-attr, operator]
            loss = loss + ramp(step, config.loss.ortho_ramp, config.loss.ortho_weight) * terms["ortho"]
        if config.loss.drift_weight and step % config.loss.drift_every == 0:
            loss = loss + config.loss.drift_weight * self._drift(batch)  # not every step has it, so no metric
        return loss, {name: term.detach() for name, term in terms.items()}

    def _drift(self, batch: WindowBatch) -> Tensor:
        drift, kind = self.config.loss, self.config.model.mixture
        n, context, horizon = -(-drift.drift_batch // self._world), drift.drift_context, drift.drift_horizon
        few = WindowBatch(batch.s_BW[:n], batch.log_height_BW[:n], batch.gamma_BW[:n])
        sizes = {"context": context, "horizon": horizon}
        with inference(self.config, self.device):
            rolled = losses.rollout(self._roll_forward, few, self._roll_mask, kind, **sizes)
        # Autocast of its own: the weights it cast for the rollout are kept within one, and have no gradient.
        with inference(self.config, self.device):
            true_BH = few.s_BW[:, context : context + horizon]
            return losses.drift_loss(self._roll_forward, rolled, true_BH, self._roll_mask, kind)

    def _permutation(self, step: int) -> Tensor | None:
        """The slots' identities in this batch, a tensor so that compiled code sees one graph; None where they stay."""
        m = self.config.model
        if m.memory == "none" or m.slot_id_mode != "permute_per_batch":
            return None
        if step <= self.config.perm_warmup_steps:
            return torch.arange(m.n_memory, device=self.device)
        return torch.randperm(m.n_memory, device=self.device)


@torch.no_grad()
def validate(model: Model, dataset: Dataset, starts: Tensor, config: TrainConfig) -> dict[str, float]:
    """NLL in nats per spacing on windows: nll (of all supervised positions) and nll_last (of the full context)."""
    model.eval()
    positions: Any = "readouts" if isinstance(model, PostfixMDN) else "all"
    index_T = target_index(model, dataset.width - 1, starts.device)
    sums = torch.zeros(2, dtype=torch.float64, device=starts.device)
    for part in starts.split(512 if starts.is_cuda else 64):
        batch = dataset.data.window(part, dataset.width)
        with inference(config, starts.device):
            density = model.predict(batch, positions)
        nll_BT = -density.log_prob(batch.s_BW[:, index_T])
        sums += torch.stack([nll_BT.mean(1).sum(), nll_BT[:, -1].sum()])
    model.train()
    nll, nll_last = (sums / starts.numel()).tolist()
    return {"nll": nll, "nll_last": nll_last}


def target_index(model: Model, n_data: int, device: torch.device) -> Tensor:
    """Which spacings of a window a training pass predicts (int64): all but the first, or those after the readouts."""
    if isinstance(model, PostfixMDN):
        return torch.tensor(model.readout_contexts(n_data), device=device)
    return torch.arange(1, n_data + 1, device=device)


def check_losses(config: TrainConfig) -> None:
    """Raises UserError for losses that the model cannot have."""
    loss, m = config.loss, config.model
    if loss.drift_weight and m.memory == "postfix":
        raise UserError("loss.drift_weight rolls out every position: it needs memory = none or prefix, not postfix")
    length = loss.drift_context + loss.drift_horizon
    if loss.drift_weight and length > m.context:
        raise UserError(f"drift_context + drift_horizon = {length} exceeds model.context = {m.context}")
    if m.memory == "none" and (m.use_aux_loss or any(loss.ortho_weight)):
        raise UserError("model.use_aux_loss and loss.ortho_weight are about memory slots, but model.memory = none")
    if any(loss.ortho_weight) and m.content_mode == "zeroed":
        raise UserError("loss.ortho_weight needs slot contents, but model.content_mode = zeroed")
    if m.use_aux_loss and m.aux_target == "q3" and config.data.windows == "sliding" and m.context < 2 * BLOCK:
        raise UserError(
            f"model.context = {m.context}: the auxiliary targets q3 need windows of {2 * BLOCK} spacings at least; "
            "lengthen it or set model.aux_target = stats"
        )
    targets = N_TARGETS[m.aux_target]
    if m.use_aux_loss and loss.aux_mode == "diagonal" and m.n_memory < targets:
        raise UserError(f"aux_mode = diagonal gives each of {targets} targets a slot: model.n_memory = {m.n_memory}")
