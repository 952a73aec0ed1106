"""Data parallelism over 1..N processes: the same program alone or under torchrun."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed
from torch import Tensor, nn

from lab_shared.errors import UserError

_groups = itertools.count()  # process groups that this process has begun


@dataclass(frozen=True)
class Dist:
    """This process's place among `world` equal ones; as a context manager, it ends the process group."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine; the CUDA device's index when world > 1."""
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            on_cuda = self.device.type == "cuda"
            torch.distributed.barrier(device_ids=[self.local_rank] if on_cuda else None)

    def reduce_sums(self, values: dict[str, Tensor | float]) -> dict[str, Tensor]:
        """Sum each entry over the ranks, in one collective, without reading anything back to the host.

        Numbers and tensors of any shape; the same keys and shapes in the same order on every rank. Returns
        float64 tensors on the device (float32 where the device has no float64), so that counts up to 2^53
        are exact.
        """
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        parts = [_as_tensor(value, dtype, self.device) for value in values.values()]
        if not parts or self.world == 1:
            return dict(zip(values, parts, strict=True))
        flat = torch.cat([part.flatten() for part in parts])
        torch.distributed.all_reduce(flat)
        sums = flat.split([part.numel() for part in parts])
        return {key: s.view_as(part) for key, s, part in zip(values, sums, parts, strict=True)}

    def wrap(self, model: nn.Module) -> nn.Module:
        """DistributedDataParallel around a model already on the device; the model itself when alone."""
        if self.world == 1:
            return model
        device_ids = [self.local_rank] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    def shutdown(self) -> None:
        """End the process group. Safe to call twice."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def init(device: str | torch.device | None = None) -> Dist:
    """Join the processes that torchrun started, or stand alone without it.

    device: None takes CUDA when there is one, otherwise the CPU. Under torchrun with more than one process
    each takes the CUDA device of its local rank and they talk through NCCL, or through gloo on the CPU.

    Raises UserError for a device this machine lacks, or one that several processes cannot share, and for a torchrun job
    over several hosts whose processes could not meet again after a restart.
    """
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {str(wanted)!r}: this machine has no usable CUDA device; use --device cpu")
    rank, world, local_rank = _torchrun_place()
    if world == 1:
        if wanted.type == "cuda":
            wanted = torch.device("cuda", wanted.index or 0)
            torch.cuda.set_device(wanted)
        return Dist(device=wanted)

    if wanted.type not in ("cpu", "cuda") or wanted.index is not None:
        raise UserError(f"device {str(wanted)!r} with {world} processes: use 'cuda' (one each) or 'cpu'")
    if wanted.type == "cpu":
        torch.distributed.init_process_group("gloo", **_meeting_point(rank, world))
        return Dist(rank, world, local_rank, wanted)
    if local_rank >= (gpus := torch.cuda.device_count()):
        raise UserError(f"local rank {local_rank} has no GPU of its own ({gpus} here): start fewer processes")
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    torch.distributed.init_process_group("nccl", device_id=own, **_meeting_point(rank, world))
    return Dist(rank, world, local_rank, own)


def _meeting_point(rank: int, world: int) -> dict[str, Any]:
    """Arguments of init_process_group: a store in which nothing is left of an attempt or a group before this one.

    torchrun shares one store with all attempts of its processes, where the next would find the addresses of the dead.
    """
    alone = os.environ.get("LOCAL_WORLD_SIZE", str(world)) == str(world)
    if not alone and elastic_job() is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "--max-restarts on several hosts needs --rdzv-backend=c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
            "torchrun's environment: without it, processes that start again find the addresses of those that died"
        )
    # On one host all processes are counted by one torchrun; the counts of several hosts may differ.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
    store = next(torch.distributed.rendezvous("env://", rank, world))[0]
    return {
        "store": torch.distributed.PrefixStore(f"attempt {attempt} group {next(_groups)}", store),
        "rank": rank,
        "world_size": world,
    }


def torchrun(processes: int, *program: str, max_restarts: int = 0) -> list[str]:
    """The command that starts `processes` of a program (`FILE ARGS` or `-m MODULE ARGS`) on this machine.

    max_restarts: how often all of them are started again when one dies; see `elastic_job`.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launch, f"--max-restarts={max_restarts}", *program]


def elastic_job() -> str | None:
    """The name of the torchrun job, if it is one that starts its processes again when one dies (--max-restarts N).

    The same in every attempt, so that the program can find what the one before has left; None otherwise.
    """
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) < 1:
        return None
    return os.environ.get("TORCHELASTIC_RUN_ID", "none")


def _torchrun_place() -> tuple[int, int, int]:
    """(rank, world, local rank) from torchrun's environment; (0, 1, 0) without it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in os.environ]
    if not given:
        return 0, 1, 0
    if len(given) < len(names):
        missing = [name for name in names if name not in given]
        raise UserError(f"{given[0]} is set without {missing[0]}: start with torchrun, or unset {given[0]}")
    rank, world, local_rank = (int(os.environ[name]) for name in names)
    return rank, world, local_rank


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside DistributedDataParallel and torch.compile, in whichever order they are."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def weighted_mean_loss(loss_sum: Tensor, n: Tensor | int, dist: Dist) -> Tensor:
    """The loss whose gradient, averaged over ranks by DDP, is that of the mean over all ranks' examples.

    loss_sum: 0-d sum over this rank's n examples; n may differ between ranks and be 0 on some (on all: nan).
    Returns loss_sum world / sum_ranks(n), so that the mean of the results over ranks is the global mean loss.
    One small all-reduce, nothing read back to the host.
    """
    # float32 at least: bf16 cannot hold counts above 256.
    total = _as_tensor(n, torch.promote_types(loss_sum.dtype, torch.float32), loss_sum.device).clone()
    if dist.world > 1:
        torch.distributed.all_reduce(total)
    return loss_sum * (dist.world / total)


def average_gradients(params: Sequence[nn.Parameter], dist: Dist) -> None:
    """Replace the gradients by their means over ranks, in one collective. Nothing is read back to the host."""
    if dist.world == 1:
        return
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]).div_(dist.world)
    torch.distributed.all_reduce(flat)
    means = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [mean.view_as(grad) for mean, grad in zip(means, grads, strict=True)])


def _as_tensor(value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device without a host synchronisation: a fill kernel for a number, a cast for a tensor."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=device)
