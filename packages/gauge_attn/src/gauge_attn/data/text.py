"""Text from files: found or downloaded with a pinned hash, then split before anything is cut into windows."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lab_shared.errors import UserError, needs
from lab_shared.files import atomic_write, make_folder

SPLITS = ("train", "valid", "test")
VARIABLE = "GAUGE_ATTN_DATA"
_DEFAULT_FOLDER = "data/gauge_attn"
_TITLE = re.compile(r"^ = [^=\n].* = ?$", re.MULTILINE)  # a WikiText article's first line; sections have more signs


class Pin(NamedTuple):
    """A file to download and how it is recognised: its size and the start (or all) of its SHA-256."""

    name: str
    url: str
    size: int
    sha256: str


_WIKITEXT = "https://huggingface.co/datasets/Salesforce/wikitext/resolve/main/wikitext-2-raw-v1/"
_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
PINS: dict[str, list[Pin]] = {
    "wikitext-2": [
        Pin(
            "train.parquet",
            _WIKITEXT + "train-00000-of-00001.parquet",
            6_357_543,
            "e83889baabc497075506f91975be5fac0d45c5290b6b20582c8cd1e853d0c9f7",
        ),
        Pin("valid.parquet", _WIKITEXT + "validation-00000-of-00001.parquet", 657_209, "204929b7"),
        Pin("test.parquet", _WIKITEXT + "test-00000-of-00001.parquet", 732_610, "5f1bea06"),
    ],
    "tinyshakespeare": [
        Pin(
            "tinyshakespeare.txt",
            _SHAKESPEARE,
            1_115_394,
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        )
    ],
}


def read_splits(data: str, folder: str | None, split: str) -> dict[str, str]:
    """Split name -> text for a path, "wikitext-2" or "tinyshakespeare".

    A folder with train, valid and test files (.txt, .raw, .tokens, .parquet) keeps its own split. One text is cut
    90/5/5: split="contiguous" at the nearest end of line, "documents" between WikiText articles, or between the
    records of a .jsonl or .jsonl.gz file (one object with "text" a line).

    Raises UserError for a path that is not there, a folder without the three files, a text without documents, or
    named data that are neither found nor downloadable.
    """
    path = _find(data, folder) if data in PINS else Path(data)
    if not path.exists():
        raise UserError(f"--data {data}: no such file or folder; give one, or one of {', '.join(PINS)}, induction")
    if path.is_dir():
        return {name: "".join(_read(_split_file(path, name))) for name in SPLITS}
    documents = _read(path)
    if split == "contiguous":
        return _split_contiguous("".join(documents))
    if len(documents) == 1:
        text = documents[0]
        starts = [m.start() for m in _TITLE.finditer(text)] or [0]
        documents = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    if len(documents) < 20:
        raise UserError(
            f"{path} has {len(documents)} documents (WikiText titles or jsonl records), too few to split by them: "
            "use --data.split contiguous"
        )
    return _split_documents(documents)


def _split_contiguous(text: str) -> dict[str, str]:
    cuts = [0]
    for share in (0.9, 0.95):
        cut = text.find("\n", int(share * len(text))) + 1
        cuts.append(max(cut or int(share * len(text)), cuts[-1]))
    parts = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    if not all(parts):
        raise UserError(f"a text of {len(text)} characters cannot be split 90/5/5: give a longer one")
    return dict(zip(SPLITS, parts, strict=True))


def _split_documents(documents: Sequence[str]) -> dict[str, str]:
    """Whole documents in their order, cut where 90% and 95% of the characters are passed."""
    total, done = sum(map(len, documents)), 0
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for i, document in enumerate(documents):
        left = len(documents) - i
        name = "train" if done < 0.9 * total and left > 2 else "valid" if done < 0.95 * total and left > 1 else "test"
        parts[name].append(document)
        done += len(document)
    if not parts["valid"]:  # one document passed both marks
        parts["valid"].append(parts["train"].pop())
    return {name: "".join(texts) for name, texts in parts.items()}


def _read(path: Path) -> list[str]:
    """The documents of a file; a plain text is one."""
    if path.suffix == ".parquet":
        with needs(f"{path} (parquet)", "give a text file"):
            import polars
        try:
            return ["".join(polars.read_parquet(path, columns=["text"])["text"])]
        except (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError, TypeError) as error:
            raise UserError(f"{path} is no readable parquet file with a column of text ({error})") from error
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} is no readable UTF-8 text: {error}") from error
    if ".jsonl" not in path.suffixes:
        return [text]
    try:
        documents = [json.loads(line)["text"].rstrip("\n") + "\n" for line in text.split("\n") if line.strip()]
        "".join(documents).encode()  # JSON can spell halves of characters, which are no text
        return documents
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f'{path}: every line must be a JSON object with a "text" ({reason})') from error


def _candidates(folder: Path, name: str) -> list[Path]:
    """The files that may hold a split. A download that was killed leaves a hidden file, which is none."""
    kinds = (".txt", ".raw", ".tokens", ".parquet")
    return sorted(p for p in folder.iterdir() if name in p.name.lower() and p.suffix in kinds and p.name[0] != ".")


def _split_file(folder: Path, name: str) -> Path:
    found = _candidates(folder, name)
    if not found:
        raise UserError(
            f"{folder} has no {name} file (*{name}*.txt, .raw, .tokens or .parquet): a folder needs train, valid and "
            "test; give a single file to have it split"
        )
    return found[0]


def _find(data: str, folder: str | None) -> Path:
    """Named data in `folder`, $GAUGE_ATTN_DATA or the default folder, downloaded there if absent."""
    given = [folder] if folder else [os.environ[VARIABLE]] if os.environ.get(VARIABLE) else [_DEFAULT_FOLDER]
    root = Path(given[0])
    if data == "tinyshakespeare":
        names = ("tinyshakespeare.txt", "tinyshakespeare/input.txt", "text/tinyshakespeare.txt")
        for name in names:
            if (root / name).is_file():
                return root / name
    else:
        for path in (root / data, root / "wikitext2", root / "wikitext-2-raw", root):
            if path.is_dir() and all(_candidates(path, name) for name in SPLITS):
                return path
    target = root / data
    make_folder(target)
    for pin in PINS[data]:
        if not (target / pin.name).exists():
            atomic_write(target / pin.name, _download(pin, data, root))
    return target if len(PINS[data]) > 1 else target / PINS[data][0].name


def _download(pin: Pin, data: str, root: Path) -> bytes:
    way_out = (
        f"put the files under {root / data} yourself, name another folder with --data.folder or ${VARIABLE}, "
        "or train on --data induction, which needs none"
    )
    try:
        with urllib.request.urlopen(pin.url, timeout=30) as response:
            content: bytes = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{data} is not under {root} and {pin.url} cannot be reached ({error}): {way_out}") from error
    found = hashlib.sha256(content).hexdigest()
    if len(content) != pin.size or not found.startswith(pin.sha256):
        raise UserError(
            f"{pin.url} has {len(content):,} bytes with SHA-256 {found}, not the {pin.size:,} bytes with "
            f"{pin.sha256}... that are pinned: {way_out}"
        )
    return content
