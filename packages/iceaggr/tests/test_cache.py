"""The event store: lossless, resumable, checked, and the same on every path out of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.data import cache as cache_module
from iceaggr.data import packing
from iceaggr.data.bench import bench_cache, synthetic_pulses
from iceaggr.data.cache import EventCache, build_cache, open_cache
from iceaggr.data.kaggle import KaggleFolder, slice_events, write_batch, write_meta
from iceaggr.data.pulses import Pulses
from iceaggr.data.schema import EventIdError, Events
from iceaggr.data.storefiles import CacheError
from lab_shared.files import StorageError


@pytest.fixture
def source(make_pulses, tmp_path) -> Path:
    """Three labelled batch files of 4, 5 and 6 events."""
    root = tmp_path / "source"
    events = {}
    for batch in (1, 2, 3):
        pulses = make_pulses(np.arange(2, 6 + batch), seed=batch)
        pulses = Pulses(**vars(pulses) | {"event_id_E": pulses.event_id_E + 1000 * batch})
        write_batch(root / "train" / f"batch_{batch}.parquet", pulses)
        first, last = pulses.offsets_E1[:-1].numpy(), pulses.offsets_E1[1:].numpy() - 1
        ids, azimuth, zenith = (x.numpy() for x in (pulses.event_id_E, pulses.azimuth_E, pulses.zenith_E))
        events[batch] = Events(ids, first, last, azimuth, zenith)
    write_meta(root / "train_meta.parquet", events)
    return root


def naive_gather(pulses: Pulses, indices: list[int]) -> Pulses:
    parts = [slice_events(pulses, i, i + 1) for i in indices]
    joined = {
        name: None if value is None else torch.cat([getattr(part, name) for part in parts])
        for name, value in vars(parts[0]).items()
    }
    counts = torch.cat([part.counts_E for part in parts])
    return Pulses(**joined | {"offsets_E1": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])})


def with_odd_values(pulses: Pulses, seed: int) -> Pulses:
    """Some charges off the grid or huge, some times beyond 18 bits."""
    rng = np.random.default_rng(seed)
    charge, time = pulses.charge_P.clone(), pulses.time_P.clone()
    odd = torch.from_numpy(rng.random(pulses.n_pulses))
    charge[odd < 0.1] += 0.011
    charge[odd < 0.05] = 1e5
    late = torch.from_numpy(rng.random(pulses.n_pulses) < 0.1)
    time[late] += 300_000
    time[torch.from_numpy(rng.random(pulses.n_pulses) < 0.05)] = -7
    return Pulses(**vars(pulses) | {"charge_P": charge, "time_P": time})


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    picks=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    odd=st.booleans(),
    chunk=st.sampled_from([1, 16, 1 << 16]),
    seed=st.integers(0, 2**20),
)
def test_gathering_equals_a_loop_over_events(make_pulses, same_pulses, counts, picks, odd, chunk, seed):
    pulses = make_pulses(counts, seed=seed, labelled=bool(seed % 2))
    pulses = with_odd_values(pulses, seed) if odd else pulses
    cache = EventCache.in_memory(pulses)
    picks = [i % len(counts) for i in picks]
    expected = naive_gather(pulses, picks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "_CHUNK", chunk)
        same_pulses(cache.gather(picks), expected)
    same_pulses(cache.to_device("cpu").gather(np.array(picks)), expected)
    with pytest.MonkeyPatch.context() as patch:  # the decoder of other devices
        patch.setattr(packing, "_unpack_on_cpu", packing._unpack_by_torch)
        same_pulses(cache.gather_packed(picks).unpack(), expected)


def test_every_charge_and_time_code_survives():
    codes = np.arange(65_600)
    n = len(codes)
    pulses = Pulses(
        event_id_E=torch.tensor([1]),
        offsets_E1=torch.tensor([0, n]),
        sensor_P=torch.from_numpy((codes % 5160).astype(np.int32)),
        time_P=torch.from_numpy((codes * 4 + 3).astype(np.int32)),
        charge_P=torch.from_numpy((codes / 40).astype(np.float32)),
        auxiliary_P=torch.from_numpy(codes % 3 == 0),
    )
    cache = EventCache.in_memory(pulses)
    back = cache.gather([0])
    assert all(torch.equal(x, getattr(back, name)) for name, x in vars(pulses).items() if x is not None)
    # Only charges from 65,535 steps on and times from 2^18 ns on need the escape table.
    assert len(cache.arrays["escape_index"]) == int(((codes >= 65_535) | (codes * 4 + 3 >= 2**18)).sum())


def test_times_beyond_int32_keep_their_type(make_pulses):
    pulses = make_pulses([3, 4])
    time = pulses.time_P.to(torch.int64)
    time[-1] = 2**40
    cache = EventCache.in_memory(Pulses(**vars(pulses) | {"time_P": time}))
    assert cache.gather([0]).time_P.dtype == torch.int64
    assert int(cache.gather([1]).time_P[-1]) == 2**40


def test_real_events_are_stored_without_loss(real_mini, same_pulses, tmp_path):
    seen: list[int] = []
    cache = build_cache(real_mini, tmp_path / "store", progress=seen.append)
    pulses = KaggleFolder(real_mini).read_batch(1)
    same_pulses(cache.gather(np.arange(5)), pulses)
    assert seen == [5]
    assert len(cache.arrays["escape_index"]) == 0
    assert cache.n_pulses_E.tolist() == [61, 51, 36, 142, 62]
    assert np.allclose(np.linalg.norm(cache.direction_E3, axis=1), 1, atol=1e-15)
    assert np.allclose(np.arccos(cache.direction_E3[:, 2]), pulses.zenith_E)
    cache.verify()


def test_a_folder_of_several_files(source, same_pulses, tmp_path):
    seen: list[int] = []
    cache = build_cache(source, tmp_path / "store", progress=seen.append)
    assert seen == [5, 11, 18]
    folder = KaggleFolder(source)
    row = 0
    for batch in folder.batch_ids:
        pulses = folder.read_batch(batch)
        same_pulses(cache.gather(np.arange(row, row + pulses.n_events)), pulses)
        row += pulses.n_events
    assert row == cache.n_events
    doms = [len(set(cache.gather([i]).sensor_P.tolist())) for i in range(row)]
    assert cache.n_doms.tolist() == doms
    with pytest.raises(IndexError, match=r"0\.\.17"):
        cache.gather([18])
    with pytest.raises(IndexError):
        cache.gather([-1])


def test_at_most_8_bytes_per_pulse():
    cache = EventCache.in_memory(synthetic_pulses(2000))
    assert 6 < cache.n_bytes / cache.n_pulses < 6.3


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read: list[int] = []
    original = KaggleFolder.read_batch
    monkeypatch.setattr(KaggleFolder, "read_batch", lambda self, b: (read.append(b), original(self, b))[1])
    return read


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_an_interrupted_build_goes_on(source, same_pulses, tmp_path, monkeypatch, stop_at):
    whole = build_cache(source, tmp_path / "whole")
    original = cache_module.append_shard

    def killed(folder, manifest, arrays, shard):
        if shard["file"] == f"batch_{stop_at}.parquet":
            # Half of this shard's bytes are in the files, the manifest does not know of them.
            for name in manifest.arrays:
                with (folder / f"{name}.bin").open("ab") as handle:
                    handle.write(b"\xff" * 37)
            raise KeyboardInterrupt
        original(folder, manifest, arrays, shard)

    monkeypatch.setattr(cache_module, "append_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        build_cache(source, tmp_path / "store")
    with pytest.raises(CacheError):
        open_cache(tmp_path / "store")
    monkeypatch.undo()
    read = count_reads(monkeypatch)
    cache = build_cache(source, tmp_path / "store")
    assert read == list(range(stop_at, 4))
    cache.verify()
    same_pulses(cache.gather(np.arange(18)), whole.gather(np.arange(18)))
    for file in (tmp_path / "whole").glob("*.bin"):
        assert file.read_bytes() == (tmp_path / "store" / file.name).read_bytes()


def test_a_finished_store_is_not_built_again(source, tmp_path, monkeypatch):
    build_cache(source, tmp_path / "store")
    read = count_reads(monkeypatch)
    assert build_cache(source, tmp_path / "store").n_events == 18
    assert read == []


def test_a_limit_cuts_and_a_larger_one_completes(source, same_pulses, tmp_path, monkeypatch):
    whole = build_cache(source, tmp_path / "whole")
    assert build_cache(source, tmp_path / "store", limit_events=7).n_events == 7
    read = count_reads(monkeypatch)
    assert build_cache(source, tmp_path / "store", limit_events=6).n_events == 7
    assert read == []
    cache = build_cache(source, tmp_path / "store")
    assert read == [2, 3]
    same_pulses(cache.gather(np.arange(18)), whole.gather(np.arange(18)))
    cache.verify()


def test_another_source_is_refused(source, make_pulses, tmp_path):
    build_cache(source, tmp_path / "store")
    write_batch(source / "train" / "batch_2.parquet", make_pulses([9] * 6, seed=77))
    with pytest.raises(CacheError, match=r"made from another batch_2\.parquet"):
        build_cache(source, tmp_path / "store")


def test_repeated_event_ids_are_refused(source, tmp_path):
    folder = KaggleFolder(source)
    shutil.copy(source / "train" / "batch_1.parquet", source / "train" / "batch_4.parquet")
    first = folder.read_events(1)
    write_meta(source / "train_meta.parquet", {b: folder.read_events(b) for b in (1, 2, 3)} | {4: first})
    with pytest.raises(EventIdError, match="is in two batch files"):
        build_cache(source, tmp_path / "store")


def test_damage_is_found(source, tmp_path):
    store = tmp_path / "store"
    cache = build_cache(source, store)
    word = store / "word.bin"
    content = bytearray(word.read_bytes())
    content[50] ^= 1
    word.write_bytes(content)
    with pytest.raises(CacheError, match=r"word\.bin is damaged in the part from batch_1\.parquet"):
        open_cache(store).verify()
    word.write_bytes(content[:-1])
    with pytest.raises(CacheError, match=r"word\.bin has .* bytes instead of"):
        open_cache(store)
    word.unlink()
    with pytest.raises(CacheError, match="is missing"):
        open_cache(store)
    manifest = store / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(CacheError, match="version 99"):
        open_cache(store)
    manifest.write_text(text[:100])
    with pytest.raises(CacheError, match="damaged"):
        open_cache(store)
    manifest.unlink()
    with pytest.raises(CacheError, match="not an event store"):
        open_cache(store)
    del cache


def test_a_full_disk_is_a_clear_error_and_the_build_can_go_on(source, tmp_path, monkeypatch):
    from iceaggr.data import storefiles

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storefiles.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        build_cache(source, tmp_path / "store")
    monkeypatch.undo()
    assert build_cache(source, tmp_path / "store").n_events == 18


def test_truth_and_labels_come_along(source, tmp_path):
    import polars as pl

    folder = KaggleFolder(source)
    ids = np.concatenate([folder.read_events(b).event_id_E for b in folder.batch_ids])
    kinds = np.where(np.arange(18) % 3 == 0, "track", "cascade")
    pl.DataFrame({"event_id": ids, "type": kinds, "energy": np.arange(18.0)}).write_parquet(source / "truth.parquet")
    cache = build_cache(source, tmp_path / "store", limit_events=13)
    assert cache.truth is not None
    assert cache.truth["type"].tolist() == [int(i % 3 == 0) for i in range(13)]
    assert cache.truth["energy"].tolist() == list(range(13))
    assert np.array_equal(cache.event_id, ids[:13])
    (source / "truth.parquet").unlink()
    with pytest.raises(CacheError, match=r"has energy, type, but .* has lost them"):
        build_cache(source, tmp_path / "store")


def test_unlabelled_stores_have_no_directions(make_pulses):
    cache = EventCache.in_memory(make_pulses([3], labelled=False))
    assert cache.azimuth is None
    assert cache.truth is None
    with pytest.raises(CacheError, match="no azimuth and zenith"):
        _ = cache.direction_E3


def test_the_benchmark_reports_rates():
    result = bench_cache(EventCache.in_memory(synthetic_pulses(500)), batch=64, seconds=0.02)
    assert result["gather_events_per_s"] > 0
    assert result["bytes_per_pulse"] < 6.3


@pytest.mark.gpu
def test_all_ways_to_a_gpu_agree(make_pulses, same_pulses):
    pulses = with_odd_values(make_pulses([30, 50, 10, 2000]), 1)
    cache = EventCache.in_memory(pulses)
    picks = [3, 0, 0, 2]
    expected = cache.gather(picks)
    same_pulses(cache.gather_packed(picks, pin=True).to("cuda").unpack().to("cpu"), expected)
    resident = cache.to_device("cuda")
    resident.gather(picks)  # the first call makes the charge table
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = resident.gather(picks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same_pulses(there.to("cpu"), expected)
    assert resident is cache.to_device("cuda:0")
