"""In which order a model meets its sequences: an explicit index plan, fixed before training and saved with the run.

Suffix legend: N sequences, S = steps * batch positions of the plan.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lab_shared.arrays import load_arrays
from lab_shared.errors import UserError
from lab_shared.files import atomic_write
from torch import Tensor

from attn_clustering.config import ORDERINGS
from attn_clustering.data import counter


class PlanError(UserError):
    """A plan that cannot be made or read; the message names the value and the way out."""


@dataclass(frozen=True)
class Plan:
    """Sequence index_S[i * batch + j] is row j of the batch of step i."""

    kind: str
    index_S: Tensor  # int64, CPU
    steps: int
    batch: int
    epochs: float
    """Passes over the data set: positions divided by sequences."""
    cooldown_steps: int
    """Steps at the end that every ordering of the same data and seed shares."""

    @property
    def hash(self) -> str:
        """BLAKE2b of the index, for results and resume checks."""
        return hashlib.blake2b(self.index_S.numpy().astype("<i8").tobytes(), digest_size=16).hexdigest()

    def batch_ids(self, step: int) -> Tensor:
        """(batch,) sequence ids of one step."""
        return self.index_S[step * self.batch : (step + 1) * self.batch]

    def save(self, path: Path) -> None:
        """Write an .npz without pickles, atomically."""
        meta = {k: v for k, v in vars(self).items() if k != "index_S"}
        buffer = io.BytesIO()
        np.savez(buffer, index=self.index_S.numpy(), meta=np.array(json.dumps(meta | {"hash": self.hash})))
        atomic_write(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> Plan:
        """Read a saved plan. Raises PlanError when the file is damaged or no plan."""
        try:
            data = load_arrays(path)
            meta, index_S = json.loads(str(data["meta"])), torch.from_numpy(data["index"])
            expected = meta.pop("hash")
            plan = Plan(index_S=index_S, **meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path} is no readable plan ({error}): delete it and start the run anew") from error
        if plan.hash != expected:
            raise PlanError(f"{path} is damaged: its index does not have the recorded hash; start the run anew")
        return plan


def plan(
    kind: str,
    dominant_N: Tensor,
    *,
    steps: int,
    batch: int,
    seed: int,
    epochs: Literal["repeated", "fresh"] = "repeated",
    cooldown: float = 0.0,
    partial: Literal["matched", "cut"] = "matched",
) -> Plan:
    """The order of `steps * batch` sequences out of the N whose dominant topics are `dominant_N`.

    Kinds, each a way to order one pass over the data:
        shuffled             a new random order in every pass
        topic_ordered        by dominant topic, ties by id; the same order in every pass, as are all below
        homogeneous_blocks   the same rule, meant for single-topic sequences (`segments=(1, 1)`)
        random_blocks        blocks of the same sizes by a random label: the block structure without the topics
        reversed             by dominant topic, the last topic first
        interleaved          topics in rotation, each spread evenly over the pass

    epochs: "repeated" goes over the N sequences again and again; "fresh" uses each at most once and raises PlanError
    when there are fewer than steps * batch.
    cooldown: fraction of the steps, at the end, that is one shuffled stream depending on the seed alone, so that it is
    identical for every kind.
    partial: a last incomplete pass covers either a random subset chosen by the seed alone and then ordered ("matched":
    every kind sees the same sequences equally often) or the beginning of the ordered pass ("cut": what stopping a run
    in mid-epoch does, as the first run did).

    Raises PlanError for an unknown kind and values out of range.
    """
    n = len(dominant_N)
    if kind not in ORDERINGS:
        raise PlanError(f"no ordering {kind!r}; there are {', '.join(ORDERINGS)}")
    if steps < 1 or batch < 1 or n < 1:
        raise PlanError(f"steps={steps}, batch={batch}, sequences={n}: each must be at least 1")
    if not 0.0 <= cooldown <= 1.0:
        raise PlanError(f"cooldown={cooldown}: a fraction of the steps, between 0 and 1")
    total = steps * batch
    if epochs == "fresh" and n < total:
        raise PlanError(
            f"fresh data: {steps} steps of {batch} need {total:,} sequences, there are {n:,}: set train_sequences "
            "(--data.language.train-sequences), or lower steps or batch"
        )
    cooldown_steps = round(cooldown * steps)
    main = total - cooldown_steps * batch
    dominant_N = dominant_N.cpu().long()

    if epochs == "fresh":
        parts = [_ordered(kind, torch.arange(main), dominant_N, seed, 0)]
        parts.append(main + counter.permutation(counter.key(seed, _COOLDOWN), total - main))
    else:
        full, rest = divmod(main, n)
        parts = [_ordered(kind, torch.arange(n), dominant_N, seed, epoch) for epoch in range(full)]
        if partial == "cut":
            parts.append(_ordered(kind, torch.arange(n), dominant_N, seed, full)[:rest])
        else:
            subset = counter.permutation(counter.key(seed, _SUBSET), n)[:rest].sort().values
            parts.append(_ordered(kind, subset, dominant_N, seed, full))
        passes = -(-(total - main) // n)
        shared = [counter.permutation(counter.key(seed, _COOLDOWN, i), n) for i in range(passes)]
        if shared:
            parts.append(torch.cat(shared)[: total - main])
    return Plan(kind, torch.cat(parts), steps, batch, total / n, cooldown_steps)


def beginning(whole: Plan, steps: int, n_sequences: int) -> Plan:
    """The first `steps` steps of a plan over `n_sequences`. Raises PlanError when it has fewer."""
    if steps > whole.steps:
        raise PlanError(f"{steps} steps of an order that has {whole.steps}: recalibrate for a smaller fraction")
    index_S = whole.index_S[: steps * whole.batch]
    cooldown_steps = max(0, steps - (whole.steps - whole.cooldown_steps))
    return Plan(whole.kind, index_S, steps, whole.batch, len(index_S) / n_sequences, cooldown_steps)


_SHUFFLE, _LABELS, _SUBSET, _COOLDOWN = range(4)


def _ordered(kind: str, ids: Tensor, dominant_N: Tensor, seed: int, epoch: int) -> Tensor:
    """The sequences `ids` (ascending) in the order that `kind` gives one pass."""
    topic = dominant_N[ids]
    if kind == "shuffled":
        return ids[counter.permutation(counter.key(seed, _SHUFFLE, epoch), len(ids))]
    if kind == "random_blocks":
        # Labels go with the sequence, not with its place, so that a block holds the same sequences in every pass.
        labels = dominant_N[counter.permutation(counter.key(seed, _LABELS), len(dominant_N))][ids]
        return ids[torch.argsort(labels, stable=True)]
    if kind == "reversed":
        return ids[torch.argsort(-topic, stable=True)]
    by_topic = torch.argsort(topic, stable=True)
    if kind == "interleaved":
        counts = torch.bincount(topic)
        rank = torch.arange(len(ids)) - (counts.cumsum(0) - counts)[topic[by_topic]]
        share = (rank + 0.5) / counts[topic[by_topic]]
        return ids[by_topic[torch.argsort(share, stable=True)]]
    return ids[by_topic]  # topic_ordered and homogeneous_blocks
