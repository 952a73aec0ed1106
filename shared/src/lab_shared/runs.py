"""What every experiment does with run folders: start a run in one, and take a finished run out of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from lab_shared.config import read_config
from lab_shared.dist import Dist, elastic_job
from lab_shared.errors import UserError
from lab_shared.run import Run, WandbMode
from lab_shared.run import refuse_taken as refuse_taken_by

T = TypeVar("T")
_RESUME = "uv run {program} train --resume {{path}}"


def refuse_taken(program: str, out: Path) -> None:
    """Raise RunError where `start_run` would since the folder holds a run; to be called before long preparations."""
    if elastic_job() is None:
        refuse_taken_by(out, _RESUME.format(program=program))


def start_run(
    program: str, config: Any, out: Path, dist: Dist, *, wandb: WandbMode | None = None, go_on: bool | None = None
) -> Run:
    """A run of `PROGRAM train` in the folder `out`; see `Run.create`, which also says what it raises.

    config: with a field `seed`, and one `wandb` if that is not given. go_on: open the run that is there.
    """
    return Run.create(
        out,
        config,
        seed=config.seed,
        project=program,
        resume_command=_RESUME.format(program=program),
        wandb=wandb or config.wandb,
        dist=dist,
        go_on=go_on,
    )


def finished_run(
    folder: str | Path, cls: type[T], program: str, *, weights: Sequence[str] = ("weights",)
) -> tuple[T, Path]:
    """Configuration and weights file of the run in `folder`: the first of `weights` (without suffix) that is there.

    Raises UserError when there is no run, or none with weights; ConfigError for a configuration that is not of `cls`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no finished run: it has no config.json; give what `{program} train` wrote")
    config = read_config(cls, folder / "config.json")
    found = [path for name in weights if (path := folder / f"{name}.safetensors").is_file()]
    if not found:
        raise UserError(
            f"{folder} is no finished run: it has no weights yet; finish it with `{program} train --resume {folder}`"
        )
    return config, found[0]


def pick_device(name: str | None) -> torch.device:
    """The named device, or the GPU when there is one. Raises UserError for a device that is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError:  # of torch, with the names of twenty kinds that nothing here runs on
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: it must be cpu, cuda, or one of several GPUs, such as cuda:1")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        seen = f"the {gpus} CUDA device(s) it sees here are cuda:0 to cuda:{gpus - 1}" if gpus else "it sees none here"
        raise UserError(f"--device {name}: torch has no such CUDA device, {seen}; use --device cpu")
    return device
