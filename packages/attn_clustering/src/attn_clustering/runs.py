"""What a run stands on: its sequences, its plan (the order it sees them in) and, once trained, its weights.

Shape suffixes: N sequences, T tokens, S = steps * batch positions of the plan.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lab_shared.checkpoint import load_weights
from lab_shared.errors import UserError
from lab_shared.runs import finished_run

from attn_clustering.config import DataConfig, RunConfig
from attn_clustering.data.languages import Sequences, Split, homogeneous, sample
from attn_clustering.data.ordering import Plan, beginning, plan
from attn_clustering.folders import read_object
from attn_clustering.model import Transformer

RECALIBRATION = 1_000_003
"""Added to a run's seed for the shared recalibration stream, so that it is not the beginning of a training plan."""


@lru_cache(maxsize=3)
def load_sequences(data: DataConfig, split: Split, device: str, first_id: int = 0, n: int | None = None) -> Sequences:
    """Sequences first_id .. first_id + n - 1 of a split on a device; n=None takes what the configuration says.

    The last few are kept, so that the runs of a matrix which share their data make it once. Raises UserError when there
    is neither a language nor a prepared corpus.
    """
    if data.language is not None:
        if n is None:
            n = data.language.train_sequences if split == "train" else data.language.val_sequences
        return sample(data.language, first_id, n, split=split, device=device)
    from attn_clustering.data import corpus

    whole = corpus.load(_corpus_folder(data), split=split)
    rows = slice(first_id, None if n is None else first_id + n)
    return Sequences(whole.tokens_NT[rows], whole.topics_NT[rows], whole.dominant_N[rows]).to(device)


def vocabulary(data: DataConfig) -> int:
    """The number of tokens of a language or a prepared corpus."""
    if data.language is not None:
        return data.language.vocab
    from attn_clustering.data import corpus

    return int(corpus.describe(_corpus_folder(data))["vocab"])


def _corpus_folder(data: DataConfig) -> Path:
    if data.corpus is None:
        raise UserError("the run has no data: set data.language or data.corpus")
    return Path(data.corpus)


def parent_folder(config: RunConfig, folder: Path) -> Path:
    """The folder of the trained run that the recalibration in `folder` starts from."""
    if config.recal is None or not config.recal.parent:
        raise UserError(f"{folder} is no recalibration of another run")
    return (folder / config.recal.parent).resolve()


def training_data(config: RunConfig, device: str, folder: Path = Path()) -> tuple[Sequences, Plan]:
    """The sequences that the run in `folder` trains on, and in which order.

    Phase 1 (rope, nope): the training sequences in the condition's order; homogeneous_blocks has single-topic sequences
    of the same language. Phase 2: a shuffled stream that depends on data and seed alone, of sequences never trained on
    if the data are fresh; or, as in the first run, the beginning of phase 1's own order, which its plan.npz tells.

    Raises UserError where phase 1 is shorter than what is asked of its order, or left no plan.
    """
    data, optim = config.data, config.optim
    own = data
    if data.language is not None and config.ordering == "homogeneous_blocks":
        own = replace(data, language=homogeneous(data.language))
    if config.recal is None:
        sequences = load_sequences(own, "train", device)
        return sequences, plan(
            config.ordering,
            sequences.dominant_N,
            steps=optim.steps,
            batch=optim.batch,
            seed=config.seed,
            epochs=data.mode,
            cooldown=data.cooldown,
            partial=data.partial,
        )
    if config.recal.order == "own":
        sequences = load_sequences(own, "train", device)
        return sequences, beginning(Plan.load(parent_folder(config, folder) / "plan.npz"), optim.steps, len(sequences))
    if data.mode == "fresh" and data.language is not None:
        trained_on = data.language.train_sequences
        sequences = load_sequences(data, "train", device, trained_on, optim.steps * optim.batch)
    else:
        sequences = load_sequences(data, "train", device)
    return sequences, plan(
        "shuffled", sequences.dominant_N, steps=optim.steps, batch=optim.batch, seed=config.seed + RECALIBRATION
    )


def load_run(folder: str | Path, device: torch.device | str = "cpu") -> tuple[Transformer, RunConfig]:
    """A finished run's model, in evaluation mode, and its configuration; without positions after DroPE.

    Raises UserError when the folder is no finished run.
    """
    config, weights = finished_run(folder, RunConfig, "attn-clustering")
    model = Transformer(config.model)
    load_weights(weights, model)
    model.rope_on = config.model.rope and config.phase != "drope"
    return model.to(device).eval(), config


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary a finished run left in DONE.json. Raises UserError when it has not finished, or that is damaged."""
    if not (folder / "DONE.json").is_file():
        raise UserError(
            f"{folder} holds no finished run (no DONE.json): finish it with `attn-clustering train --resume`"
        )
    summary: dict[str, Any] = read_object(
        folder / "DONE.json",
        f"delete it, and `attn-clustering train --resume {folder}` trains the run again",
        "summary",
    )["summary"]
    return summary
