"""One process against two: the same gradients, the same training, the same sums."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_shared.dist import Dist, average_gradients, elastic_job, init, torchrun, weighted_mean_loss
from lab_shared.errors import UserError
from lab_shared.optim import clip_grads, make_optimizer
from torch import nn

Arrays = dict[str, np.ndarray]


def train(dist: Dist) -> Arrays:
    """Four steps of 7 examples each, shared unevenly between two ranks or all done by one."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Linear(8, 2))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 3
    parallel = dist.wrap(model)
    optimizer = make_optimizer(parallel, lr=0.01, muon_lr=0.1, weight_decay=0.1, not_hidden=["0", "3"])
    out = {}
    for step, cut in enumerate([5, 2, 7, 0]):  # examples of rank 0: in the last steps one rank has none
        x, y = torch.randn(7, 5, generator=generator), torch.randn(7, 2, generator=generator)
        mine = slice(None) if dist.world == 1 else (slice(cut) if dist.is_main else slice(cut, None))
        n = len(x[mine])
        loss_sum = (parallel(x[mine]) - y[mine]).square().sum()
        loss = weighted_mean_loss(loss_sum, torch.tensor(n) if step % 2 else n, dist)
        loss.backward()
        norm = clip_grads(model.parameters(), 1.0)
        sums = dist.reduce_sums({"loss": loss.detach() / dist.world, "n": n, "ranks": torch.ones(2, 3)})
        out |= {f"{k}{step}": v for k, v in sums.items()} | {f"norm{step}": norm}
        out |= {f"gradient{step}.{k}": p.grad.clone() for k, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    out["averaged"] = averaged(dist)
    dist.barrier()
    out |= {f"weight.{k}": p.detach() for k, p in model.named_parameters()}
    return {k: v.numpy() for k, v in out.items()}


def averaged(dist: Dist) -> torch.Tensor:
    """The gradient of the same mean over 7 examples without DistributedDataParallel."""
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    weight, unused = nn.Parameter(torch.arange(12.0).view(4, 3)), nn.Parameter(torch.ones(2))
    mine = x if dist.world == 1 else x[:5] if dist.is_main else x[5:]
    ((mine @ weight).square().sum() * dist.world / 7).backward()
    average_gradients([weight, unused], dist)
    assert weight.grad is not None
    assert unused.grad is None
    return weight.grad


def main(folder: str) -> None:
    """What each rank runs."""
    torch.set_num_threads(1)
    with init("cpu") as dist:
        np.savez(f"{folder}/rank{dist.rank}.npz", **train(dist))
    assert not torch.distributed.is_initialized()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**torchrun: object) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | {k: str(v) for k, v in torchrun.items()}


@pytest.fixture(scope="module")
def alone() -> Arrays:
    return train(Dist())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Arrays, Arrays]:
    folder = tmp_path_factory.mktemp("dist")
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    processes = []
    try:
        for rank in range(2):
            with (folder / f"log{rank}").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "error", __file__, str(folder)],
                        env=environment(RANK=rank, LOCAL_RANK=rank, **meet),
                        stderr=log,
                    )
                )
        codes = [process.wait(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], (folder / "log0").read_text() + (folder / "log1").read_text()
    return dict(np.load(folder / "rank0.npz")), dict(np.load(folder / "rank1.npz"))


def test_two_uneven_ranks_equal_one_process(alone: Arrays, ranks: tuple[Arrays, Arrays]) -> None:
    """Losses, gradients, their norms and, through 4 Muon steps, the weights."""
    for name, value in alone.items():
        if not name.startswith("ranks"):
            # Muon amplifies rounding in the small singular directions of a gradient, up to 485 times.
            atol = 5e-5 if name.startswith("weight.2") else 2e-6
            np.testing.assert_allclose(ranks[0][name], value, atol=atol, rtol=1e-5, err_msg=name)
    assert min(np.abs(alone[f"gradient{step}.2.weight"]).max() for step in range(4)) > 0.01


def test_ranks_stay_identical(ranks: tuple[Arrays, Arrays]) -> None:
    for name, value in ranks[0].items():
        np.testing.assert_array_equal(value, ranks[1][name], err_msg=name)


def test_reduce_sums(ranks: tuple[Arrays, Arrays]) -> None:
    for step in range(4):
        assert ranks[0][f"n{step}"] == 7
        np.testing.assert_array_equal(ranks[0][f"ranks{step}"], np.full((2, 3), 2.0))
    sums = Dist().reduce_sums({"a": 2**53 - 1, "b": torch.arange(3), "c": 0.5})
    assert {k: v.tolist() for k, v in sums.items()} == {"a": 2**53 - 1, "b": [0, 1, 2], "c": 0.5}
    assert all(v.dtype == torch.float64 for v in sums.values())
    assert Dist().reduce_sums({}) == {}


def test_alone_the_weighted_mean_is_the_mean() -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weighted_mean_loss(x.square().sum(), 300, Dist()).backward()
    assert torch.allclose(x.grad, 2 * x.detach() / 300)
    n = torch.tensor(257)  # which bf16 does not hold
    assert weighted_mean_loss(torch.tensor(256.0, dtype=torch.bfloat16), n, Dist()) == pytest.approx(256 / 257)
    assert n == 257


def test_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with init("cpu") as dist:
        assert (dist.rank, dist.world, dist.is_main, dist.device.type) == (0, 1, True, "cpu")
        model = nn.Linear(2, 2)
        assert dist.wrap(model) is model
        dist.barrier()
    dist.shutdown()


@pytest.mark.parametrize(
    ("place", "device", "message"),
    [
        ({"RANK": 0}, "cpu", "RANK is set without WORLD_SIZE: start with torchrun"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, "mps", "'mps' with 2 processes"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, "cuda:1", "'cuda:1' with 2 processes"),
        (
            {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3},
            "cuda",
            "local rank 3 has no GPU of its own \\(2 here\\)",
        ),
    ],
)
def test_init_refuses(monkeypatch: pytest.MonkeyPatch, place: dict[str, int], device: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=message):
        init(device)


def test_init_refuses_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no usable CUDA device"):
        init("cuda")


def test_init_refuses_restarts_that_would_meet_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_MAX_RESTARTS": 1}
    for name, value in (place | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "mine"}).items():
        monkeypatch.setenv(name, str(value))
    assert elastic_job() == "mine"
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        init("cpu")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert elastic_job() is None


@pytest.mark.slow
def test_under_torchrun_itself(tmp_path: Path) -> None:
    launch = torchrun(2, __file__, str(tmp_path))
    subprocess.run(launch, env=environment(OMP_NUM_THREADS=1), check=True, timeout=300)
    assert (tmp_path / "rank1.npz").exists()


@pytest.mark.gpu
def test_no_host_sync_on_cuda() -> None:
    dist = Dist(device=torch.device("cuda"))
    loss_sum = torch.ones((), device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = weighted_mean_loss(loss_sum, 4, dist)
        sums = dist.reduce_sums({"loss": loss, "n": 4})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums["loss"] == 0.25


if __name__ == "__main__":
    main(sys.argv[1])
