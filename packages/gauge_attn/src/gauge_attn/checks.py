"""Whether a configuration makes sense, said before anything is read or written. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from lab_shared.config import to_json
from lab_shared.errors import UserError

from gauge_attn.config import ModelConfig, TrainConfig
from gauge_attn.irreps import Irreps

_FEWEST_TOKENS = 4
_KAPPAS = (1e-12, 1e12)
_MOST_KEYS = 2**16
_OF_ONE_ARCH = {
    "route": "faithful", "covariance": "faithful", "exponential": "faithful", "curvature": "faithful",
    "gauge_fixed": "faithful", "vfe_step": "faithful", "precision": "practical",
}  # fmt: skip
"""Options that change what attention is: asked of another model, they would silently do nothing."""


def checked(config: TrainConfig) -> TrainConfig:
    """The configuration itself. Raises UserError for values out of their range, a layout that cannot be read, windows
    that nothing can be measured in, and options that the chosen model does not have."""
    to_json(config)  # types and ranges
    model, optim, data = config.model, config.optim, config.data
    try:
        Irreps(model.spec)
    except ValueError as error:
        raise UserError(f"model.spec={model.spec!r}: {error}") from error
    low, high = _KAPPAS
    if not low <= model.kappa <= high:
        raise UserError(f"model.kappa={model.kappa:g} is no temperature: it must lie between {low:g} and {high:g}")
    usual = ModelConfig()
    for name, arch in _OF_ONE_ARCH.items():
        if getattr(model, name) != getattr(usual, name) and model.arch != arch:
            raise UserError(
                f"model.{name}={getattr(model, name)} belongs to --model.arch {arch}, which this {model.arch} is not: "
                "leave it out"
            )
    if model.arch == "gpt" and optim.alignment and optim.alignment_reduction != "none":
        raise UserError(f"optim.alignment={optim.alignment:g}: a gpt has no divergences to align: leave it out")
    if data.window < _FEWEST_TOKENS:
        raise UserError(f"data.window={data.window}: how sharp attention is takes {_FEWEST_TOKENS} tokens to say")
    if data.data == "induction" and (data.window % 2 or not 2 <= data.keys <= _MOST_KEYS):
        raise UserError(
            f"data.window={data.window}, data.keys={data.keys}: the induction language needs an even window and 2 to "
            f"{_MOST_KEYS:,} keys"
        )
    return config


def checked_run(folder: Path, config: TrainConfig) -> TrainConfig:
    """The same for the configuration that a run's folder holds; the message names its file."""
    try:
        return checked(config)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
