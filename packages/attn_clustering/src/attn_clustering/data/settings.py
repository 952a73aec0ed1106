"""What a data set is: the micro-languages and the text corpus. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lab_shared.errors import UserError

PAD, BOS, EOS = 0, 1, 2
SPECIALS = 3
"""Tokens 0..2 are reserved; a language emits the R = vocab - 3 regular tokens 3..vocab-1 only."""


class DataConfigError(UserError):
    """Settings that describe no possible data set; the message names the field and the way out."""


@dataclass(frozen=True)
class SegmentLaw:
    """How topics alternate inside a sequence: what the sampler of segments and the Bayes filter need to know."""

    seq_len: int
    topics: int
    segments: tuple[int, int]
    min_segment: int

    @property
    def max_segments(self) -> int:
        """The largest number that fits; the number of segments is uniform from segments[0] to here."""
        return min(self.segments[1], self.seq_len // self.min_segment)


@dataclass(frozen=True)
class LanguageConfig:
    """A micro-language: each sequence is a row of segments, each segment a Markov chain of its topic.

    The number of segments is uniform on `segments` (at most seq_len // min_segment), their lengths are
    min_segment + multinomial(the rest, equal shares), their topics are independent and uniform. A chain goes on
    from the previous token across a boundary. The label of a position is the topic that emitted its token.
    """

    kind: Literal["permutation", "dirichlet"] = "permutation"
    """permutation: every topic has the same uniform unigram, so only bigrams tell topics apart. dirichlet: dense
    random rows with a boosted token block per topic, which single tokens give away (the first run's language)."""
    vocab: int = 4096
    seq_len: int = 512
    topics: int = 5
    segments: tuple[int, int] = (2, 5)
    """Least and largest number of segments; (1, 1) gives homogeneous, single-topic sequences."""
    min_segment: int = 64
    permutations: int = 32
    """permutation: k, the equally likely successors of a token within a topic."""
    shared: float = 0.75
    """permutation: rho, the fraction of the k permutations that all topics share (0 is the easiest)."""
    concentration: float = 5.0
    """dirichlet: factor on the weights of the topic's own block of tokens. It is not a Dirichlet parameter."""
    signatures: int = 50
    """dirichlet: token pairs per topic whose weight is ten times larger (at most half the block)."""
    train_sequences: int = 100_000
    val_sequences: int = 10_000
    seed: int = 42
    """Fixes the language and its sequences; (seed, split, sequence id) fixes every token."""

    def __post_init__(self) -> None:
        low, high = self.segments
        checks = [
            (self.regular >= 2 * self.topics, f"vocab={self.vocab} is too small for {self.topics} topics"),
            (self.vocab <= 65_536, f"vocab={self.vocab}: tokens are stored in 16 bits, so at most 65536"),
            (2 <= self.topics <= 255, f"topics={self.topics}: between 2 and 255"),
            (1 <= low <= high, f"segments={self.segments}: two numbers, 1 <= least <= largest"),
            (
                self.min_segment >= 1 and low * self.min_segment <= self.seq_len,
                f"min_segment={self.min_segment}: {low} segments of at least that length must fit into "
                f"seq_len={self.seq_len}",
            ),
            (0.0 <= self.shared < 1.0, f"shared={self.shared}: a fraction in [0, 1)"),
            (
                self.kind != "permutation" or self.own_permutations > 0,
                f"shared={self.shared} of permutations={self.permutations} leaves no topic a permutation of its own: "
                "lower shared or raise permutations",
            ),
            (
                self.kind != "dirichlet" or self.block >= 8,
                f"vocab={self.vocab} gives each of {self.topics} topics a block of {self.block} tokens; 8 is the least",
            ),
            (
                self.kind != "dirichlet" or self.topics << 2 * (self.regular - 1).bit_length() < 2**31,
                f"topics={self.topics} times (vocab={self.vocab})^2 transitions do not fit: lower vocab or topics",
            ),
            (1.0 <= self.concentration <= 10_000, f"concentration={self.concentration}: between 1 and 10000"),
            (self.signatures >= 0, f"signatures={self.signatures}: not negative"),
            (min(self.train_sequences, self.val_sequences) >= 1, "train_sequences and val_sequences: at least 1"),
        ]
        for ok, message in checks:
            if not ok:
                raise DataConfigError(message)

    @property
    def regular(self) -> int:
        """R, the number of tokens the language emits."""
        return self.vocab - SPECIALS

    @property
    def block(self) -> int:
        """dirichlet: tokens in each topic's own block, floor(R / K)."""
        return self.regular // self.topics

    @property
    def shared_permutations(self) -> int:
        return round(self.shared * self.permutations)

    @property
    def own_permutations(self) -> int:
        return self.permutations - self.shared_permutations

    @property
    def law(self) -> SegmentLaw:
        return SegmentLaw(self.seq_len, self.topics, self.segments, self.min_segment)


@dataclass(frozen=True)
class CorpusConfig:
    """Real text with topics: what `prepare` reads and what it makes of it."""

    sources: tuple[str, ...] = ()
    """Each one of: FILE.jsonl, FILE.jsonl.gz, FILE.parquet, FILE.txt, a folder of such files, or
    hf:DATASET:CONFIG (streamed from the Hugging Face hub, for example hf:wikimedia/wikipedia:20231101.en)."""
    text_field: str = "text"
    topic_field: str | None = None
    """Field with the topic's name; needed by embedder=given."""
    embedder: Literal["given", "lsa", "sentence-transformers"] = "lsa"
    """Topics by the given labels, or by clustering paragraphs: TF-IDF + SVD, or a sentence-transformers model."""
    embedding_model: str = "all-MiniLM-L6-v2"
    """Name or folder of the sentence-transformers model."""
    clusters: int = 8
    """Number of topics; with given labels the topics with the most words are kept."""
    vocab: int = 16_384
    seq_len: int = 512
    segments: tuple[int, int] = (2, 4)
    min_segment: int = 64
    min_words: int = 50
    """Shorter paragraphs are dropped."""
    max_words: int = 500
    """Longer paragraphs are dropped."""
    max_documents: int | None = None
    """Read at most this many documents of all sources together; None reads all (hf: sources need a number)."""
    val_fraction: float = 0.05
    """Share of the documents held out; chosen by a hash of the document's text before anything else is done."""
    dedup_ngram: int = 50
    """No run of this many tokens occurs both in training and in held-out text."""
    train_sequences: int | None = None
    """Number of sequences; None makes as many as one pass over the tokens gives."""
    val_sequences: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        low, high = self.segments
        checks = [
            (
                self.embedder != "given" or self.topic_field is not None,
                "embedder=given needs topic_field, the name of the field with the topic",
            ),
            (2 <= self.clusters <= 255, f"clusters={self.clusters}: between 2 and 255"),
            (300 <= self.vocab <= 65_536, f"vocab={self.vocab}: byte-level BPE in 16 bits, between 300 and 65536"),
            (
                1 <= low <= high and self.min_segment >= 1 and low * self.min_segment <= self.seq_len,
                f"segments={self.segments} of at least min_segment={self.min_segment} tokens must fit into "
                f"seq_len={self.seq_len}",
            ),
            (0 < self.min_words <= self.max_words, f"min_words={self.min_words}, max_words={self.max_words}"),
            (0.0 < self.val_fraction < 1.0, f"val_fraction={self.val_fraction}: between 0 and 1"),
            (
                all(n is None or n > 0 for n in (self.train_sequences, self.val_sequences)),
                "train_sequences and val_sequences: positive, or null for one pass over the tokens",
            ),
            (self.dedup_ngram >= 2, f"dedup_ngram={self.dedup_ngram}: at least 2"),
            (self.seq_len >= 2, f"seq_len={self.seq_len}: at least 2, or there is no next token"),
            (
                self.max_documents is None or self.max_documents > 0,
                f"max_documents={self.max_documents}: at least 1, or null for all",
            ),
            (0 <= self.seed < 2**32, f"seed={self.seed}: from 0 to 2^32 - 1"),
        ]
        for ok, message in checks:
            if not ok:
                raise DataConfigError(message)

    @property
    def law(self) -> SegmentLaw:
        return SegmentLaw(self.seq_len, self.clusters, self.segments, self.min_segment)


RUN1 = LanguageConfig(kind="dirichlet")
"""The first run's data: 5 topics over 4,096 tokens, block boost 5."""

SANITY = LanguageConfig(
    kind="dirichlet",
    vocab=512,
    seq_len=256,
    topics=3,
    segments=(2, 4),
    min_segment=32,
    concentration=100.0,
    train_sequences=20_000,
    val_sequences=2_000,
)
"""The seed's sanity data: 3 topics over 512 tokens, block boost 100."""

CONTROLLED = LanguageConfig(vocab=256, permutations=8, shared=0.5, val_sequences=1280)
"""Bigram-only topics: 8 permutations per topic, 4 of them shared by all topics."""

CONTROLLED_SMALL = LanguageConfig(
    vocab=32,
    seq_len=64,
    topics=3,
    segments=(2, 3),
    min_segment=16,
    permutations=4,
    shared=0.5,
    val_sequences=512,
)
"""Bigram-only topics that a model of 0.1M parameters learns in a minute of a CPU core: 2 of 4 permutations shared."""

SMOKE = LanguageConfig(
    vocab=128,
    seq_len=64,
    topics=3,
    segments=(2, 3),
    min_segment=16,
    permutations=4,
    shared=0.0,
    train_sequences=2_000,
    val_sequences=256,
)
"""Seconds on a CPU."""

LANGUAGES: dict[str, LanguageConfig] = {
    "smoke": SMOKE,
    "sanity": SANITY,
    "faithful-v1": RUN1,
    "controlled-v1": CONTROLLED,
    "controlled-small": CONTROLLED_SMALL,
}
"""Presets by the name of the experiment that uses them."""
