"""Byte-level BPE through the package `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lab_shared.errors import UserError
from lab_shared.files import atomic_write

from attn_clustering.data.settings import EOS

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2, as PAD, BOS, EOS in settings


def train_tokenizer(texts: Sequence[str], vocab: int, path: Path) -> None:
    """Learn a byte-level BPE of at most `vocab` tokens from `texts` (NFKC-normalised) and write tokenizer.json.

    Raises UserError when the text is too small for that vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    if tokenizer.get_vocab_size() < vocab:
        raise UserError(
            f"the training text gives only {tokenizer.get_vocab_size():,} tokens, vocab={vocab:,}: "
            "lower vocab or add text"
        )
    atomic_write(path, tokenizer.to_str(pretty=False))


def load_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` in a tokenizer.json."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def encode(tokenizer: Any, texts: Sequence[str], batch: int = 2_000) -> Iterator[np.ndarray]:
    """uint16 token ids of each text, the end-of-sequence token last."""
    for start in range(0, len(texts), batch):
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + batch]), add_special_tokens=False):
            yield np.array([*encoding.ids, EOS], dtype=np.uint16)
