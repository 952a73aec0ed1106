"""Real text: sources, splits, topics, stages. Uses a slice of the reference text where it is at hand."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attn_clustering.data import corpus, dedup, levels, stages
from attn_clustering.data.settings import EOS, CorpusConfig, DataConfigError
from attn_clustering.data.sources import SourceError, documents
from attn_clustering.data.topics import spherical_kmeans
from lab_shared.errors import MissingPackage, UserError

WORDS = {
    "sea": "ship wave tide sail harbour anchor captain storm rope deck mast island shore reef crew",
    "kitchen": "bread butter oven flour salt pepper knife plate soup sugar spoon kettle onion garlic dough",
    "sky": "star planet orbit moon comet galaxy telescope sun eclipse meteor rocket cloud horizon night light",
}


def made_documents(n: int) -> list[dict[str, str]]:
    """Generated documents of three paragraphs; the words tell the topic."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        topic = list(WORDS)[i % 3]
        common = ["the", "of", "and", "in", "to", "with", "over", "under", "from"]
        pool = np.array(WORDS[topic].split() * 2 + common * 3)
        rows.append({"topic": topic, "text": "\n\n".join(" ".join(rng.choice(pool, 60)) for _ in range(3))})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def config(tmp_path):
    source = write_jsonl(tmp_path / "made.jsonl.gz", made_documents(90))
    return CorpusConfig(
        sources=(str(source),), topic_field="topic", clusters=3, vocab=320, seq_len=64, min_segment=16, val_fraction=0.2
    )


@pytest.fixture
def tokenizers():
    return pytest.importorskip("tokenizers", reason="byte-level BPE needs the package tokenizers")


def test_end_to_end_with_given_topics(config, tmp_path, tokenizers):
    out = corpus.prepare(replace(config, embedder="given"), tmp_path / "out")
    facts = corpus.describe(out)
    assert facts["names"] == ["kitchen", "sea", "sky"]
    for split in ("train", "val"):
        data = corpus.load(out, split)
        n = facts[split]["sequences"]
        assert data.tokens_NT.shape == (n, 64)
        assert data.tokens_NT.max() < 320
        counts = np.stack([(data.topics_NT.numpy() == k).sum(axis=1) for k in range(3)], axis=1)
        assert np.array_equal(counts.argmax(axis=1), data.dominant_N.numpy())
        pool = np.load(out / f"{split}.pool.npy")
        assert (pool == EOS).sum() > 10
    found = levels.corpus_levels(out)
    losses = [found[name].value for name in ("ln_vocab", "unigram", "unigram_filter", "unigram_known_topic")]
    assert losses == sorted(losses, reverse=True)
    assert found["unigram_filter_accuracy"].value > 0.8 > found["one_token_accuracy"].value > 0.4
    assert "unigram_filter" in levels.main(str(out), n_sequences=8)
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    data = corpus.load(out)
    # Segments hold text of their topic: words of the others do not occur.
    row = data.topics_NT[0]
    text = tokenizer.decode(data.tokens_NT[0][row == row[0]].tolist()[2:-2])
    others = {w for name in facts["names"] if name != facts["names"][int(row[0])] for w in WORDS[name].split()}
    assert not others & set(text.split()[1:-1])


def test_every_pool_token_is_used_once_per_pass(config, tmp_path, tokenizers):
    out = corpus.prepare(replace(config, embedder="given", train_sequences=1_500), tmp_path / "out")
    data, passes = corpus.load(out), corpus.describe(out)["train"]["passes"]
    bounds = json.loads((out / "pools.manifest.json").read_text())["facts"]["train"]["bounds"]
    pool = np.load(out / "train.pool.npy")
    for k in range(3):
        used = np.bincount(data.tokens_NT[data.topics_NT == k].numpy(), minlength=320)
        once = np.bincount(pool[bounds[k] : bounds[k + 1]], minlength=320)
        assert passes[k] > 2
        assert (used >= np.floor(passes[k]) * once).all()
        assert (used <= np.ceil(passes[k]) * once).all()


def test_lsa_finds_the_topics(config, tmp_path, tokenizers):
    from sklearn.metrics import adjusted_rand_score

    out = corpus.prepare(config, tmp_path / "out")
    facts = json.loads((out / "topics.manifest.json").read_text())["facts"]
    assert facts["stability_ari"] > 0.99
    rows = [json.loads(line) for line in (out / "paragraphs.jsonl").read_text().splitlines()]
    found = np.load(out / "topics.npy")
    assert adjusted_rand_score([row["topic"] for row in rows], found) > 0.99
    assert torch.equal(corpus.load(out).topics_NT, corpus.load(corpus.prepare(config, tmp_path / "two")).topics_NT)


def test_stages_run_again_only_when_their_inputs_change(config, tmp_path, tokenizers):
    out = tmp_path / "out"
    given = replace(config, embedder="given")
    corpus.prepare(given, out)
    names = ("paragraphs.jsonl", "topics.npy", "tokenizer.json", "train.pool.npy", "train.tokens.npy")

    def made() -> dict[str, int]:
        return {name: (out / name).stat().st_mtime_ns for name in names}

    first = made()
    corpus.prepare(given, out)
    assert made() == first
    corpus.prepare(replace(given, seq_len=48), out)
    second = made()
    assert [name for name in names if second[name] != first[name]] == ["train.tokens.npy"]
    (out / "tokenizer.json").write_text("{}")  # a damaged file is made anew
    corpus.prepare(replace(given, seq_len=48), out)
    third = made()
    assert third["tokenizer.json"] != second["tokenizer.json"]
    assert third["paragraphs.jsonl"] == first["paragraphs.jsonl"]
    write_jsonl(Path(config.sources[0]), made_documents(96))
    corpus.prepare(given, out)
    assert all(made()[name] != third[name] for name in names)


def test_a_stage_that_fails_is_not_done(tmp_path):
    def fail():
        (tmp_path / "x").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stages.stage(tmp_path, "s", ["x"], {"a": 1}, fail)
    calls = []

    def make():
        calls.append(1)
        (tmp_path / "x").write_text("y")
        return {"n": 3}

    for _ in range(2):
        assert stages.stage(tmp_path, "s", ["x"], {"a": (1, 2)}, make)["facts"] == {"n": 3}
    assert len(calls) == 1


def test_shared_runs_leave_the_held_out_text():
    rng = np.random.default_rng(0)
    train = rng.integers(3, 9, 4_000).astype(np.uint16)
    encoded = [rng.integers(3, 9, 80).astype(np.uint16) for _ in range(20)]
    encoded[3][10:60] = train[500:550]
    encoded[7][40:] = train[1000:1040]
    encoded[8][:10] = train[1040:1050]  # a run across two paragraphs
    encoded[11][:49] = train[2000:2049]  # one token short
    encoded[10][-1] = encoded[11][49] = 10
    kept = dedup.drop_shared(encoded, np.arange(20), train, 50)
    assert sorted(set(range(20)) - set(kept.tolist())) == [3, 7]


@pytest.mark.parametrize("n", [2, 3, 50, 64])
def test_ngram_hashes_tell_runs_apart(n):
    tokens = np.random.default_rng(1).integers(0, 2, 400).astype(np.uint16)
    hashes = dedup.ngram_hashes(tokens, n)
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    assert len(hashes) == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs))
    assert len(dedup.ngram_hashes(tokens[: n - 1], n)) == 0


def test_documents_are_split_by_content(config, tmp_path):
    rows = made_documents(60)
    write_jsonl(Path(config.sources[0]), rows + rows[:30])
    corpus._paragraphs(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "paragraphs.jsonl").read_text().splitlines()]
    assert len({line["text"] for line in lines}) == len(lines) == 180
    by_text = {line["text"]: line["split"] for line in lines}
    for row in rows:  # all paragraphs of a document are on one side
        assert len({by_text[" ".join(p.split())] for p in row["text"].split("\n\n")}) == 1


@pytest.mark.parametrize("embedder", ["given", pytest.param("lsa", marks=pytest.mark.slow)])
def test_textbooks_end_to_end(real_documents, tmp_path, tokenizers, embedder):
    source = write_jsonl(tmp_path / "books.jsonl.gz", real_documents(40))
    config = CorpusConfig(
        sources=(str(source),),
        topic_field="topic",
        embedder=embedder,
        clusters=3,
        vocab=600,
        seq_len=128,
        min_segment=32,
        val_fraction=0.35,
    )
    out = corpus.prepare(config, tmp_path / "out")
    pools = [np.load(out / f"{split}.pool.npy") for split in ("train", "val")]
    train, val = ({pool[i : i + 50].tobytes() for i in range(len(pool) - 49)} for pool in pools)
    assert len(train) > 20_000
    assert not train & val
    found = levels.corpus_levels(out, n_sequences=32)
    assert found["ln_vocab"].value > found["unigram"].value
    assert found["unigram_filter_accuracy"].value > found["one_token_accuracy"].value > 1 / 3


def test_sources_of_every_format_give_the_same_documents(tmp_path):
    polars = pytest.importorskip("polars")
    rows = made_documents(6)
    write_jsonl(tmp_path / "a.jsonl.gz", rows)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    polars.DataFrame(rows).write_parquet(tmp_path / "c.parquet")
    for i, row in enumerate(rows):
        folder = tmp_path / "texts" / row["topic"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_text(row["text"])
    found = {
        name: sorted(
            (d.text, d.topic) for d in documents(CorpusConfig(sources=(str(tmp_path / name),), topic_field="topic"))
        )
        for name in ("a.jsonl.gz", "b.jsonl", "c.parquet", "texts")
    }
    assert all(len(x) == 6 and x == found["b.jsonl"] for x in found.values())
    config = CorpusConfig(sources=tuple(str(tmp_path / name) for name in ("a.jsonl.gz", "b.jsonl")), max_documents=8)
    assert len(list(documents(config))) == 8


def test_sources_that_cannot_be_read_say_why(tmp_path, monkeypatch):
    def read(*sources, **options):
        return list(documents(CorpusConfig(sources=sources, **options)))

    with pytest.raises(SourceError, match="sources is empty"):
        read()
    with pytest.raises(SourceError, match="no file or folder"):
        read(str(tmp_path / "nothing.jsonl"))
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(SourceError, match="unknown format"):
        read(str(tmp_path / "x.csv"))
    with pytest.raises(SourceError, match="holds no"):
        read(str(tmp_path))
    (tmp_path / "bad.jsonl").write_text("{not json}\n")
    with pytest.raises(SourceError, match="cannot be read"):
        read(str(tmp_path / "bad.jsonl"))
    (tmp_path / "field.jsonl").write_text('{"body": "text"}\n')
    with pytest.raises(SourceError, match="'text'; there is body"):
        read(str(tmp_path / "field.jsonl"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match="uv pip install datasets"):
        read("hf:wikimedia/wikipedia:20231101.en")


def test_too_little_text_says_so(config, tmp_path, tokenizers):
    with pytest.raises(UserError, match="no paragraph of"):
        corpus.prepare(replace(config, min_words=400), tmp_path / "a")
    with pytest.raises(UserError, match="names 3 topics"):
        corpus.prepare(replace(config, embedder="given", clusters=4), tmp_path / "b")
    with pytest.raises(UserError, match="lower vocab"):
        corpus.prepare(replace(config, embedder="given", vocab=4_000), tmp_path / "c")
    with pytest.raises(UserError, match="less than seq_len"):
        corpus.prepare(replace(config, embedder="given", seq_len=8_192), tmp_path / "d")
    with pytest.raises(UserError, match="run `attn-clustering prepare`"):
        corpus.load(tmp_path / "d")
    with pytest.raises(DataConfigError, match="topic_field"):
        CorpusConfig(embedder="given")


def test_spherical_kmeans_recovers_separated_directions():
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=1)
    truth = torch.arange(400) % 4
    x = torch.nn.functional.normalize(directions[truth] + 0.05 * torch.randn(400, 16, generator=generator), dim=1)
    centres = spherical_kmeans(x, 4, seed=0)
    assert torch.allclose(centres.norm(dim=1), torch.ones(4), atol=1e-5)
    nearest = (x @ centres.T).argmax(dim=1)
    assert len({(int(a), int(b)) for a, b in zip(truth, nearest, strict=True)}) == 4
