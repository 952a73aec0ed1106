"""What a run trains on: a corpus of text or the generated induction language, as windows of tokens on a device.

Shapes: B windows of a batch, W windows of a split, N tokens of a window, T tokens of a split.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lab_shared.errors import UserError
from lab_shared.files import atomic_write
from lab_shared.report_files import read_object
from torch import Tensor

from gauge_attn.config import DataConfig
from gauge_attn.data import induction
from gauge_attn.data.ngrams import bigram_loss, unigram_loss
from gauge_attn.data.text import SPLITS, read_splits
from gauge_attn.data.tokenizers import Tokenizer, train_tokenizer

TEXT = "text.json"
IGNORED = -100
"""Target of a position that does not count, as in F.cross_entropy."""


@dataclass(frozen=True)
class Corpus:
    """Tokens of three splits, or the recipe to generate them.

    label: for people, such as "tinyshakespeare, byte tokens". vocab: symbols. tokens: split -> (T,) int32; empty for
    generated data. text_bytes: split -> UTF-8 bytes of its text. tokenizer: None for generated data. sha256: of the
    splits' text, which a run remembers; None for generated data.
    """

    config: DataConfig
    label: str
    vocab: int
    tokens: dict[str, np.ndarray]
    text_bytes: dict[str, int]
    tokenizer: Tokenizer | None
    sha256: str | None = None

    @property
    def generated(self) -> bool:
        return self.tokenizer is None

    def yardsticks(self, split: str = "valid") -> dict[str, float]:
        """Name -> mean nats per token of predictors that need no model.

        unigram, bigram; for generated data also optimal, and all three exactly.
        """
        if self.generated:
            keys = self.config.keys
            exact = {"unigram": math.log(self.vocab), "bigram": math.log(keys)}
            return exact | {"optimal": induction.optimal_loss(keys, self.config.window)}
        train_T, test_T = self.tokens["train"], self.tokens[split]
        return {
            "unigram": unigram_loss(train_T, test_T, self.vocab),
            "bigram": bigram_loss(train_T, test_T, self.vocab),
        }

    def bytes_per_token(self, split: str = "valid") -> float | None:
        """UTF-8 bytes of the split's text per token; None for generated data."""
        return None if self.generated else self.text_bytes[split] / len(self.tokens[split])


class Windows(NamedTuple):
    """A whole split: every token after the first is a target exactly once."""

    input_WN: Tensor
    target_WN: Tensor
    """What follows each input; IGNORED where another window has it already."""


def load_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus of a configuration; `tokenizer` replaces the one that would be learnt from its training text.

    Raises UserError as `read_splits` and `train_tokenizer` do, and for a split shorter than a window.
    """
    if config.data == "induction":
        label = f"generated induction language, {config.keys} keys"
        return Corpus(config, label, induction.vocabulary(config.keys), {}, {}, None)
    text = read_splits(config.data, config.folder, config.split)
    if tokenizer is None:
        tokenizer = train_tokenizer(config.tokenizer, text["train"], config.vocab)
    tokens = {name: tokenizer.encode(text[name]) for name in SPLITS}
    for name, tokens_T in tokens.items():
        if len(tokens_T) <= config.window:
            raise UserError(f"--data {config.data}: {len(tokens_T)} {name} tokens do not fill a window {config.window}")
    label = f"{config.data.rstrip('/').rsplit('/', 1)[-1]}, {tokenizer.kind} tokens"
    encoded = {name: text[name].encode() for name in SPLITS}
    text_bytes = {name: len(encoded[name]) for name in SPLITS}
    sha256 = hashlib.sha256(b"\0".join(encoded.values())).hexdigest()
    return Corpus(config, label, tokenizer.vocab, tokens, text_bytes, tokenizer, sha256)


def same_text(run_dir: Path, corpus: Corpus) -> None:
    """Raise UserError where the run in this folder was trained on another text than `corpus` has now."""
    known = read_object(run_dir / TEXT)
    if known is not None and known.get("sha256") != corpus.sha256:
        raise UserError(
            f"--data {corpus.config.data} or its split is not the text that {run_dir} was trained on ({run_dir / TEXT} "
            f"has SHA-256 {known.get('sha256')!s:.12}, it is {corpus.sha256!s:.12} now): put it back or train anew"
        )


def remember_text(run_dir: Path, corpus: Corpus) -> None:
    """Write down, in the run's folder, which text it is trained on; nothing for generated data."""
    if corpus.sha256 is not None:
        atomic_write(run_dir / TEXT, json.dumps({"sha256": corpus.sha256}) + "\n")


def windows(corpus: Corpus, split: str, device: torch.device, *, seed: int = 0) -> Windows:
    """All of a split in windows that do not overlap, except that the last one starts early enough to be full.

    Generated data: `val_windows` windows of their own stream; `seed` is the run's and changes nothing else.
    """
    n = corpus.config.window
    if corpus.generated:
        stream = {"valid": induction.VALIDATION, "test": induction.TEST}[split]
        count = corpus.config.val_windows
        tokens = induction.sample(corpus.config.keys, n, count, seed=seed, stream=stream, index=0, device=device)
        return Windows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    tokens_T = torch.from_numpy(corpus.tokens[split].astype(np.int64))
    last = len(tokens_T) - n - 1
    starts = list(range(0, last + 1, n))
    if starts[-1] < last:
        starts.append(last)
    tokens_WN1 = torch.stack([tokens_T[s : s + n + 1] for s in starts])
    target_WN = tokens_WN1[:, 1:].clone()
    if len(starts) > 1:
        target_WN[-1, : starts[-2] + n - last] = IGNORED
    return Windows(tokens_WN1[:, :-1].to(device), target_WN.to(device))


class Batches:
    """An endless stream of training windows (B, N + 1), int64 on the device; its position is the step.

    Text: every epoch cuts the stream anew at a random offset and shuffles the windows. Generated data: new windows at
    every step. The batch of all processes together is the same for the same seed, however many they are.
    epoch_steps: steps of one pass over the training text, which generated data do not have.
    """

    def __init__(self, corpus: Corpus, *, seed: int, device: torch.device, rank: int = 0, world: int = 1) -> None:
        """Raises UserError when the batch does not divide over the processes or exceeds the training windows."""
        self._corpus, self._config = corpus, corpus.config
        self._seed, self._device = seed, device
        self._rank = rank
        if self._config.batch % world:
            raise UserError(f"batch={self._config.batch} windows do not divide over {world} processes")
        self._share = self._config.batch // world
        self._step = 0
        if not corpus.generated:
            tokens_T = corpus.tokens["train"]
            self._tokens_T = torch.from_numpy(tokens_T).to(device)
            self.epoch_steps = ((len(tokens_T) - 1) // self._config.window - 1) // self._config.batch
            if self.epoch_steps < 1:
                raise UserError(f"the training text does not fill one batch of {self._config.batch}: lower data.batch")
            self._epoch = -1
            self._within_N = torch.arange(self._config.window + 1, device=device)

    def __next__(self) -> Tensor:
        step, self._step = self._step, self._step + 1
        if self._corpus.generated:
            tokens_BN = induction.sample(
                self._config.keys,
                self._config.window,
                self._config.batch,
                seed=self._seed,
                stream=induction.TRAIN,
                index=step,
                device=self._device,
            )
            return tokens_BN[self._rank * self._share :][: self._share]
        epoch, at = divmod(step, self.epoch_steps)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        first = at * self._config.batch + self._rank * self._share
        start_B = self._starts_W[first : first + self._share]
        return self._tokens_T[start_B[:, None] + self._within_N].long()

    def _start_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng((self._seed, epoch))
        n, used = self._config.window, self.epoch_steps * self._config.batch
        offset = int(rng.integers(n))
        count = (len(self._tokens_T) - 1 - offset) // n
        starts = offset + n * rng.permutation(count)[:used]
        self._starts_W = torch.from_numpy(starts).to(self._device)
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._step = state["step"]
