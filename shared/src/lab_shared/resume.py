"""The whole state of a training loop: gathered from its parts into one checkpoint, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from lab_shared.checkpoint import (
    CheckpointError,
    assign_tensors,
    checkpoint_path,
    encode_tree,
    load_tree,
    model_tensors,
    newest_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.files import StorageError
from lab_shared.run import Run
from lab_shared.tree_file import decode_tree


class Stateful(Protocol):
    """Anything whose position a checkpoint must keep, such as a stream of batches."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass
class LoopState:
    """What a step depends on.

    Model and optimizer are equal on all ranks, so rank 0's are saved; holders and random generators are not.
    """

    run: Run
    model: nn.Module
    optimizer: Optimizer
    holders: Mapping[str, Stateful]
    device: torch.device
    dist: Dist

    def save(self, loop: dict[str, Any], keep: int) -> None:
        """Write a checkpoint; every rank calls it. loop: the loop's own numbers, with "step".

        Raises StorageError with the resume command.
        """
        mine = {
            "rng": rng_state(self.device),
            "state": {name: holder.state_dict() for name, holder in self.holders.items()},
        }
        ranks = [mine]
        if self.dist.world > 1:
            packed = [b""] * self.dist.world
            torch.distributed.all_gather_object(packed, encode_tree(mine))
            ranks = [decode_tree(data) for data in packed]
        if not self.run.is_main:
            return
        tree = {
            "model": model_tensors(self.model),
            "optim": self.optimizer.state_dict(),
            "rng": [rank["rng"] for rank in ranks],
            "state": [rank["state"] for rank in ranks],
            "loop": {**loop, "elapsed": self.run.elapsed},
        }
        self.run.sync()
        try:
            save_checkpoint(self.run.checkpoints, loop["step"], tree, keep=keep)
        except StorageError as error:
            raise self.run.add_way_back(error) from error

    def restore(self) -> dict[str, Any] | None:
        """Go back to the newest readable checkpoint; returns the `loop` it was saved with, None without one.

        Cuts the run's metrics back to that step. Raises CheckpointError when the checkpoint does not fit.
        """
        # The base is the configuration's: a checkpoint must not turn a decayed rate into it.
        base_lrs = [group.setdefault("base_lr", group["lr"]) for group in self.optimizer.param_groups]
        tree = self._newest_tree()
        if tree is None:
            self.run.rewind(0)
            return None
        source = f"the checkpoint of step {tree['loop']['step']}"
        try:
            return self._put_back(tree, base_lrs, source)
        except UserError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error!s:.300}"
            raise CheckpointError(
                f"{source} does not fit this program and configuration ({reason}): go on with those that wrote it, or "
                "start a new run"
            ) from error

    def _put_back(self, tree: dict[str, Any], base_lrs: list[float], source: str) -> dict[str, Any]:
        """Give every part its own state; the loop's."""
        if len(tree["rng"]) != self.dist.world:
            raise CheckpointError(
                f"{source} was written by {len(tree['rng'])} processes, this run has {self.dist.world}: "
                "start as many as before"
            )
        loop, state = tree["loop"], tree["state"][self.dist.rank]
        if state.keys() != self.holders.keys():
            raise CheckpointError(f"{source} holds the state of {list(state)}, not of {list(self.holders)}")
        assign_tensors(self.model, tree["model"], source)
        self.optimizer.load_state_dict(tree["optim"])
        for group, base_lr in zip(self.optimizer.param_groups, base_lrs, strict=True):
            group["base_lr"] = base_lr
        for name, holder in self.holders.items():
            holder.load_state_dict(state[name])
        self.run.rewind(loop["step"], loop["elapsed"])
        set_rng_state(tree["rng"][self.dist.rank], self.device)  # last: the others may have drawn
        return loop

    def _newest_tree(self) -> dict[str, Any] | None:
        """The newest readable checkpoint, the same on every rank; rank 0 chooses."""
        tree, folder = None, self.run.checkpoints
        if self.run.is_main:
            tree, skipped = newest_checkpoint(folder)
            for line in skipped:
                self.run.progress.line(f"warning: {line}")
            loop = {"step": 0} if tree is None else tree.get("loop")
            if not isinstance(loop, dict) or type(loop.get("step")) is not int:
                raise CheckpointError(f"the newest checkpoint in {folder} is none of a training: move it away")
        step = [tree["loop"]["step"] if tree else None]
        if self.dist.world > 1:
            torch.distributed.broadcast_object_list(step, src=0)
        if step[0] is not None and tree is None:
            tree = load_tree(checkpoint_path(folder, step[0]))
        return tree
