"""Everything that is measured on one trained model: attention, heads, probes, circuits, ablations.

The model computes in float32 here. Held-out sequences only.

Shape suffixes: N sequences, T tokens, P probed positions, G probed places, K topics.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lab_shared.stats import bca_interval
from torch import Tensor

from attn_clustering.analysis import ablation, circuits, heads, legacy, passes, probes, recurrence
from attn_clustering.config import RunConfig
from attn_clustering.data.filters import bayes_filter
from attn_clustering.model import Transformer, next_token_targets
from attn_clustering.runs import load_sequences


@dataclass(frozen=True)
class AnalysisConfig:
    """How much is looked at."""

    probe_sequences: int = 1280
    """For the probes, split 70 / 10 / 20."""
    probe_every: int = 8
    """Every n-th position is probed."""
    attention_sequences: int = 256
    """For attention statistics, and as many of the probes' test sequences for ablations."""
    pairs: int = 128
    """A-B-A-C probing pairs."""
    repeated: int = 64
    """Repeated random sequences."""
    ablated: float = 0.125
    """Fraction of the heads that are ablated."""
    seed: int = 0

    def fitted(self, held_out: int) -> AnalysisConfig:
        """The same for that many held-out sequences: a small data set has a quick analysis."""
        return replace(
            self,
            probe_sequences=min(self.probe_sequences, held_out),
            attention_sequences=min(self.attention_sequences, max(10, held_out // 4)),
            pairs=min(self.pairs, max(8, held_out // 16)),
            repeated=min(self.repeated, max(4, held_out // 32)),
        )


@torch.no_grad()
def analyse(
    model: Transformer,
    config: RunConfig,
    summary: dict[str, Any],
    settings: AnalysisConfig,
    transfer: Path | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Tensor]]:
    """The result for analysis.json, the arrays and the probes. transfer: probes of the parent run, to try here."""
    where, clock = next(model.parameters()).device, _Clock(next(model.parameters()).device)
    held_out = load_sequences(config.data, "val", str(where))
    topics_NT, tokens_NT = held_out.topics_NT.long(), held_out.tokens_NT
    n_topics = config.data.language.topics if config.data.language else int(topics_NT.max()) + 1
    settings = settings.fitted(len(tokens_NT))
    few = slice(0, settings.attention_sequences)

    arrays = passes.attention_pass(model, tokens_NT[few], topics_NT[few], n_topics)
    clock.lap("attention")
    random_NT = heads.repeated_random(tokens_NT, tokens_NT.size(1) // 2, settings.repeated, settings.seed)
    arrays |= passes.head_kinds_pass(model, random_NT)
    pairs = _pairs(config, tokens_NT, topics_NT, settings)
    if pairs is not None:
        arrays |= passes.recurrence_pass(model, pairs)
    clock.lap("heads")
    result, found, positions = _probe(model, config, tokens_NT, topics_NT, n_topics, settings, transfer, arrays)
    clock.lap("probes")
    lags = config.data.language.seq_len if config.data.language else tokens_NT.size(1)
    arrays |= circuits.circuit_statistics(model, found.weight_GDK, lags if model.rope_on else 0)
    clock.lap("circuits")
    n_heads = max(1, round(settings.ablated * arrays["excess_lag"].numel()))
    unseen = probes.split_sequences(settings.probe_sequences).test
    tokens, topics = (x[unseen][: settings.attention_sequences] for x in (tokens_NT.long(), topics_NT))
    parts = [
        (tokens[rows], next_token_targets(tokens[rows]), topics[rows]) for rows in passes.batches(model, *tokens.shape)
    ]
    last = found.weight_GDK[-1], found.bias_GK[-1]
    clustering_LH = arrays["excess_lag"].nan_to_num(0.0)
    lost = ablation.ablate(model, parts, clustering_LH, *last, positions, n_heads, seed=settings.seed)
    clock.lap("ablation")

    shown = _example(topics_NT)
    arrays["example_pattern"] = passes.example_patterns(model, tokens_NT[shown])
    block = -(-topics_NT.size(1) // passes.SHOWN)
    arrays["example_topics"] = topics_NT[shown, block // 2 :: block][: arrays["example_pattern"].size(-1)].cpu()

    legacy_names = [name for name in arrays if name.startswith("legacy_")]
    result = {
        "run": {
            "name": config.name,
            "experiment": config.experiment,
            "attention": config.attention,
            "ordering": config.ordering,
            "seed": config.seed,
            "phase": config.phase,
            "recal": config.recal.name if config.recal else None,
            "data": data_label(config),
            "layers": config.model.layers,
            "heads": config.model.heads,
        },
        "training": summary,
        "probe": result,
        "attention": {
            name: mean
            for name in ("entropy", "entropy_ratio", "self_mass", "lag1_mass", "far_mass", "within", "excess_uniform")
            + ("excess_lag", "specialisation", "recurrence", *heads.KINDS, "chance_uniform", "mass_above_diagonal")
            if name in arrays and (mean := over_heads(arrays[name])) is not None
        }
        | {"most_clustering_head": float(clustering_LH.max())},
        "legacy": {name: float(arrays[name].mean()) for name in legacy_names},
        "legacy_chance": legacy.legacy_chance(topics_NT),
        "ablation": lost,
        "seconds": clock.seconds,
    }
    weights = {"weight": found.weight_GDK.cpu().contiguous(), "bias": found.bias_GK.cpu().contiguous()}
    return result, {name: x.numpy() for name, x in arrays.items()}, weights


def _probe(
    model: Transformer,
    config: RunConfig,
    tokens_NT: Tensor,
    topics_NT: Tensor,
    n_topics: int,
    settings: AnalysisConfig,
    transfer: Path | None,
    arrays: dict[str, Tensor],
) -> tuple[dict[str, Any], probes.ProbeResult, Tensor]:
    """Per-place accuracies with their baselines; adds the boundary response to `arrays`."""
    some = slice(0, settings.probe_sequences)
    tokens_NT, topics_NT = tokens_NT[some], topics_NT[some]
    every = settings.probe_every
    positions = torch.arange(every - 1, tokens_NT.size(1), every, device=tokens_NT.device)
    features_GNPD = passes.residuals(model, tokens_NT, positions)
    topics_NP = topics_NT[:, positions]
    found = probes.train_probes(features_GNPD, topics_NP, n_topics, settings.seed)
    test = probes.split_sequences(len(tokens_NT)).test
    token_NP = probes.token_baseline(tokens_NT, topics_NT, model.config.vocab, n_topics, positions)
    columns = [found.correct_SPG, token_NP[..., None]]
    if config.data.language is not None:
        posterior_NTK = bayes_filter(config.data.language, tokens_NT[test]).posterior_NTK
        bayes_NP = posterior_NTK[:, positions].argmax(-1) == topics_NP[test]
        columns.append(bayes_NP[..., None])
    correct_NPG = torch.cat(columns, -1)
    distance_NP = probes.distance_from_change(topics_NT[test])[:, positions]
    arrays["boundary_accuracy"], arrays["boundary_count"] = (
        x.cpu() for x in probes.boundary_response(correct_NPG, distance_NP)
    )
    by_sequence = correct_NPG.double().mean(1).cpu().numpy()
    arrays["probe_by_sequence"] = torch.from_numpy(by_sequence).float()
    intervals = [bca_interval(column) if np.ptp(column) else (column[0], column[0]) for column in by_sequence.T]
    accuracy = by_sequence.mean(0).tolist()
    places = model.config.layers + 1
    middle = [accuracy[i] for i in probes.middle_places(model.config.layers)]
    result: dict[str, Any] = {
        "accuracy": accuracy[:places],
        "low": [float(low) for low, _ in intervals[:places]],
        "high": [float(high) for _, high in intervals[:places]],
        "permuted": found.permuted_accuracy_G.tolist(),
        "l2": found.l2_G.tolist(),
        "token": accuracy[places],
        "bayes": accuracy[places + 1] if config.data.language else None,
        "middle": float(np.mean(middle)),
        "middle_places": list(probes.middle_places(model.config.layers)),
        "test_sequences": len(by_sequence),
        "iterations": found.iterations,
        "gradient": found.gradient,
    }
    if transfer is not None:
        import safetensors.torch

        theirs = safetensors.torch.load_file(transfer, device=str(tokens_NT.device))
        moved = probes.probe_correct(features_GNPD[:, test], theirs["weight"], theirs["bias"], topics_NP[test])
        result["transfer"] = moved.float().mean((0, 1)).tolist()
    return result, found, positions


def over_heads(values_LH: Tensor) -> float | None:
    """The mean over heads that have a value; None when none has. A head that looks at nothing but itself and the token
    before has no within-topic share (NaN)."""
    known = values_LH[~values_LH.isnan()]
    return float(known.mean()) if known.numel() else None


def data_label(config: RunConfig) -> str:
    """What the numbers were measured on, for captions."""
    language = config.data.language
    if language is None:
        return f"text corpus {Path(config.data.corpus or '').name}"
    return f"generated {language.kind} language, {language.topics} topics, {language.vocab} tokens"


def _pairs(
    config: RunConfig, tokens_NT: Tensor, topics_NT: Tensor, settings: AnalysisConfig
) -> recurrence.ProbePairs | None:
    """Probing pairs with segments of a quarter of the length; None if the data have only two topics."""
    if len(topics_NT.unique()) < 3:
        return None
    shortest = config.data.language.min_segment if config.data.language else 64
    segment = min(shortest, tokens_NT.size(1) // 4)
    return recurrence.probe_pairs(tokens_NT, topics_NT, segment, settings.pairs, settings.seed)


def _example(topics_NT: Tensor) -> int:
    """The first held-out sequence in which the topic changes at least twice (else the first)."""
    changes_N = (topics_NT[:, 1:] != topics_NT[:, :-1]).sum(1)
    return int((changes_N >= 2).int().argmax())


class _Clock:
    """Seconds between laps, for the record."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, {}
        self._last = time.perf_counter()

    seconds: dict[str, float]

    def lap(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 3), now
