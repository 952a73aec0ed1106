"""iceaggr's files: Kaggle folders, sensor geometry, event stores."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from readers.base import JSON, Files, Reader, files_of, same_as, write


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


def kaggle() -> Reader:
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

    return Reader([files_of(_kaggle_folder)], read, check, [tables()])


def geometry() -> Reader:
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

    seed = files_of(lambda folder: write_geometry_csv(folder / "sensor_geometry.csv", icecube86()))
    cells = st.one_of(st.integers(-2, 5161).map(str), st.floats().map(str), st.text(max_size=6))
    rows = st.lists(st.lists(cells, min_size=3, max_size=5).map(",".join), max_size=6)
    made = rows.map(
        lambda rows: {"sensor_geometry.csv": "\n".join(["sensor_id,x,y,z", *rows]).encode("utf-8", "replace")}
    )
    return Reader([seed], lambda folder: read_geometry_csv(folder / "sensor_geometry.csv"), check, [made])


def cache() -> Reader:
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

    seed = files_of(make)
    with TemporaryDirectory() as name:
        write(Path(name), seed)
        expected = read(Path(name))
    manifest = json.loads(seed["manifest.json"])
    changed = st.tuples(st.sampled_from(sorted(manifest)), JSON).map(lambda kv: {**manifest, kv[0]: kv[1]})
    names = st.lists(st.sampled_from([*manifest["arrays"], "../word", "/etc/passwd", "x"]), max_size=10)
    named = names.map(lambda arrays: {**manifest, "arrays": arrays})
    made = (changed | named).map(lambda m: {**seed, "manifest.json": json.dumps(m).encode("utf-8", "replace")})
    return Reader([seed], read, same_as(expected), [made])
