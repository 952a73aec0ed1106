"""Every option of a run, and the presets. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    letters: int = 10
    length: int = 16
    """Letters of a line."""
    width: int = 32
    positions: bool = True
    """Whether the head can tell positions apart."""
    lr: float = 1e-2
    steps: int = 120
    batch: int = 64
    """Lines of a step, on each process."""
    seed: int = 0
    wandb: Literal["offline", "online", "disabled"] = "disabled"


PRESETS = {
    "small": ("Lines of 16 letters, seconds on one core.", TrainConfig()),
    "blind": ("Control: no positions, so nothing but the frequencies can be learned.", TrainConfig(positions=False)),
}
