"""Sequences of a micro-language: pure functions of (config, split, sequence id), the same on every device.

Suffix legend: N sequences, T positions, K topics, R regular tokens.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from statistics import median, quantiles
from typing import Any, Literal

import torch
from lab_shared.bench import measure
from torch import Tensor

from attn_clustering.data import counter, dirichlet, permutation, segments
from attn_clustering.data.settings import LANGUAGES, SPECIALS, LanguageConfig

Split = Literal["train", "val"]
_SEQUENCES = 1  # word of the keys of this module
_CHUNK = {"cpu": 8_000, "cuda": 65_536}  # sequences sampled together: what caches and memory like best


@dataclass(frozen=True)
class Sequences:
    """Tokens with the topic of every position."""

    tokens_NT: Tensor  # int32
    topics_NT: Tensor  # uint8
    dominant_N: Tensor  # uint8, the most frequent topic of each sequence, ties to the lower

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def to(self, device: torch.device | str) -> Sequences:
        return Sequences(*(x.to(device) for x in vars(self).values()))


def homogeneous(config: LanguageConfig) -> LanguageConfig:
    """The same language with single-topic sequences."""
    return replace(config, segments=(1, 1))


def sample(
    config: LanguageConfig,
    first_id: int,
    n: int,
    *,
    split: Split = "train",
    device: torch.device | str = "cpu",
) -> Sequences:
    """The sequences first_id .. first_id + n - 1 of a split.

    A sequence depends on (config, split, its id) alone: not on n, on the device or on what was sampled before. Ids are
    unlimited (fresh data are ids never used before). The tables of the last language used stay in memory.
    """
    tables = language_tables(config, device)
    tokens_NT = torch.empty(n, config.seq_len, dtype=torch.int32, device=device)
    topics_NT = torch.empty(n, config.seq_len, dtype=torch.uint8, device=device)
    dominant_N = torch.empty(n, dtype=torch.uint8, device=device)

    def fill(part: slice) -> None:
        drawn = _draw(config, first_id, part, split, device)
        topics_NT[part] = drawn.labels_NT(config.seq_len)
        labels_TN = topics_NT[part].T.contiguous()
        if isinstance(tables, permutation.Tables):
            tokens_TN = permutation.walk(config, tables, drawn.draws_N, labels_TN)
        else:
            tokens_TN = dirichlet.walk(config, tables, drawn.draws_N, labels_TN)
        torch.add(tokens_TN.T, SPECIALS, out=tokens_NT[part])
        dominant_N[part] = drawn.dominant_N(config.topics)

    chunks = _chunks(n, device)
    if torch.device(device).type != "cpu" or len(chunks) == 1:
        for part in chunks:
            fill(part)
    else:  # a walk is a row of operations too small for torch to share out: whole chunks run side by side
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, chunks))  # list: raise what a worker raised
    return Sequences(tokens_NT, topics_NT, dominant_N)


def labels(
    config: LanguageConfig,
    first_id: int,
    n: int,
    *,
    split: Split = "train",
    device: torch.device | str = "cpu",
) -> Tensor:
    """`sample(...).topics_NT` without sampling tokens."""
    parts = [_draw(config, first_id, part, split, device).labels_NT(config.seq_len) for part in _chunks(n, device)]
    return torch.cat(parts) if parts else torch.empty(0, config.seq_len, dtype=torch.uint8, device=device)


def emissions(config: LanguageConfig, tokens_NT: Tensor) -> Tensor:
    """Probability of every token under every topic given the token before it, float64 (N, T, K)."""
    tables = language_tables(config, tokens_NT.device)
    x_NT = tokens_NT.long() - SPECIALS
    first_NK = first_probabilities(config, tokens_NT.device)[:, x_NT[:, 0]].T
    if isinstance(tables, permutation.Tables):
        rest_NTK = permutation.probabilities(config, tables, x_NT[:, :-1], x_NT[:, 1:])
    else:
        rest_NTK = dirichlet.probabilities(config, tables, x_NT[:, :-1], x_NT[:, 1:])
    return torch.cat([first_NK[:, None], rest_NTK], dim=1)


def first_probabilities(config: LanguageConfig, device: torch.device | str = "cpu") -> Tensor:
    """P_k(first token of a sequence) for every topic, float64 (K, R)."""
    tables = language_tables(config, device)
    return unigrams(config).to(device) if isinstance(tables, permutation.Tables) else tables.first_KR


def row_entropies(config: LanguageConfig, device: torch.device | str = "cpu") -> Tensor:
    """H(next | prev, topic) in nats for every topic and previous token, float64 (K, R)."""
    tables = language_tables(config, device)
    if isinstance(tables, permutation.Tables):
        return permutation.row_entropies(config, tables)
    return tables.entropy_KR


def unigrams(config: LanguageConfig) -> Tensor:
    """The token distribution of each topic as a unigram model knows it, float64 (K, R)."""
    return permutation.unigrams(config) if config.kind == "permutation" else dirichlet.unigrams(config)


def language_tables(config: LanguageConfig, device: torch.device | str) -> permutation.Tables | dirichlet.Tables:
    """The transition tables; those of the last language and device are kept."""
    # Fields that do not change the language must not make a second copy of its tables.
    plain = replace(config, seq_len=1, segments=(1, 1), min_segment=1, train_sequences=1, val_sequences=1)
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:  # "cuda" and "cuda:0" must not make two copies either
        device = torch.device("cuda", torch.cuda.current_device())
    return _build(plain, str(device))


@lru_cache(maxsize=1)
def _build(config: LanguageConfig, device: str) -> permutation.Tables | dirichlet.Tables:
    return permutation.build(config, device) if config.kind == "permutation" else dirichlet.build(config, device)


def _draw(
    config: LanguageConfig, first_id: int, part: slice, split: Split, device: torch.device | str
) -> segments.Segments:
    stream = counter.key(config.seed, _SEQUENCES, ("train", "val").index(split))
    return segments.draw(config.law, stream, torch.arange(first_id + part.start, first_id + part.stop, device=device))


def _chunks(n: int, device: torch.device | str) -> list[slice]:
    size = _CHUNK.get(torch.device(device).type, _CHUNK["cpu"])
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def bench_languages(device: str, *, n: int | None = None) -> list[dict[str, Any]]:
    """Sampling speed of both languages at the sizes of the experiments, for `attn-clustering bench`.

    Rows {"stage", "tokens_per_s" (median, tables at hand), "quartiles", "repeats", "required", "tokens_per_cpu_s",
    "tables_s", "total_s" (tables and n sequences, once), "sequences"}; n is 110,000 on a GPU and 16,000 on a CPU.
    """
    on_gpu = torch.device(device).type == "cuda"
    n = n or (110_000 if on_gpu else 16_000)
    rows = []
    for name, required in (("controlled-v1", None if on_gpu else 20e6), ("faithful-v1", None if on_gpu else 1e6)):
        config = LANGUAGES[name]
        _build.cache_clear()
        tables = measure(partial(language_tables, config, device), repeats=1, warmup=0, device=device)["median_s"]
        draw, seconds, cpu = partial(sample, config, 0, n, device=device), [], []
        for _ in range(4):
            begin = time.process_time()
            seconds.append(measure(draw, repeats=1, warmup=0, device=device)["median_s"])
            cpu.append(time.process_time() - begin)
        low, middle, high = quantiles([n * config.seq_len / s for s in seconds[1:]], n=4)
        rows.append(
            {
                "stage": f"sample {name} ({config.kind})",
                "tokens_per_s": middle,
                "quartiles": [low, high],
                "repeats": 3,
                "required": required,
                "tokens_per_cpu_s": None if on_gpu else n * config.seq_len / median(cpu[1:]),
                "tables_s": tables,
                "total_s": tables + seconds[0],
                "sequences": n,
            }
        )
    return rows
