"""The fixed windows all diagnostics share: every variant of a model meets the same targets, so differences are paired.

Shapes: W windows, B windows of a batch, V changes, M slots, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lab_shared.progress import Counter
from numpy.typing import NDArray
from torch import Tensor

from rh_memory.data.windows import SpacingData, WindowBatch
from rh_memory.mdn import Mixture
from rh_memory.scores import WIDTH, Estimate, block_estimate

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Golden:
    """Windows of `data` at fixed starts, taken `batch` at a time."""

    data: SpacingData
    starts_W: Tensor
    batch: int
    width: int = WIDTH

    @classmethod
    def spread(cls, data: SpacingData, starts_N: Tensor, windows: int, batch: int, width: int = WIDTH) -> Golden:
        """`windows` of the given starts, evenly spread."""
        chosen = torch.linspace(0, len(starts_N) - 1, min(windows, len(starts_N))).round().long().unique()
        return cls(data, starts_N.cpu()[chosen], batch, width)

    def __len__(self) -> int:
        return len(self.starts_W)

    @property
    def device(self) -> torch.device:
        return self.data.s.device

    def windows(self) -> Iterator[WindowBatch]:
        for starts_B in self.starts_W.split(self.batch):
            yield self.data.window(starts_B.to(self.device), self.width)

    @property
    def spacing_W(self) -> NDArray[np.int64]:
        """Index of each target."""
        return self.starts_W.numpy() + self.width - 1

    def targets(self) -> Tensor:
        """(W,) on the data's device."""
        return self.data.s[self.starts_W.to(self.device) + self.width - 1]

    def estimate(self, values_W: Any) -> Estimate:
        """Mean and block-bootstrap interval of one value per window."""
        values = values_W.double().cpu().numpy() if isinstance(values_W, Tensor) else np.asarray(values_W)
        return block_estimate(values, self.spacing_W)

    def few(self, windows: int) -> Golden:
        """A smaller set, spread over this one."""
        return Golden.spread(self.data, self.starts_W, windows, self.batch, self.width)


@torch.inference_mode()
def slot_states(model: Any, golden: Golden, **changes: Any) -> Tensor:
    """Final slot states (W, M, D) at the end of each window; `changes` are model.slot_states' keywords."""
    return torch.cat([model.slot_states(batch, **changes) for batch in golden.windows()])


@torch.inference_mode()
def readout_nll(model: Any, h_WMD: Tensor, y_W: Tensor, **changes: Any) -> Tensor:
    """NLL (W,) of the targets, from slot states; `changes` are model.readout's keywords. In pieces that fit."""
    parts = [-model.readout(h, **changes).log_prob(y) for h, y in zip(h_WMD.split(8192), y_W.split(8192), strict=True)]
    return torch.cat(parts).float()


@torch.inference_mode()
def window_nll(model: Any, golden: Golden, **changes: Any) -> Tensor:
    """NLL (W,) at the end of each window; `changes` are model.predict's keywords."""
    parts = [-model.predict(batch, "last", **changes).log_prob(batch.s_BW[:, -1]) for batch in golden.windows()]
    return torch.cat(parts).float()


def negative_log(density: Mixture, y: Tensor) -> Tensor:
    """NLL of y under `density`: what `under_changes` reads by default."""
    return -density.log_prob(y)


@torch.inference_mode()
def under_changes(
    model: Any,
    golden: Golden,
    changes: Sequence[Mapping[str, Any]],
    read: Callable[[Mixture, Tensor], Tensor] = negative_log,
    *,
    title: str,
) -> Tensor:
    """(V, W): `read` of density and target at the end of each window, under each change (keywords of model.predict).

    {} is the model as it is. A postfix memory computes its data stream once for all changes (`PostfixMDN.compare`).
    """
    parts, done = [], 0
    with Counter(title, len(golden), "windows") as counter:
        for batch in golden.windows():
            y_B = batch.s_BW[:, -1]
            if model.config.memory == "postfix":
                part = read(model.compare(batch, changes), y_B[:, None]).mT
            else:
                part = torch.stack([read(model.predict(batch, "last", **change), y_B) for change in changes])
            parts.append(part.float())
            done += len(batch)
            counter.show(done)
    return torch.cat(parts, 1)
