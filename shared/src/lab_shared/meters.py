"""Books of a training loop that stay on the device: metric sums, and the first step that was not finite."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lab_shared.dist import Dist

_RESERVED = ("loss", "grad_norm", "lr", "step", "time", "split")


class Meter:
    """Sums since the last log point, in one float64 vector on the device: adding never waits for it."""

    def __init__(self, device: torch.device, dist: Dist) -> None:
        self._device, self._dist = device, dist
        self._names: list[str] | None = None
        self._sums: Tensor | None = None  # loss, gradient norm, n, n * metric ...
        self._steps = 0

    def add(self, loss: Tensor, norm: Tensor, n: int | Tensor, metrics: dict[str, Tensor | float]) -> None:
        """Add one step.

        Raises ValueError for a reserved metric name, names that changed, or a metric of several numbers.
        """
        if self._names is None:
            if taken := [name for name in metrics if name in _RESERVED]:
                raise ValueError(f"metric name {taken[0]!r} is taken: the log writes that itself")
            self._names = list(metrics)
        elif list(metrics) != self._names:
            raise ValueError(f"metrics {list(metrics)} are not those of the steps before, {self._names}")
        row = [loss, norm, self._scalar("n", n)]
        row += [self._scalar(name, value) * n for name, value in metrics.items()]
        values = torch.stack([x.to(self._device, torch.float64) for x in row])
        self._sums = values if self._sums is None else self._sums.add_(values)
        self._steps += 1

    def means(self) -> tuple[dict[str, float], float]:
        """Means over all ranks, and examples a step; then start over. Waits for the device."""
        if self._sums is None or self._names is None:
            raise RuntimeError("no step was added since the last means")
        loss, norm, n, *metrics = self._dist.reduce_sums({"sums": self._sums})["sums"].tolist()
        steps, passes = self._steps, self._steps * self._dist.world
        self._sums, self._steps = None, 0
        named = {name: x / n if n else float("nan") for name, x in zip(self._names, metrics, strict=True)}
        return {"loss": loss / passes, **named, "grad_norm": norm / passes}, n / steps

    def state_dict(self) -> dict[str, Any]:
        return {"names": self._names, "sums": self._sums, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._names, self._steps = state["names"], state["steps"]
        self._sums = None if state["sums"] is None else state["sums"].to(self._device)

    def _scalar(self, name: str, value: Tensor | float) -> Tensor:
        if not isinstance(value, Tensor):
            # A fill kernel; torch.tensor would copy from pageable memory.
            return torch.full((), value, dtype=torch.float64, device=self._device)
        if value.ndim:
            raise ValueError(f"metric {name!r} must be one number, got shape {tuple(value.shape)}: take its mean")
        return value.detach()


class Bad(NamedTuple):
    """A step that was not finite: in what ("the loss" or "the gradient norm"), and the ids of its batch."""

    what: str
    step: int
    ids: list[Any]


class FiniteGuard:
    """Remembers on the device the first step whose loss, and whose gradient norm, was not finite."""

    _NEVER: ClassVar[int] = 2**62

    def __init__(self, device: torch.device, dist: Dist) -> None:
        self._dist = dist
        self._first_bad = torch.full((2,), self._NEVER, dtype=torch.int64, device=device)  # loss, norm
        self._ids: list[tuple[int, Any]] = []

    def watch(self, step: int, loss: Tensor, norm: Tensor, ids: Any) -> None:
        """Look at one step, without waiting for the device."""
        finite = torch.stack([loss.double(), norm.double()]).isfinite()
        self._first_bad = torch.where(finite, self._first_bad, self._first_bad.clamp(max=step))
        self._ids.append((step, ids))

    def agree(self, *, stop: bool) -> tuple[Bad | None, bool]:
        """The first bad step on any rank, and whether any rank says `stop`: the same answer on every rank.

        One small all-reduce for both. Waits for the device. The ids of steps found finite are dropped.
        """
        go_on = torch.full_like(self._first_bad[:1], int(not stop))
        flags = torch.cat([self._first_bad, go_on])
        if self._dist.world > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN)
        bad_loss, bad_norm, go = flags.tolist()
        step = min(bad_loss, bad_norm)
        if step == self._NEVER:
            self._ids.clear()
            return None, not go
        what = "the loss" if bad_loss <= bad_norm else "the gradient norm"
        return Bad(what, step, self._guilty_ids(step)), not go

    def _guilty_ids(self, step: int) -> list[Any]:
        """Ids of the ranks whose own loss was bad at `step`; of all if only their common gradient was."""
        ids = next((ids for s, ids in self._ids if s == step), None)
        ids = [] if ids is None else [ids] if isinstance(ids, str) else ids
        listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        mine = (bool(self._first_bad[0] == step), listed)
        ranks = [mine] * self._dist.world
        if self._dist.world > 1:
            torch.distributed.all_gather_object(ranks, mine)
        chosen = [ids for bad, ids in ranks if bad] or [ids for _, ids in ranks]
        return [i for ids in chosen for i in ids]
