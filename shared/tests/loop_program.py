"""A small training program for the fault tests, run as real processes; see the fixture `train` in
test_loop_faults.py.

It imports torch once and forks a child (or one per rank) for each job that it reads from stdin, so that
dozens of killed runs cost seconds. A job is one JSON line; the answer is one JSON line with each rank's wait
status and stderr.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lab_shared.checkpoint import seed_everything
from lab_shared.dist import init, weighted_mean_loss
from lab_shared.errors import UserError
from lab_shared.loop import ticks
from lab_shared.optim import make_optimizer
from lab_shared.run import Run
from torch import nn


@dataclass(frozen=True)
class Config:
    steps: int = 23
    seed: int = 0
    kind: str = "muon"
    log_every: int = 3
    checkpoint_every: int = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(self.hidden(self.embed(x)))))


class Batches:
    """Random batches of random size from a generator of its own; the ids are the running numbers of the
    items.
    """

    def __init__(self, seed: int) -> None:
        self.rng, self.seen = np.random.default_rng(seed), 0

    def __next__(self) -> tuple[torch.Tensor, np.ndarray]:
        n = int(self.rng.integers(3, 9))
        self.seen += n
        return torch.from_numpy(self.rng.integers(0, 11, n)), np.arange(self.seen - n, self.seen)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state, self.seen = state["rng"], state["seen"]


def train(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    with init("cpu") as dist:
        if job.get("resume"):
            run = Run.open(job["out"], dist=dist)
        else:
            config = Config(**job.get("config", {}))
            options = {"project": "test", "resume_command": "again --resume {path}", "wandb": "disabled"}
            run = Run.create(job["out"], config, seed=config.seed, dist=dist, **options)
        config = run.config(Config)
        if limit := job.get("file_limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        seed_everything(config.seed + dist.rank)
        net = Net()
        optimizer = make_optimizer(net, lr=1e-2, weight_decay=0.1, kind=config.kind)  # type: ignore[arg-type]
        model = dist.wrap(net)
        batches = Batches(config.seed + 1000 * dist.rank)

        def fault(where: str, step: int, *_: object) -> None:
            if job.get("fault") == [where, step] and dist.rank == job.get("fault_rank", 0):
                for name in job["signals"]:
                    os.kill(os.getpid(), signal.Signals[name])

        def schedule(step: int) -> float:
            return 1 - step / config.steps

        for tick in ticks(
            run,
            config.steps,
            model=model,
            optimizer=optimizer,
            lr=schedule,
            clip=0.5,
            state={"data": batches},
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            dist=dist,
        ):
            fault("before", tick.step)
            if job.get("fault") == ["saving", tick.step] and tick.every(config.checkpoint_every):
                # Dies with the temporary file complete and not yet renamed.
                os.replace = partial(fault, "saving", tick.step)
            x, ids = next(batches)
            loss_sum = nn.functional.cross_entropy(model(x), (x + 1) % 11, reduction="sum")
            if job.get("nan") == [dist.rank, tick.step]:
                loss_sum = loss_sum * float("nan")
            loss = weighted_mean_loss(loss_sum, len(x), dist)
            tick.update(loss, ids=ids, n=len(x), noise=random.random() + np.random.rand())  # noqa: NPY002
            fault("after", tick.step)
            if tick.every(5):
                tick.log(draw=float(torch.rand(())))
                tick.keep_best(float(loss.detach()))
        run.finish({"steps": config.steps})


def child(job: dict[str, Any], rank: int, port: int, stderr: int) -> None:
    """Never returns."""
    os.dup2(stderr, 2)
    ranks = job.get("ranks", 1)
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    status = 1
    try:
        train(job)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    import safetensors.torch  # noqa: F401 - these two load late otherwise, once in every child
    import torch._dynamo  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        children, files = [], []
        for rank in range(job.get("ranks", 1)):
            files.append(tempfile.TemporaryFile())  # noqa: SIM115 - read after the child is gone
            pid = os.fork()
            if pid == 0:
                child(job, rank, port, files[-1].fileno())
            children.append(pid)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        for file in files:
            file.seek(0)
        print(json.dumps({"status": statuses, "stderr": [f.read().decode() for f in files]}), flush=True)


if __name__ == "__main__":
    main()
