import hashlib
import json
import math
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from gauge_attn.config import DataConfig
from gauge_attn.data import IGNORED, Batches, induction, load_corpus, text, windows
from gauge_attn.data.ngrams import bigram_loss, unigram_loss
from gauge_attn.data.tokenizers import Tokenizer, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_shared.errors import UserError

CPU = torch.device("cpu")
WORDS = "the cat sat on the mat and the dog ate the cat\n"


@pytest.fixture
def book(tmp_path):
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(WORDS.split(), 12)) for _ in range(400)]
    path = tmp_path / "book.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def sample(keys=5, window=12, batch=400, seed=0, index=0):
    return induction.sample(keys, window, batch, seed=seed, stream=0, index=index, device=CPU)


def test_induction_language_is_what_its_docstring_says():
    x = sample()
    assert x.shape == (400, 13)
    assert (x[:, ::2] < 5).all()
    assert (x[:, 1::2] >= 5).all()
    for row in x[:50].tolist():
        table = {}
        for key, value in zip(row[0:12:2], row[1:12:2], strict=True):
            assert table.setdefault(key, value) == value
    assert torch.equal(sample(), x)
    assert not torch.equal(sample(index=1), x)
    assert not torch.equal(sample(seed=1), x)


def best_prediction(tokens_N, keys):
    """Distribution (N, 2 keys) of what follows each token of one window, from what stands up to it."""
    p_NV = np.zeros((len(tokens_N), 2 * keys))
    seen = {}
    for i, token in enumerate(tokens_N.tolist()):
        if token >= keys:
            seen[int(tokens_N[i - 1])] = token
            p_NV[i, :keys] = 1 / keys
        elif token in seen:
            p_NV[i, seen[token]] = 1.0
        else:
            p_NV[i, keys:] = 1 / keys
    return p_NV


@pytest.mark.parametrize(("keys", "window"), [(3, 8), (5, 12), (16, 64)])
def test_the_optimal_loss_is_that_of_the_best_predictor(keys, window):
    total = []
    for row in sample(keys, window, 300).numpy():
        p = best_prediction(row[:-1], keys)
        assert np.allclose(p.sum(1), 1)
        total.append(-np.log(p[np.arange(window), row[1:]]).mean())
    error = np.std(total) / math.sqrt(len(total))
    assert np.mean(total) == pytest.approx(induction.optimal_loss(keys, window), abs=4 * error)


def test_an_odd_window_is_an_error():
    with pytest.raises(UserError, match="even window"):
        sample(window=7)


def test_ngrams_against_counting():
    rng = np.random.default_rng(1)
    train, test = rng.integers(0, 6, 500).astype(np.int32), rng.integers(0, 7, 50).astype(np.int32)
    unigram = [(np.sum(train == v) + 1) / (len(train) + 7) for v in range(7)]
    assert unigram_loss(train, test, 7) == pytest.approx(-np.mean([math.log(unigram[v]) for v in test[1:]]))
    losses = []
    for a, b in pairwise(test.tolist()):
        after = train[1:][train[:-1] == a]
        t = len(set(after.tolist()))
        p = (np.sum(after == b) + t * unigram[b]) / (len(after) + t) if len(after) else unigram[b]
        losses.append(-math.log(p))
    assert bigram_loss(train, test, 7) == pytest.approx(np.mean(losses))


def test_bigram_probabilities_add_up():
    train = np.array([0, 1, 0, 2, 0, 1, 1, 2, 0], np.int32)
    for a in range(4):
        total = sum(math.exp(-bigram_loss(train, np.array([a, b], np.int32), 4)) for b in range(4))
        assert total == pytest.approx(1.0)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=80))
def test_bytes_and_pairs_give_any_text_back(any_text):
    for tokenizer in (Tokenizer("byte"), train_tokenizer("bpe", WORDS * 3, 270)):
        ids = tokenizer.encode(any_text)
        assert tokenizer.decode(ids) == any_text.encode(errors="replace").decode()
        assert ids.size == 0 or ids.max() < tokenizer.vocab


def naive_merges(source, n):
    import re
    from collections import Counter

    chunks = [list(c.encode()) for c in re.findall(r" ?\S+|\s", source)]
    merges = []
    for i in range(n):
        pairs = Counter(p for c in chunks for p in pairwise(c))
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        for c in chunks:
            j = 0
            while j < len(c) - 1:
                if (c[j], c[j + 1]) == best:
                    c[j : j + 2] = [256 + i]
                j += 1
    return merges


@settings(max_examples=15, deadline=None)
@given(st.text(alphabet="aab c", min_size=30, max_size=120))
def test_byte_pairs_are_those_of_counting_anew(source):
    learnable = naive_merges(source + " abab", 2)
    assert train_tokenizer("bpe", source + " abab", 258)._merges == learnable


def test_tokenizers_survive_json_and_say_what_is_wrong():
    for kind, vocab in (("byte", 0), ("word", 6), ("bpe", 262)):
        tokenizer = train_tokenizer(kind, WORDS * 4, vocab)
        again = Tokenizer.from_json(tokenizer.to_json())
        assert np.array_equal(again.encode(WORDS), tokenizer.encode(WORDS))
        assert again.vocab == tokenizer.vocab
    words = train_tokenizer("word", WORDS, 6)
    assert words.decode(words.encode("the cat flew\nthe")) == "the cat <unk>\nthe <eos>"
    with pytest.raises(UserError, match="smaller vocab"):
        train_tokenizer("bpe", "ab", 300)
    with pytest.raises(UserError, match="vocab=2"):
        train_tokenizer("word", WORDS, 2)


def test_every_token_of_a_split_is_a_target_once(book):
    config = DataConfig(data=str(book), window=30)
    corpus = load_corpus(config)
    for split in ("valid", "test"):
        x, y = windows(corpus, split, CPU)
        tokens = corpus.tokens[split]
        counted = y[y != IGNORED]
        assert counted.tolist() == tokens[1:].tolist()
        assert torch.equal(x[0, 1:], y[0, :-1])
    assert "".join(text.read_splits(str(book), None, "contiguous").values()) == book.read_text()
    assert corpus.text_bytes["valid"] == len(corpus.tokens["valid"])  # bytes


def test_batches_are_windows_of_the_text_and_resume_exactly(book):
    config = DataConfig(data=str(book), window=30, batch=4)
    corpus = load_corpus(config)
    batches = Batches(corpus, seed=1, device=CPU)
    joined = corpus.tokens["train"].astype(np.uint8).tobytes()
    n = batches.epoch_steps
    drawn = [next(batches) for _ in range(2 * n + 3)]
    assert all(joined.find(bytes(row)) >= 0 for row in drawn[0].tolist())
    firsts = {tuple(row) for x in drawn[:n] for row in x[:, :-1].tolist()}
    assert len(firsts) == 4 * n  # no window twice in an epoch
    again = Batches(corpus, seed=1, device=CPU)
    again.load_state_dict({"step": n + 1})
    assert torch.equal(next(again), drawn[n + 1])
    halves = [Batches(corpus, seed=1, device=CPU, rank=r, world=2) for r in (0, 1)]
    assert torch.equal(torch.cat([next(h) for h in halves]), drawn[0])
    with pytest.raises(UserError, match="do not divide over 3"):
        Batches(corpus, seed=1, device=CPU, world=3)


def articles(n):
    return "".join(f" = Title {i} = \n \n = = Section = = \n Body of number {i} . \n" for i in range(n))


def test_documents_are_split_whole(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(articles(40))
    parts = text.read_splits(str(path), None, "documents")
    assert "".join(parts.values()) == path.read_text()
    assert all(part.startswith(" = Title") for part in parts.values())
    assert 35 <= parts["train"].count(" = Title") <= 37
    lines = tmp_path / "docs.jsonl"
    lines.write_text("".join(json.dumps({"text": f"record {i}"}) + "\n" for i in range(40)))
    assert "".join(text.read_splits(str(lines), None, "documents").values()).count("record") == 40
    path.write_text(articles(3))
    with pytest.raises(UserError, match="3 documents"):
        text.read_splits(str(path), None, "documents")


def test_a_folder_keeps_its_own_split(tmp_path):
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"):
        (tmp_path / name).write_text(name)
    assert text.read_splits(str(tmp_path), None, "contiguous")["valid"] == "wiki.valid.tokens"
    (tmp_path / "wiki.test.tokens").unlink()
    with pytest.raises(UserError, match="no test file"):
        text.read_splits(str(tmp_path), None, "contiguous")


def test_named_data_are_found_or_downloaded_and_checked(tmp_path, monkeypatch):
    content = b"to be or not\n" * 100
    pin = text.Pin(
        "tinyshakespeare.txt", (tmp_path / "source").as_uri(), len(content), hashlib.sha256(content).hexdigest()
    )
    monkeypatch.setitem(text.PINS, "tinyshakespeare", [pin])
    monkeypatch.setenv(text.VARIABLE, str(tmp_path / "store"))
    with pytest.raises(UserError, match=r"cannot be reached.*--data induction"):
        text.read_splits("tinyshakespeare", None, "contiguous")
    (tmp_path / "source").write_bytes(b"x" * len(content))
    with pytest.raises(UserError, match="that are pinned"):
        text.read_splits("tinyshakespeare", None, "contiguous")
    (tmp_path / "source").write_bytes(content)
    parts = text.read_splits("tinyshakespeare", None, "contiguous")
    assert "".join(parts.values()).encode() == content
    (tmp_path / "source").unlink()
    assert text.read_splits("tinyshakespeare", None, "contiguous") == parts  # kept


def test_missing_and_short_data_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_corpus(DataConfig(data=str(tmp_path / "none.txt")))
    (tmp_path / "short.txt").write_text("a\n" * 50)
    with pytest.raises(UserError, match="do not fill a window"):
        load_corpus(DataConfig(data=str(tmp_path / "short.txt")))


def test_generated_yardsticks_are_exact():
    corpus = load_corpus(DataConfig(keys=8, window=16, val_windows=400))
    y = corpus.yardsticks()
    x, target = windows(corpus, "valid", CPU, seed=3)
    assert x.shape == target.shape == (400, 16)
    assert y["optimal"] < y["bigram"] == math.log(8) < y["unigram"] == math.log(16)
    assert corpus.bytes_per_token() is None


def test_tinyshakespeare_is_the_pinned_file():
    root = os.environ.get("LAB_REFERENCE_DATA")
    if root is None:
        pytest.skip("needs LAB_REFERENCE_DATA, the folder with text/tinyshakespeare.txt")
    config = DataConfig(data="tinyshakespeare", folder=root, tokenizer="word", window=64)
    assert (
        hashlib.sha256((Path(root) / "text/tinyshakespeare.txt").read_bytes()).hexdigest()
        == text.PINS["tinyshakespeare"][0].sha256
    )
    corpus = load_corpus(config)
    y = corpus.yardsticks()
    assert corpus.vocab == 2048
    assert 3.0 < y["bigram"] < y["unigram"] < 7.0
    assert load_corpus(replace(config, tokenizer="byte")).yardsticks()["unigram"] == pytest.approx(3.3, abs=0.1)
