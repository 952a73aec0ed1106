"""Every option of a run, and the presets. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import Literal

from lab_shared.ranges import Count, Positive, Seed


@dataclass(frozen=True)
class TrainConfig:
    letters: Count = 10
    length: Count = 16
    width: Count = 32
    positions: bool = True
    """Whether the head can tell positions apart."""
    lr: Positive = 1e-2
    steps: Count = 120
    batch: Count = 64
    """Lines of a step, on each process."""
    seed: Seed = 0
    wandb: Literal["offline", "online", "disabled"] = "disabled"


PRESETS = {
    "small": ("Lines of 16 letters, seconds on one core.", TrainConfig()),
    "blind": ("Control: no positions, so nothing but the frequencies can be learned.", TrainConfig(positions=False)),
}
