"""lab_shared.runs: starting a run and taking a finished one out of its folder."""

from dataclasses import dataclass, replace

import pytest
from lab_shared.checkpoint import save_weights
from lab_shared.config import ConfigError
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.run import RunError
from lab_shared.runs import finished_run, pick_device, refuse_taken, start_run
from torch import nn


@dataclass(frozen=True)
class Config:
    width: int = 3
    seed: int = 4
    wandb: str = "disabled"


def test_a_run_knows_the_command_that_goes_on(tmp_path):
    with start_run("tool", Config(), tmp_path / "a run", Dist()) as run:
        assert (run.seed, run.resume_command) == (4, f"uv run tool train --resume '{tmp_path / 'a run'}'")
    with pytest.raises(RunError, match="already holds a run"):
        start_run("tool", Config(), tmp_path / "a run", Dist())
    with pytest.raises(RunError, match=r"already holds a run .* go on with `uv run tool train --resume"):
        refuse_taken("tool", tmp_path / "a run")
    refuse_taken("tool", tmp_path / "another")
    with start_run("tool", Config(), tmp_path / "a run", Dist(), go_on=True) as run:
        assert run.config(Config) == Config()
    with pytest.raises(RunError, match="another configuration"):
        start_run("tool", replace(Config(), width=4), tmp_path / "a run", Dist(), go_on=True)


def test_a_finished_run_is_its_configuration_and_weights(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json; give what `tool train` wrote"):
        finished_run(tmp_path, Config, "tool")
    with start_run("tool", Config(width=7), tmp_path, Dist()):
        pass
    with pytest.raises(UserError, match=f"finish it with `tool train --resume {tmp_path}`"):
        finished_run(tmp_path, Config, "tool")
    save_weights(tmp_path / "weights.safetensors", nn.Linear(2, 2))
    assert finished_run(tmp_path, Config, "tool") == (Config(width=7), tmp_path / "weights.safetensors")
    save_weights(tmp_path / "best.safetensors", nn.Linear(2, 2))
    assert finished_run(tmp_path, Config, "tool", weights=("best", "weights"))[1].name == "best.safetensors"
    (tmp_path / "config.json").write_text('{"widht": 7}')
    with pytest.raises(ConfigError, match="widht"):
        finished_run(tmp_path, Config, "tool")


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pick_device(None).type == pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--device cuda: torch has no such CUDA device, it sees none here"):
        pick_device("cuda")
    for name in ("tpu", "mps", "cuda:x", "meta"):
        with pytest.raises(UserError, match=f"--device {name}: it must be cpu, cuda"):
            pick_device(name)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert pick_device(None).type == "cuda"
    assert pick_device("cuda:1").index == 1
    with pytest.raises(UserError, match=r"--device cuda:2: .* are cuda:0 to cuda:1"):
        pick_device("cuda:2")
