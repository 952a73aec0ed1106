"""DroPE: take the rotary positions away from a trained model, then train it a little further.

Source: Gelberg et al. 2025, "Extending the context of pretrained LLMs by dropping their positional embeddings".
Its control keeps the positions and trains for the same steps on the same data; NoPE never had positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab_shared.errors import UserError

from attn_clustering.config import RunConfig
from attn_clustering.model import Transformer
from attn_clustering.runs import load_run, parent_folder, read_summary

RECOVERED_WITHIN = 0.02
"""Nats of validation loss above the model with positions, up to which the one without counts as recovered."""


def remove_rope(model: Transformer) -> Transformer:
    """The same model, in place, with every query and key left where its content puts it."""
    model.rope_on = False
    return model


def starting_model(config: RunConfig, folder: Path) -> Transformer:
    """The trained model a recalibration starts from, without positions in phase `drope`, with them in `extra`.

    Raises UserError when the parent is not finished, was imported (and so has no loss to compare with), is another
    condition, or has no positions to remove.
    """
    parent = parent_folder(config, folder)
    if "val_loss" not in read_summary(parent):
        raise UserError(f"{parent} was not trained here: it has no validation loss that a recalibration could regain")
    model, trained = load_run(parent)
    if (trained.condition, trained.seed, trained.phase) != (config.condition, config.seed, "rope"):
        raise UserError(f"{parent} is {trained.name}, no RoPE run of {config.condition} with seed {config.seed}")
    return remove_rope(model) if config.phase == "drope" else model


def verdict(config: RunConfig, folder: Path, val_loss: float) -> dict[str, Any]:
    """How a recalibrated model's validation loss compares with its parent's (same validation sequences)."""
    parent_loss: float = read_summary(parent_folder(config, folder))["val_loss"]
    return {
        "parent_val_loss": parent_loss,
        "val_loss_above_parent": val_loss - parent_loss,
        "recovered": val_loss <= parent_loss + RECOVERED_WITHIN,
    }


def verdict_line(found: dict[str, Any]) -> str:
    """The verdict in a sentence."""
    above = found["val_loss_above_parent"]
    word = "recovered" if found["recovered"] else "not recovered"
    return f"{word}: validation loss {above:+.4f} nats against the trained model (recovered up to {RECOVERED_WITHIN:+})"
