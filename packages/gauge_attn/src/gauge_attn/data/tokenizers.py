"""Text to numbers and back: bytes, whitespace-separated words, or byte pairs learnt from the training text."""

from __future__ import annotations

import heapq
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lab_shared.errors import UserError

Kind = Literal["byte", "bpe", "word"]
UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
_CHUNK = re.compile(r" ?\S+|\s")  # no merge crosses a blank, so that a chunk's encoding can be remembered


class Tokenizer:
    """One of three ways to cut text.

    kind: "byte" (UTF-8, 256 symbols), "word" (split at white space; the end of a line is <eos>, words outside the
    vocabulary are <unk>) or "bpe" (byte pairs). symbols: the words, or for bpe the pairs of symbol numbers in the
    order of their merging. vocab: number of symbols.
    """

    def __init__(self, kind: Kind, symbols: Iterable[Any] = ()) -> None:
        self.kind = kind
        self._words: list[str] = []
        self._merges: list[tuple[int, int]] = []
        if kind == "word":
            self._words = list(symbols)
            self._number = {word: i for i, word in enumerate(self._words)}
            self.vocab = len(self._words)
            return
        self._merges = [(a, b) for a, b in symbols]
        self._bytes = [bytes([i]) for i in range(256)]
        for a, b in self._merges:
            self._bytes.append(self._bytes[a] + self._bytes[b])
        self._rank = {pair: i for i, pair in enumerate(self._merges)}
        self._cache: dict[str, list[int]] = {}
        self.vocab = len(self._bytes)

    def encode(self, text: str) -> np.ndarray:
        """Symbols (T,) int32 of `text`."""
        if self.kind == "byte":
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        if self.kind == "word":
            unknown = self._number[UNKNOWN]
            return np.fromiter((self._number.get(w, unknown) for w in _words(text)), np.int32)
        return np.fromiter((s for chunk in _CHUNK.findall(text) for s in self._encode_chunk(chunk)), np.int32)

    def decode(self, symbols: Iterable[int]) -> str:
        """The text of `symbols`; words are joined by blanks, bytes that are no UTF-8 become U+FFFD."""
        if self.kind == "word":
            return " ".join(self._words[s] for s in symbols).replace(f" {END_OF_LINE} ", "\n")
        return b"".join(self._bytes[s] for s in symbols).decode(errors="replace")

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "symbols": self._words or self._merges}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """What `to_json` wrote. Raises UserError for anything else."""
        try:
            data = json.loads(text)
            kind, symbols = data["kind"], data["symbols"]
            if kind == "word":
                good = all(type(word) is str for word in symbols) and {UNKNOWN, END_OF_LINE} <= set(symbols)
                good = good and len(set(symbols)) == len(symbols)
            elif kind == "bpe":  # a pair can only join symbols that are there before it
                good = all(type(s) is int and 0 <= s < 256 + i for i, (a, b) in enumerate(symbols) for s in (a, b))
            else:
                good = kind == "byte" and symbols == []
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"this is no tokenizer of gauge-attn: {error}") from error
        if not good:
            raise UserError(f"this is no tokenizer of gauge-attn: the symbols are none of kind {kind!r:.40}")
        return cls(kind, symbols)

    @classmethod
    def read(cls, path: Path) -> Tokenizer:
        """The tokenizer in a file. Raises UserError."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"there is no {path}, which `gauge-attn train` wrote: copy the whole run folder") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from error

    def _encode_chunk(self, chunk: str) -> list[int]:
        known = self._cache.get(chunk)
        if known is None:
            known = list(chunk.encode())
            while len(known) > 1:
                rank, at = min((self._rank.get(p, len(self._rank)), i) for i, p in enumerate(_neighbours(known)))
                if rank == len(self._rank):
                    break
                known[at : at + 2] = [256 + rank]
            self._cache[chunk] = known
        return known


def train_tokenizer(kind: Kind, text: str, vocab: int) -> Tokenizer:
    """Learn the symbols from `text`. Raises UserError when it cannot fill bpe's `vocab`, or `vocab` is too small."""
    if kind == "byte":
        return Tokenizer("byte")
    if kind == "word":
        if vocab < 3:
            raise UserError(f"vocab={vocab}: words need at least 3 symbols, two of which are <unk> and <eos>")
        counts = Counter(_words(text))
        frequent = sorted((w for w in counts if w not in (UNKNOWN, END_OF_LINE)), key=lambda w: (-counts[w], w))
        return Tokenizer("word", [UNKNOWN, END_OF_LINE, *frequent[: vocab - 2]])
    if vocab < 256:
        raise UserError(f"vocab={vocab}: bpe starts from the 256 bytes, so it needs at least that many symbols")
    return Tokenizer("bpe", _learn_merges(text, vocab - 256))


def _words(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield from line.split()
        yield END_OF_LINE


def _neighbours(symbols: list[int]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(symbols)


def _learn_merges(text: str, n: int) -> list[tuple[int, int]]:
    """The n most frequent pairs, each counted after the merges before it; ties go to the smaller pair.

    Only the chunks that hold a pair are looked at when it is merged. The heap's counts may be out of date: an entry
    that is goes back with its true count.
    """
    chunks = Counter(_CHUNK.findall(text))
    symbols = [list(chunk.encode()) for chunk in chunks]
    times = list(chunks.values())
    count: Counter[tuple[int, int]] = Counter()
    where: dict[tuple[int, int], set[int]] = {}
    for i, chunk_symbols in enumerate(symbols):
        for pair in _neighbours(chunk_symbols):
            count[pair] += times[i]
            where.setdefault(pair, set()).add(i)
    heap = [(-c, pair) for pair, c in count.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while len(merges) < n:
        if not heap:
            raise UserError(
                f"the training text has only {256 + len(merges)} byte-pair symbols: ask for a smaller vocab"
            )
        c, pair = heapq.heappop(heap)
        if -c != count[pair]:
            if count[pair] > 0:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        new = 256 + len(merges)
        merges.append(pair)
        changed = set()
        for i in where.pop(pair):
            before = symbols[i]
            after = _merge(before, pair, new)
            for old in _neighbours(before):
                count[old] -= times[i]
            for fresh in _neighbours(after):
                count[fresh] += times[i]
                where.setdefault(fresh, set()).add(i)
                changed.add(fresh)
            symbols[i] = after
        for fresh in changed:
            heapq.heappush(heap, (-count[fresh], fresh))
    return merges


def _merge(symbols: list[int], pair: tuple[int, int], new: int) -> list[int]:
    merged, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged
