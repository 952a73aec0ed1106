"""Reference levels of a language: what each kind of ideal reader reaches, so that a loss or a probe can be placed.

Losses are nats per predicted token: positions 1..T-1 of a sequence, as a model is scored that reads a sequence without
a beginning-of-sequence token. Accuracies are over all positions, beliefs including the token there. Levels that need
sequences are means over validation sequences with a standard error over sequences; where a model-based expectation is
known, it replaces the sampled value (a control variate), so that few sequences suffice.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lab_shared.files import atomic_write
from torch import Tensor

from attn_clustering.data.filters import Filtered, bayes_filter, filter_topics, unigram_filter
from attn_clustering.data.languages import (
    Sequences,
    emissions,
    labels,
    row_entropies,
    sample,
    unigrams,
)
from attn_clustering.data.settings import LANGUAGES, SPECIALS, DataConfigError, LanguageConfig, SegmentLaw
from attn_clustering.folders import read_object

FLOORS = "bayes_floor_by_seed"
WANTED = ("ln_vocab", "unigram_filter", "bayes_floor")
"""Levels that reports draw."""


@dataclass(frozen=True)
class Level:
    """A reference value and its Monte Carlo standard error (0 when it is exact)."""

    value: float
    se: float = 0.0


@dataclass(frozen=True)
class Levels:
    """Levels of one configuration. Losses in nats, accuracies and ratios as fractions."""

    config: LanguageConfig
    sequences: int
    """Validation sequences behind the sampled levels."""
    ln_vocab: Level
    """ln V: knows nothing."""
    unigram: Level
    """Knows how often each token occurs."""
    unigram_filter: Level
    """Knows each topic's unigram and infers the topic; no transitions."""
    unigram_known_topic: Level
    """Is told the topic and knows its unigram."""
    bayes_floor: Level
    """Knows every transition matrix and infers the topic: no model is better."""
    known_topic: Level
    """Is told the topic and knows its matrix: H(next | previous, topic)."""
    unigram_filter_with_first: Level
    """unigram_filter over all T positions, the first token included."""
    bayes_floor_with_first: Level
    """bayes_floor over all T positions, the first token included."""
    chance_accuracy: Level
    """Topic probe that sees nothing: 1 / K."""
    one_token_accuracy: Level
    """Topic probe that sees the current token only: the floor of a probe."""
    unigram_filter_accuracy: Level
    """Topic probe that sees all tokens so far as a bag of words."""
    bigram_filter_accuracy: Level
    """Topic probe with everything a causal reader can know: the ceiling of a probe."""
    within_ratio_chance: Level
    """Same-topic share of uniform causal attention, the position itself included; mean over queries."""
    within_ratio_legacy_chance: Level
    """The first run's metric on uniform attention without a causal mask: a ratio of means over keys <= query."""
    max_entropy_causal: Level
    """Mean over positions of ln(t + 1): the largest mean attention entropy a causal head can have."""
    max_entropy_noncausal: Level
    """ln T."""

    def to_json(self) -> str:
        """Indented JSON; every level as {"value", "se"}."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def table(self) -> str:
        """Two columns for the console."""
        found = {name: level for name, level in vars(self).items() if isinstance(level, Level)}
        return _table(found, f"simulated language, {self.sequences:,} sequences")


def levels(config: LanguageConfig, *, n_sequences: int = 512, device: str | torch.device = "cpu") -> Levels:
    """All reference levels of a language from `n_sequences` validation sequences (and exact sums where they exist).

    With 512 sequences of the first run's language the standard errors of losses are below 0.003 nats.
    """
    if n_sequences < 2:
        raise DataConfigError(f"n_sequences={n_sequences}: a standard error needs at least 2")
    data = sample(config, 0, n_sequences, split="val", device=device)
    truth_NT = data.topics_NT.long()
    unigram_KR = unigrams(config).to(device)
    known_NP, expected_NP = _known_topic(config, data)
    bayes = bayes_filter(config, data.tokens_NT)
    floor_NP = _floor(bayes, known_NP, expected_NP)
    # Attention to labels needs no tokens, and its spread over sequences is wide: take many.
    more_NT = labels(config, 0, max(n_sequences, 16_384), split="val", device=device)

    def accuracy(posterior_NTK: Tensor) -> Level:
        return _over_sequences((posterior_NTK.argmax(dim=2) == truth_NT).double())

    if (unigram_KR == unigram_KR[0]).all():  # a bag of words says nothing
        bag_loss = bag_loss_first = Level(_entropy(unigram_KR[0]))
        bag_accuracy = Level(1.0 / config.topics)
    else:
        bag = unigram_filter(config, data.tokens_NT)
        bag_loss, bag_loss_first = _over_sequences(bag.loss_NT[:, 1:]), _over_sequences(bag.loss_NT)
        bag_accuracy = accuracy(bag.posterior_NTK)
    return Levels(
        config=config,
        sequences=n_sequences,
        ln_vocab=Level(math.log(config.vocab)),
        unigram=Level(_entropy(unigram_KR.mean(dim=0))),
        unigram_filter=bag_loss,
        unigram_known_topic=Level(_entropy(unigram_KR) / config.topics),
        bayes_floor=_over_sequences(floor_NP),
        known_topic=_over_sequences(expected_NP),
        unigram_filter_with_first=bag_loss_first,
        bayes_floor_with_first=_over_sequences(torch.cat([bayes.loss_NT[:, :1], floor_NP], dim=1)),
        chance_accuracy=Level(1.0 / config.topics),
        one_token_accuracy=Level(float(unigram_KR.max(dim=0).values.sum()) / config.topics),
        unigram_filter_accuracy=bag_accuracy,
        bigram_filter_accuracy=accuracy(bayes.posterior_NTK),
        **_attention_levels(more_NT, config.topics),
    )


def bayes_floor(config: LanguageConfig, *, n_sequences: int = 512, device: str | torch.device = "cpu") -> Level:
    """`levels(...).bayes_floor` alone, for less work."""
    data = sample(config, 0, n_sequences, split="val", device=device)
    return _over_sequences(_floor(bayes_filter(config, data.tokens_NT), *_known_topic(config, data)))


def kept_levels(file: Path, language: LanguageConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """`levels` of the first seed's language by name, and under FLOORS the Bayes floor of every seed's: FILE, which is
    made or completed. A seed has a language of its own, and small ones differ in their floor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if file.is_file():
        found = read_object(file, "delete it, and it is made again", *WANTED)
    else:
        found = json.loads(levels(replace(language, seed=seeds[0]), device=device).to_json())
        found[FLOORS] = {str(seeds[0]): found["bayes_floor"]["value"]}
    floors = found.setdefault(FLOORS, {})
    missing = [seed for seed in sorted(set(seeds)) if str(seed) not in floors]
    for seed in missing:
        floors[str(seed)] = bayes_floor(replace(language, seed=seed), device=device).value
    if missing or not file.is_file():
        atomic_write(file, json.dumps(found, indent=2) + "\n")
    return found


def corpus_levels(folder: Path, *, n_sequences: int = 256) -> dict[str, Level]:
    """What can be said about a prepared text corpus, by the names of `Levels`: no transition matrices, so no floor.

    Unigrams are counted on the training sequences (one added to each count) and scored on the first `n_sequences`
    held-out ones. Raises UserError when the folder was not prepared, or holds out a single sequence.
    """
    from attn_clustering.data import corpus

    facts = corpus.describe(folder)
    vocab, n_topics = facts["vocab"], len(facts["names"])
    law = SegmentLaw(facts["seq_len"], n_topics, tuple(facts["segments"]), facts["min_segment"])
    train, val = corpus.load(folder, "train"), corpus.load(folder, "val")
    if len(val) < 2:
        raise DataConfigError(f"{folder} holds out {len(val)} sequence: a standard error needs at least 2")
    tokens_NT, truth_NT = val.tokens_NT[:n_sequences].long(), val.topics_NT[:n_sequences].long()
    pairs = train.topics_NT.flatten().long() * vocab + train.tokens_NT.flatten()
    counts_KV = torch.bincount(pairs, minlength=n_topics * vocab).view(n_topics, vocab).double() + 1
    unigram_KV = counts_KV / counts_KV.sum(dim=1, keepdim=True)
    all_V = counts_KV.sum(dim=0) / counts_KV.sum()
    emission_NTK = unigram_KV[:, tokens_NT].permute(1, 2, 0)
    bag = filter_topics(law, emission_NTK)
    known_NT = -emission_NTK.gather(2, truth_NT[..., None])[..., 0].log()
    return {
        "ln_vocab": Level(math.log(vocab)),
        "unigram": _over_sequences(-all_V[tokens_NT[:, 1:]].log()),
        "unigram_filter": _over_sequences(bag.loss_NT[:, 1:]),
        "unigram_known_topic": _over_sequences(known_NT[:, 1:]),
        "chance_accuracy": Level(1.0 / n_topics),
        "one_token_accuracy": _over_sequences((emission_NTK.argmax(dim=2) == truth_NT).double()),
        "unigram_filter_accuracy": _over_sequences((bag.posterior_NTK.argmax(dim=2) == truth_NT).double()),
        **_attention_levels(val.topics_NT, n_topics),
    }


def _attention_levels(topics_NT: Tensor, topics: int) -> dict[str, Level]:
    """What uniform attention scores on these labels, and the largest entropies."""
    seq_len = topics_NT.shape[1]
    position_T = torch.arange(1, seq_len + 1, dtype=torch.float64, device=topics_NT.device)
    same_NT = torch.cat([_same_topic_keys(part, topics) for part in topics_NT.split(1024)])
    return {
        "within_ratio_chance": _over_sequences(same_NT / position_T),
        "within_ratio_legacy_chance": Level(float(same_NT.sum() / (len(same_NT) * position_T.sum()))),
        "max_entropy_causal": Level(float(position_T.log().mean())),
        "max_entropy_noncausal": Level(math.log(seq_len)),
    }


def _floor(bayes: Filtered, known_NP: Tensor, expected_NP: Tensor) -> Tensor:
    """The ideal reader's loss of each predicted token, (N, T - 1).

    E[known - expected] = 0: what remains is the price of inferring the topic, which varies little.
    """
    return bayes.loss_NT[:, 1:] - known_NP + expected_NP


def _known_topic(config: LanguageConfig, data: Sequences) -> tuple[Tensor, Tensor]:
    """For a reader who is told the topics: the loss of each predicted token and its expectation given the token before;
    both (N, T - 1)."""
    truth_NP = data.topics_NT[:, 1:].long()
    p_NPK = emissions(config, data.tokens_NT)[:, 1:]
    entropy_KR = row_entropies(config, data.tokens_NT.device)
    return (
        -p_NPK.gather(2, truth_NP[..., None])[..., 0].log(),
        entropy_KR[truth_NP, data.tokens_NT[:, :-1].long() - SPECIALS],
    )


def _same_topic_keys(topics_NT: Tensor, topics: int) -> Tensor:
    """How many keys at or before each query share its topic, float64 (N, T)."""
    one_hot_NTK = torch.nn.functional.one_hot(topics_NT.long(), topics)
    return one_hot_NTK.cumsum(dim=1).gather(2, topics_NT.long()[..., None])[..., 0].double()


def _entropy(p: Tensor) -> float:
    """Summed over all rows of p, nats."""
    return float(torch.special.entr(p).sum())


def _over_sequences(x_NT: Tensor) -> Level:
    """Mean, and its standard error from the spread of the sequences' means."""
    mean_N = x_NT.mean(dim=1)
    return Level(float(mean_N.mean()), float(mean_N.std() / math.sqrt(len(mean_N))))


def main(name: str, *, as_json: bool = False, n_sequences: int = 512) -> str:
    """The levels of a named language, or of a prepared corpus folder, as text for the command line.

    Raises DataConfigError for a name that is neither.
    """
    if name in LANGUAGES:
        result = levels(LANGUAGES[name], n_sequences=n_sequences)
        return result.to_json() if as_json else result.table()
    if Path(name).is_dir():
        found = corpus_levels(Path(name), n_sequences=n_sequences)
        if as_json:
            return json.dumps({key: asdict(level) for key, level in found.items()}, indent=2, allow_nan=False) + "\n"
        return _table(found, f"text corpus {name}")
    close = difflib.get_close_matches(name, LANGUAGES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise DataConfigError(
        f"no language {name!r}{hint}, and no folder of a corpus; the languages are {', '.join(LANGUAGES)}"
    )


def _table(found: dict[str, Level], what: str) -> str:
    lines = [
        f"{name:28} {level.value:8.4f}" + (f" +- {level.se:.4f}" if level.se else "") for name, level in found.items()
    ]
    return "\n".join([f"{'level':28} {'value':>8}  ({what}; losses and entropies in nats)", *lines])
