"""Documents from files or the Hugging Face hub, one at a time, with an optional topic."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lab_shared.errors import UserError, needs

from attn_clustering.data.settings import CorpusConfig

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")


class SourceError(UserError):
    """A source that cannot be read; the message names it and the way out."""


@dataclass(frozen=True)
class Document:
    text: str
    topic: str | None


def documents(config: CorpusConfig) -> Iterator[Document]:
    """All documents of all sources in order, at most `max_documents`.

    Raises SourceError for sources that do not exist, have another format or lack a field.
    """
    if not config.sources:
        raise SourceError(
            f"sources is empty: give at least one of *{', *'.join(SUFFIXES)}, a folder, or hf:DATASET:CONFIG"
        )
    streams = (document for source in config.sources for document in _read(source, config))
    return islice(streams, config.max_documents)


def files_of(source: str) -> list[Path]:
    """The files that a local source stands for. Raises SourceError when there is none."""
    path = Path(source)
    if not path.exists():
        raise SourceError(f"no file or folder {path}")
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise SourceError(f"{path}: unknown format; known are {', '.join(SUFFIXES)}")
        return [path]
    files = files_in(path)
    if not files:
        raise SourceError(f"{path} holds no {', '.join(SUFFIXES)} file")
    return files


def files_in(folder: Path) -> list[Path]:
    """The text files in a folder and its subfolders, by path."""
    return sorted(p for p in folder.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())


def _read(source: str, config: CorpusConfig) -> Iterator[Document]:
    if source.startswith("hf:"):
        return _hub(source, config)
    return (document for file in files_of(source) for document in _read_file(file, config))


def _read_file(path: Path, config: CorpusConfig) -> Iterator[Document]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl(path, config)
    if path.suffix == ".parquet":
        return _parquet(path, config)
    return _text(path, config)


def _jsonl(path: Path, config: CorpusConfig) -> Iterator[Document]:
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(json.loads(line), config, f"{path}, line {number}")
    except SourceError:
        raise
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise SourceError(f"{path} cannot be read as lines of JSON (near line {max(number, 1)}: {error})") from error


def _parquet(path: Path, config: CorpusConfig) -> Iterator[Document]:
    import polars

    columns = [config.text_field] + ([config.topic_field] if config.topic_field else [])
    try:
        frame = polars.read_parquet(path, columns=columns)
    except (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError) as error:
        raise SourceError(f"{path} cannot be read as parquet with the columns {columns}: {error}") from error
    for row in frame.iter_rows(named=True):
        yield _document(row, config, str(path))


def _text(path: Path, config: CorpusConfig) -> Iterator[Document]:
    """One document per file; its topic, where one is needed, is the name of the folder it lies in."""
    try:
        yield Document(path.read_text(encoding="utf-8"), path.parent.name if config.topic_field else None)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: {error}") from error


def _hub(source: str, config: CorpusConfig) -> Iterator[Document]:
    """Streamed and shuffled through a buffer, because dumps are sorted by article age."""
    with needs(source, "give local files"):
        import datasets
    if config.max_documents is None:
        raise SourceError(f"{source} is a stream without end for our purposes: set max_documents")
    name, _, subset = source.removeprefix("hf:").partition(":")
    stream = datasets.load_dataset(name, subset or None, split="train", streaming=True)
    for row in stream.shuffle(seed=config.seed, buffer_size=10_000):
        yield _document(row, config, source)


def _document(row: Any, config: CorpusConfig, where: str) -> Document:
    for field in (config.text_field, config.topic_field):
        if field is not None and (not isinstance(row, dict) or not isinstance(row.get(field), str)):
            known = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise SourceError(f"{where}: no text in field {field!r}; there is {known:.200}")
    text, topic = row[config.text_field], row[config.topic_field] if config.topic_field else None
    try:
        f"{text}{topic}".encode()
    except UnicodeEncodeError as error:  # JSON can spell halves of characters
        raise SourceError(f"{where}: {error}") from error
    return Document(text, topic)
