"""What `make fuzz` feeds: every reader of files that a user may bring, with valid files, and what a right answer is."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import strategies as st

Files = Mapping[str, bytes]
"""Relative path -> content."""


@dataclass(frozen=True)
class Reader:
    """A reader under test.

    seeds: folders of valid files. read(folder): what the program makes of the files. check(folder, value): raises
    AssertionError when a value that was accepted is not what the files say. made: files put together by hypothesis.
    """

    seeds: list[Files]
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], None]
    made: list[st.SearchStrategy[Files]] = field(default_factory=list)


def _files(make: Callable[[Path], object]) -> Files:
    """The files that `make(folder)` writes."""
    with TemporaryDirectory() as name:
        make(Path(name))
        return {
            str(p.relative_to(name)): p.read_bytes()
            for p in sorted(Path(name).rglob("*"))
            if p.is_file() and ".lock" not in p.name
        }


def _equal(a: Any, b: Any) -> bool:
    """Equality of trees of plain values, arrays and tensors, in value and type; NaN equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def _same_as(expected: Any) -> Callable[[Path, Any], None]:
    """For formats that carry checksums: what is accepted is the original."""

    def check(folder: Path, value: Any) -> None:
        assert _equal(value, expected), "accepted with another content than was written"

    return check


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


# --- iceaggr ---


def _pulses(counts: list[int]) -> Any:
    from iceaggr.data.pulses import Pulses

    rng = np.random.default_rng(0)
    n = sum(counts)
    event_P = np.repeat(np.arange(len(counts)), counts)
    time_P = rng.integers(5_000, 30_000, n)
    return Pulses(
        event_id_E=torch.arange(len(counts)) * 7 + 100,
        offsets_E1=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
        sensor_P=torch.from_numpy(rng.integers(0, 5160, n).astype(np.int32)),
        time_P=torch.from_numpy(time_P[np.lexsort((time_P, event_P))].astype(np.int32)),
        charge_P=torch.from_numpy((rng.integers(1, 400, n) / 40).astype(np.float32)),
        auxiliary_P=torch.from_numpy(rng.random(n) < 0.6),
        azimuth_E=torch.from_numpy(rng.random(len(counts)) * 6),
        zenith_E=torch.from_numpy(rng.random(len(counts)) * 3),
    )


def _kaggle_folder(folder: Path) -> None:
    from iceaggr.data.kaggle import write_batch, write_meta
    from iceaggr.data.schema import Events

    pulses = _pulses([4, 1, 7])
    ends = pulses.offsets_E1[1:].numpy()
    write_batch(folder / "train" / "batch_1.parquet", pulses)
    events = Events(
        pulses.event_id_E.numpy(),
        pulses.offsets_E1[:-1].numpy(),
        ends - 1,
        pulses.azimuth_E.numpy(),
        pulses.zenith_E.numpy(),
    )
    write_meta(folder / "train_meta.parquet", {1: events})


def _kaggle() -> Reader:
    """Kaggle parquet: a batch file and the meta table."""
    import polars as pl
    from iceaggr.data.kaggle import KaggleFolder

    def read(folder: Path) -> Any:
        source = KaggleFolder(folder)
        return source.events_per_batch(), source.read_batch(1)

    def check(folder: Path, value: Any) -> None:
        counts, pulses = value
        if not (folder / "train_meta.parquet").exists():
            return  # a layout that is read too: runs of equal ids are the events
        table = pl.read_parquet(folder / "train" / "batch_1.parquet")
        meta = pl.read_parquet(folder / "train_meta.parquet").filter(pl.col("batch_id") == 1)
        assert counts[1] == len(meta) == pulses.n_events
        rows = np.concatenate(
            [
                np.arange(a, b + 1)
                for a, b in zip(meta["first_pulse_index"].to_list(), meta["last_pulse_index"].to_list(), strict=True)
            ]
        )
        for name, x in (("sensor_id", pulses.sensor_P), ("time", pulses.time_P), ("charge", pulses.charge_P)):
            assert np.array_equal(table[name].to_numpy()[rows].astype(x.numpy().dtype), x.numpy()), name
        assert bool(torch.isfinite(pulses.charge_P).all())
        assert pulses.sensor_P.min() >= 0
        assert pulses.sensor_P.max() < 5160

    def to_bytes(table: Any) -> bytes:
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        return buffer.getvalue()

    kinds = [pl.Int16, pl.Int64, pl.UInt64, pl.Float32, pl.Float64, pl.Boolean, pl.String]

    @st.composite
    def tables(draw: st.DrawFn) -> Files:
        """The right columns mostly, with values around what is allowed, now and then of another type or null."""
        n, wrong = draw(st.integers(0, 4)), draw(st.sampled_from([None, None, "column", "type", "null"]))
        integers = st.lists(st.sampled_from([-1, 0, 1, 2, 3, 5159, 5160, 2**31, 2**62]), min_size=n, max_size=n)
        numbers = st.lists(st.sampled_from([0.0, 0.5, 3.0, -1.0, 1e39, math.nan, math.inf]), min_size=n, max_size=n)
        pulse: dict[str, Any] = {name: draw(integers) for name in ("sensor_id", "time", "event_id")} | {
            "charge": draw(numbers)
        }
        pulse["auxiliary"] = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        meta: dict[str, Any] = {name: draw(integers) for name in ("event_id", "first_pulse_index", "last_pulse_index")}
        meta |= {"batch_id": [1] * n, "azimuth": draw(numbers), "zenith": draw(numbers)}
        frames = [pl.DataFrame(pulse), pl.DataFrame(meta)]
        which = draw(st.integers(0, 1))
        name = draw(st.sampled_from(frames[which].columns))
        if wrong == "column":
            frames[which] = frames[which].drop(name)
        elif wrong == "type":
            frames[which] = frames[which].with_columns(pl.col(name).cast(draw(st.sampled_from(kinds)), strict=False))
        elif wrong == "null" and n:
            frames[which] = frames[which].with_columns(pl.lit(None).cast(frames[which][name].dtype).alias(name))
        return {"train/batch_1.parquet": to_bytes(frames[0]), "train_meta.parquet": to_bytes(frames[1])}

    return Reader([_files(_kaggle_folder)], read, check, [tables()])


def _geometry() -> Reader:
    """sensor_geometry.csv."""
    from iceaggr.geometry import icecube86, read_geometry_csv, write_geometry_csv

    number = re.compile(rb"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")

    def check(folder: Path, value: Any) -> None:
        lines = (folder / "sensor_geometry.csv").read_bytes().split(b"\n")
        names = [name.strip() for name in lines[0].replace(b'"', b"").rstrip(b"\r").split(b",")]
        assert np.isfinite(value.xyz).all()
        if any(b'"' in line for line in lines):
            return  # quoting is csv's business
        for line in b"\r".join(lines[1:]).split(b"\r"):
            if line:
                cells = dict(zip(names, line.split(b","), strict=False))
                assert all(number.fullmatch(cells[name]) for name in (b"sensor_id", b"x", b"y", b"z")), line
                x = [float(cells[axis]) for axis in (b"x", b"y", b"z")]
                assert value.xyz[int(cells[b"sensor_id"])].tolist() == x, line

    seed = _files(lambda folder: write_geometry_csv(folder / "sensor_geometry.csv", icecube86()))
    cells = st.one_of(st.integers(-2, 5161).map(str), st.floats().map(str), st.text(max_size=6))
    rows = st.lists(st.lists(cells, min_size=3, max_size=5).map(",".join), max_size=6)
    made = rows.map(
        lambda rows: {"sensor_geometry.csv": "\n".join(["sensor_id,x,y,z", *rows]).encode("utf-8", "replace")}
    )
    return Reader([seed], lambda folder: read_geometry_csv(folder / "sensor_geometry.csv"), check, [made])


def _cache() -> Reader:
    """The event store, its manifest and checksums included."""
    from iceaggr.data.cache import build_cache, open_cache

    def make(folder: Path) -> None:
        with TemporaryDirectory() as source:
            _kaggle_folder(Path(source))
            build_cache(source, folder)

    def read(folder: Path) -> Any:
        store = open_cache(folder)
        store.verify()
        return {name: np.array(x) for name, x in store.arrays.items()}, vars(store.gather(range(store.n_events)))

    seed = _files(make)
    with TemporaryDirectory() as name:
        _write(Path(name), seed)
        expected = read(Path(name))
    manifest = json.loads(seed["manifest.json"])
    changed = st.tuples(st.sampled_from(sorted(manifest)), _JSON).map(lambda kv: {**manifest, kv[0]: kv[1]})
    names = st.lists(st.sampled_from([*manifest["arrays"], "../word", "/etc/passwd", "x"]), max_size=10)
    named = names.map(lambda arrays: {**manifest, "arrays": arrays})
    made = (changed | named).map(lambda m: {**seed, "manifest.json": json.dumps(m).encode("utf-8", "replace")})
    return Reader([seed], read, _same_as(expected), [made])


# --- lab_shared: checkpoints, weights, configurations, run folders ---


def _checkpoint() -> Reader:
    """Resume states; and ones put together by a stranger, with a checksum that is right."""
    import safetensors.torch
    from lab_shared import checkpoint

    tree = {
        "model": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.zeros(0), "h": torch.ones(3, dtype=torch.bfloat16)},
        "optim": {"state": {0: {"step": 3, "avg": torch.full((2, 2), 0.5)}}, "groups": [{"betas": (0.9, 1)}]},
        "rng": [{"python": (3, tuple(range(20)), None), "numpy": np.arange(9, dtype=np.uint64)}],
        "loop": {"step": 7, "best": math.inf, "name": "é"},
    }  # fmt: skip
    seed = {"step_000000007.safetensors": checkpoint.encode_tree(tree)}
    tensors = {"a": torch.arange(4, dtype=torch.uint8), "b": torch.ones(2)}
    marks = st.dictionaries(
        st.sampled_from(["~tensor", "~array", "~dict", "~tuple", "dtype", "shape", "x"]),
        st.sampled_from(["a", "b", "c", "../a", "|O", "<u4", "V1", "|S99", [2], [-1], [4], [10**9], 3, None, [[{}, 1]]])
        | _JSON,
        max_size=4,
    )
    forged = st.recursive(marks | _JSON, lambda inner: st.lists(inner, max_size=3), max_leaves=4)

    def forge(packed: Any) -> Files:
        header = {"format": 1, "blake2b": checkpoint._digest(packed, tensors), "tree": packed}
        return {"step_000000007.safetensors": safetensors.torch.save(tensors, {"checkpoint": json.dumps(header)})}

    def check(folder: Path, value: Any) -> None:
        original = (folder / "step_000000007.safetensors").read_bytes() != seed["step_000000007.safetensors"]
        header_len = struct.unpack("<Q", (folder / "step_000000007.safetensors").read_bytes()[:8])[0]
        assert header_len < 10**6
        plain = (dict, list, tuple, str, int, float, bool, type(None), torch.Tensor, np.ndarray)
        assert isinstance(value, plain)
        if original and isinstance(value, dict) and value.keys() == tree.keys():
            assert _equal(value, tree), "accepted with another content than was written"

    def read(folder: Path) -> Any:
        return checkpoint.load_tree(folder / "step_000000007.safetensors")

    return Reader([seed], read, check, [forged.map(forge)])


def _weights() -> Reader:
    """A weights file for a model."""
    from lab_shared.checkpoint import load_weights, save_weights
    from torch import nn

    def read(folder: Path) -> Any:
        model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        load_weights(folder / "weights.safetensors", model)
        return model.state_dict()

    def check(folder: Path, value: Any) -> None:
        assert {name: tuple(x.shape) for name, x in value.items()} == shapes

    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    return Reader([_files(lambda folder: save_weights(folder / "weights.safetensors", model))], read, check)


def _config() -> Reader:
    """config.json of all four packages."""
    from attn_clustering.config import EXPERIMENTS, RunConfig, run_config
    from gauge_attn.config import PRESETS as GAUGE
    from gauge_attn.config import TrainConfig as Gauge
    from iceaggr.config import PRESETS as ICE
    from iceaggr.config import TrainConfig as Ice
    from lab_shared.config import from_json, read_config, to_json
    from rh_memory.config import PRESETS as ZEROS
    from rh_memory.config import TrainConfig as Zeros

    configs = {
        "ice": (Ice, next(iter(ICE.values()))[1]),
        "zeros": (Zeros, next(iter(ZEROS.values()))[1]),
        "gauge": (Gauge, next(iter(GAUGE.values()))[1]),
        "attn": (RunConfig, run_config(EXPERIMENTS["smoke"][1], "mha", "shuffled", 0)),
    }
    seeds: list[Files] = [{f"{name}.json": to_json(config).encode()} for name, (_, config) in configs.items()]

    def read(folder: Path) -> Any:
        file = next(folder.glob("*.json"))
        return read_config(configs[file.stem][0], file)

    def check(folder: Path, value: Any) -> None:
        assert from_json(type(value), to_json(value)) == value

    def paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        inner = [p for key, x in value.items() for p in paths(x, (*path, key))] if isinstance(value, dict) else []
        return [path, *inner] if path else inner

    def replaced(value: Any, path: tuple[str, ...], new: Any) -> Any:
        return {**value, path[0]: replaced(value[path[0]], path[1:], new)} if path else new

    @st.composite
    def changed(draw: st.DrawFn) -> Files:
        seed = draw(st.sampled_from(seeds))
        ((name, text),) = seed.items()
        value = json.loads(text)
        for _ in range(draw(st.integers(1, 3))):
            path = draw(st.sampled_from(paths(value)))
            value = replaced(value, path, draw(st.sampled_from([0, -1, 1, 10**400, 1e300, "", [], {}, True]) | _JSON))
        return {name: json.dumps(value).encode("utf-8", "replace")}

    return Reader(seeds, read, check, [changed()])


def _run_folder() -> Reader:
    """A run folder that is opened again: manifest.json, config.json, metrics.jsonl."""
    from lab_shared import run

    without_git: Any = patch.object(run, "_record_session", lambda *_: {})  # git is slow and beside the point

    def make(folder: Path) -> None:
        command = "again {path}"
        with (
            without_git,
            run.Run.create(
                folder, FuzzConfig(), seed=3, project="fuzz", resume_command=command, wandb="disabled"
            ) as started,
        ):
            for step in range(1, 4):
                started.log(step, "train", {"loss": 1.0 / step})
        (folder / "run.lock").unlink()

    def read(folder: Path) -> Any:
        with without_git, run.Run.open(folder) as opened:
            config = opened.config(FuzzConfig)
            opened.rewind(2)
            return opened.seed, opened.resume_command, config, run.read_metrics(folder)

    def check(folder: Path, value: Any) -> None:
        seed, command, config, records = value
        assert type(seed) is int
        assert isinstance(command, str)
        assert type(config.steps) is int
        assert all(record["step"] <= 2 for record in records)

    return Reader([_files(make)], read, check)


@dataclass(frozen=True)
class FuzzConfig:
    """The configuration of a run without options."""

    steps: int = 3
    rate: float = 0.5


# --- rh_memory ---


@cache
def _first_zeros() -> Any:
    from rh_memory.zeros.generate import main
    from rh_memory.zeros.store import load

    with TemporaryDirectory() as name:
        main(200, Path(name) / "z.npy", "cpu")
        zeros = load(Path(name) / "z.npy")
        return np.array(zeros.centre), np.array(zeros.offset)


def _zeros_file() -> Reader:
    """FILE.npy with FILE.json."""
    from rh_memory.zeros.store import Zeros, load, save

    centre, offset = _first_zeros()
    seed = _files(lambda folder: save(folder / "zeros.npy", Zeros(centre, offset, {"first_index": 1})))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}, print], dtype=object), allow_pickle=True)
    zipped = io.BytesIO()
    np.savez(zipped, a=np.arange(3))
    raw = seed["zeros.npy"]

    def signed(data: bytes, count: int = 200) -> Files:
        manifest = {"count": count, "sha256": hashlib.sha256(data).hexdigest()}
        return {"zeros.npy": data, "zeros.json": json.dumps(manifest).encode()}

    headers = st.text(max_size=60).map(lambda text: text.encode("latin1", "replace"))
    made = headers.map(lambda h: signed(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(h)) + h + raw[128:]))
    shapes = st.sampled_from([b"(2, 200)", b"(-2, 200)", b"(2, 99999999999999)", b"(2,)", b"()", b"(200, 2)", b"x"])
    types = st.sampled_from([b"<f8", b">f8", b"|O", b"<f4", b"<U9", b"|V8"])
    typed = st.tuples(shapes, types).map(lambda st_: signed(raw.replace(b"(2, 200)", st_[0]).replace(b"<f8", st_[1])))

    def read(folder: Path) -> Any:
        zeros = load(folder / "zeros.npy")
        return np.array(zeros.centre), np.array(zeros.offset)

    def check(folder: Path, value: Any) -> None:
        assert all(x.dtype == np.float64 and x.ndim == 1 for x in value)
        if (folder / "zeros.npy").read_bytes() == raw:
            assert _equal(value, (centre, offset))

    seeds: list[Files] = [seed, signed(pickled.getvalue(), 2), signed(zipped.getvalue(), 3)]
    return Reader(seeds, read, check, [made, typed])


def _zero_tables() -> Reader:
    """Odlyzko's text, plain and gzipped, and Platt's binary files."""
    from rh_memory.zeros.tables import read_platt, read_text

    centre, offset = _first_zeros()
    lines = [f"{int(c)}{f'{o:.9f}'[1:]}" for c, o in zip(*_whole_and_rest(centre, offset), strict=True)]
    text = "\n".join(lines).encode() + b"\n"
    numbered = "\n".join(f"{i + 1} {line}" for i, line in enumerate(lines)).encode() + b"\n"
    count = 100
    height = centre + offset
    steps = np.diff(height[:count], prepend=14.0) * 2.0**40
    records = b"".join(int(step * 2**61).to_bytes(13, "little") for step in steps)
    platt = struct.pack("<QddQQ", 1, 14.0, math.ceil(height[count - 1]), 0, count) + records
    seeds: list[Files] = [
        {"zeros.txt": text},
        {"zeros.txt": numbered},
        {"zeros.txt.gz": gzip.compress(text, mtime=0)},
        {"zeros.dat": platt},
    ]

    def read(folder: Path) -> Any:
        file = next(folder.iterdir())
        return read_platt(file) if file.suffix == ".dat" else read_text(file)

    def check(folder: Path, value: Any) -> None:
        file = next(folder.iterdir())
        assert np.isfinite(value.height).all()
        assert (np.diff(value.height) > 0).all()
        if file.suffix != ".dat":
            data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            words = [line.split()[-1] for line in data.split(b"\n") if line.strip()]
            said = [float(word) for word in words if re.fullmatch(rb"\d+\.?\d*", word)]
            assert np.allclose(value.height[-1] - value.height[0], said[-1] - said[-len(value)], rtol=1e-9)

    rows = st.lists(
        st.floats(0, 500).map(lambda x: f"{x:.6f}") | st.text("0123456789.eE+-_ \t", max_size=9), max_size=9
    )
    made = rows.map(lambda rows: {"zeros.txt": "\n".join(rows).encode()})
    headers = st.binary(min_size=8, max_size=120).map(lambda data: {"zeros.dat": data})
    return Reader(seeds, read, check, [made, headers])


def _whole_and_rest(centre: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    whole = np.floor(centre + offset)
    return whole, centre - whole + offset


# --- text and prepared corpora ---


_DOCUMENTS = [f"Document {i}.\nIt has words, né, and a line end.\n" * 3 for i in range(40)]
_JSONL = "".join(json.dumps({"text": text, "topic": "ab"[i % 2]}) + "\n" for i, text in enumerate(_DOCUMENTS)).encode()
_LINES = st.lists(
    (st.fixed_dictionaries({"text": st.text(max_size=20)}) | _JSON).map(json.dumps) | st.text(max_size=9), max_size=30
)
_MADE_JSONL = _LINES.map(lambda lines: {"data.jsonl": "\n".join(lines).encode("utf-8", "replace")})


def _gauge_text() -> Reader:
    """gauge_attn's text: .txt, .jsonl, .jsonl.gz and a folder of splits."""
    from gauge_attn.data.text import read_splits

    plain = "".join(_DOCUMENTS).encode()
    seeds: list[Files] = [
        {"data.txt": plain},
        {"data.jsonl": _JSONL},
        {"data.jsonl.gz": gzip.compress(_JSONL, mtime=0)},
        {"all/train.txt": plain, "all/valid.txt": plain[:200], "all/test.raw": plain[200:500]},
    ]

    def read(folder: Path) -> Any:
        entry = next(folder.iterdir())
        return read_splits(str(entry), None, "documents" if ".jsonl" in entry.name else "contiguous")

    def check(folder: Path, value: Any) -> None:
        assert set(value) == {"train", "valid", "test"}
        for text in value.values():
            text.encode()  # what every tokenizer does with it
        entry = next(folder.iterdir())
        if entry.suffix == ".txt":
            assert "".join(value[name] for name in ("train", "valid", "test")) == entry.read_bytes().decode()

    return Reader(seeds, read, check, [_MADE_JSONL])


def _attn_text() -> Reader:
    """attn_clustering's sources: .txt, .jsonl, .jsonl.gz, .parquet."""
    import polars as pl
    from attn_clustering.data.settings import CorpusConfig
    from attn_clustering.data.sources import documents

    table = io.BytesIO()
    pl.DataFrame({"text": _DOCUMENTS[:5], "topic": list("abcab")}).write_parquet(table)
    seeds: list[Files] = [
        {"data.txt": "".join(_DOCUMENTS).encode()},
        {"data.jsonl": _JSONL},
        {"data.jsonl.gz": gzip.compress(_JSONL, mtime=0)},
        {"data.parquet": table.getvalue()},
    ]

    def read(folder: Path) -> Any:
        return list(documents(CorpusConfig(sources=(str(next(folder.iterdir())),), topic_field="topic")))

    def check(folder: Path, value: Any) -> None:
        for document in value:
            document.text.encode()
            assert isinstance(document.topic, str)

    return Reader(seeds, read, check, [_MADE_JSONL])


def _prepared_corpus() -> Reader:
    """A folder that `attn-clustering prepare` has made, as training reads it."""
    from attn_clustering.data import corpus
    from attn_clustering.data.stages import stage

    rng = np.random.default_rng(1)
    arrays = {
        f"{split}.{what}.npy": rng.integers(0, top, (n, 16)).astype(kind)
        for split, n in (("train", 6), ("val", 3))
        for what, top, kind in (("tokens", 300, np.uint16), ("topics", 2, np.uint8))
    }

    def make(folder: Path) -> None:
        def write() -> dict[str, Any]:
            for name, array in arrays.items():
                np.save(folder / name, array)
            return {"names": ["a", "b"], "vocab": 300, "seq_len": 16, "segments": [1, 2], "min_segment": 4}

        stage(folder, "sequences", list(arrays), {}, write)

    def read(folder: Path) -> Any:
        return [vars(corpus.load(folder, split)) for split in corpus.SPLITS], corpus.describe(folder)

    seed = _files(make)

    def check(folder: Path, value: Any) -> None:
        splits, facts = value
        if all((folder / name).read_bytes() == seed[name] for name in arrays):
            names = facts["names"]
            assert all(isinstance(name, str) for name in names)
        for split, found in zip(corpus.SPLITS, splits, strict=True):
            assert np.array_equal(found["tokens_NT"].numpy(), arrays[f"{split}.tokens.npy"])
            assert np.array_equal(found["topics_NT"].numpy(), arrays[f"{split}.topics.npy"])

    manifest = json.loads(seed["sequences.manifest.json"])
    changed = st.tuples(st.sampled_from(sorted(manifest["facts"])), _JSON).map(
        lambda kv: {**manifest, "facts": {**manifest["facts"], kv[0]: kv[1]}}
    )
    replaced = st.tuples(st.sampled_from(sorted(manifest)), _JSON).map(lambda kv: {**manifest, kv[0]: kv[1]})
    made = (changed | replaced).map(
        lambda m: {**seed, "sequences.manifest.json": json.dumps(m).encode("utf-8", "replace")}
    )
    return Reader([seed], read, check, [made])


def _plan() -> Reader:
    """attn_clustering's saved order of sequences (npz)."""
    from attn_clustering.data.ordering import Plan, plan

    made = plan("shuffled", torch.arange(12) % 3, steps=5, batch=4, seed=1)

    def check(folder: Path, value: Any) -> None:
        assert torch.equal(value.index_S, made.index_S)
        assert (value.steps, value.batch, value.kind) == (made.steps, made.batch, made.kind)

    seed = _files(lambda folder: made.save(folder / "plan.npz"))
    return Reader([seed], lambda folder: Plan.load(folder / "plan.npz"), check)


def _tokenizer() -> Reader:
    """gauge_attn's tokenizer.json of a run."""
    from gauge_attn.data.tokenizers import Tokenizer, train_tokenizer

    text = "".join(_DOCUMENTS)
    made = [train_tokenizer("byte", text, 256), train_tokenizer("word", text, 12), train_tokenizer("bpe", text, 270)]
    seeds: list[Files] = [{"tokenizer.json": tokenizer.to_json().encode()} for tokenizer in made]

    def check(folder: Path, value: Any) -> None:
        symbols = value.encode("It has words.\n")
        assert symbols.min() >= 0
        assert symbols.max() < value.vocab
        value.decode(symbols.tolist())

    kinds = st.sampled_from(["byte", "word", "bpe", "x"]) | _JSON
    symbols = st.lists(_JSON | st.lists(st.integers(-1, 300)))
    changed = st.fixed_dictionaries({"kind": kinds, "symbols": symbols}).map(
        lambda facts: {"tokenizer.json": json.dumps(facts).encode("utf-8", "replace")}
    )
    return Reader(seeds, lambda folder: Tokenizer.read(folder / "tokenizer.json"), check, [changed])


def _hugging_face() -> Reader:
    """A Qwen3 folder from the Hugging Face hub."""
    from attn_clustering.config import ModelConfig
    from attn_clustering.hf import export_model, import_hf
    from attn_clustering.model import Transformer

    small = ModelConfig(vocab=32, d_model=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=8)
    torch.manual_seed(0)
    seed = _files(lambda folder: export_model(Transformer(small), folder, max_len=16))
    config = json.loads(seed["config.json"])
    values: st.SearchStrategy[Any] = st.sampled_from([0, -1, 1, 3, 8.0, "8", None, [], {}, True, 10**30, 1e999]) | _JSON
    changed = st.tuples(st.sampled_from(sorted(config)), values).map(lambda kv: {**config, kv[0]: kv[1]})
    made = changed.map(lambda c: {**seed, "config.json": json.dumps(c).encode("utf-8", "replace")})

    def check(folder: Path, value: Any) -> None:
        assert value.config.vocab == 32
        assert value.config.layers == 1
        with torch.no_grad():
            value(torch.zeros(1, 4, dtype=torch.long))

    return Reader([seed], import_hf, check, [made])


def _write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


READERS: dict[str, Callable[[], Reader]] = {
    "kaggle-parquet": _kaggle,
    "geometry-csv": _geometry,
    "event-cache": _cache,
    "checkpoint": _checkpoint,
    "weights": _weights,
    "config-json": _config,
    "run-folder": _run_folder,
    "zeros-npy": _zeros_file,
    "zeros-tables": _zero_tables,
    "gauge-text": _gauge_text,
    "attn-text": _attn_text,
    "prepared-corpus": _prepared_corpus,
    "plan-npz": _plan,
    "gauge-tokenizer": _tokenizer,
    "hugging-face": _hugging_face,
}

ABORTING = {_kaggle, _attn_text}
"""Readers of parquet: for some damaged pages polars asks for exabytes, and Rust ends the process (SIGABRT, with a line
on stderr). Nothing in Python can turn that into an error; such cases are counted and listed in the record."""
