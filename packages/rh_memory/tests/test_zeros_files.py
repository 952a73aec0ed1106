"""Files of zeros: resumed, damaged, asked for twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from lab_shared.files import StorageError
from rh_memory.zeros import generate
from rh_memory.zeros.generate import GenerationError, main, plan
from rh_memory.zeros.store import Zeros, ZerosError, default_zeros, load, save


def test_layout_of_the_file(zeros_file, zeros):
    array = np.load(zeros_file)
    assert array.shape == (2, 20_000)
    assert array.dtype == np.float64
    np.testing.assert_array_equal(array[0] + array[1], zeros.height)
    assert np.all(np.abs(zeros.offset) <= 16)
    assert np.all(zeros.centre == np.round(zeros.centre))
    assert [p.name for p in zeros_file.parent.iterdir() if "part" in p.name] == []


def test_small_counts(tmp_path):
    assert main(1, tmp_path / "one.npy", "cpu")["count"] == 1
    assert load(tmp_path / "one.npy").height == pytest.approx([14.134725141734694], abs=1e-14)


def test_chunks_do_not_show(zeros, tmp_path):
    manifest = main(20_000, tmp_path / "z.npy", "cpu", zeros_per_chunk=5000)
    assert manifest["chunks"] == 4
    again = load(tmp_path / "z.npy")
    assert np.abs((again.centre - zeros.centre) + (again.offset - zeros.offset)).max() < 1e-12
    for key in ("s_histogram", "gram_points", "hidden_pairs", "zeros_below"):
        assert again.manifest[key] == zeros.manifest[key]


def test_resumes_after_a_failure_at_a_chunk_border(tmp_path, monkeypatch):
    out, done, compute = tmp_path / "z.npy", [], generate.compute_chunk

    def fails_at_the_third(lower, upper, device):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(lower)
        return compute(lower, upper, device)

    monkeypatch.setattr(generate, "compute_chunk", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        main(8000, out, "cpu", zeros_per_chunk=2000)
    assert not out.exists()

    resumed = []
    monkeypatch.setattr(generate, "compute_chunk", lambda *a: (resumed.append(a[0]), compute(*a))[1])
    main(8000, out, "cpu", zeros_per_chunk=2000)
    assert len(resumed) == 2
    assert not set(resumed) & set(done)
    main(8000, tmp_path / "whole.npy", "cpu", zeros_per_chunk=2000)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_a_part_of_another_count_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "compute_chunk", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main(100, tmp_path / "z.npy", "cpu")
    monkeypatch.undo()
    assert main(200, tmp_path / "z.npy", "cpu")["count"] == 200


@pytest.mark.slow
def test_resumes_after_kill_9(tmp_path):
    out = tmp_path / "z.npy"
    call = f"from rh_memory.zeros.generate import main; main(30_000, {str(out)!r}, 'cpu', zeros_per_chunk=2000)"
    child = subprocess.Popen([sys.executable, "-c", call], stderr=subprocess.DEVNULL)
    state = tmp_path / ".z.npy.part.json"
    while not state.exists() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert state.exists()
    before = len(json.loads(state.read_text())["chunks"])
    assert 0 < before < 15
    main(30_000, out, "cpu", zeros_per_chunk=2000)
    main(30_000, tmp_path / "whole.npy", "cpu", zeros_per_chunk=2000)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_impossible_counts(tmp_path):
    with pytest.raises(GenerationError, match="at least 1"):
        main(0, tmp_path / "z.npy")
    with pytest.raises(GenerationError, match="phases are exact up to"):
        main(10**10, tmp_path / "z.npy")
    with pytest.raises(GenerationError, match=r"must end in \.npy"):
        main(10, tmp_path / "z.bin")
    assert list(tmp_path.iterdir()) == []  # no part file of 160 GB
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(GenerationError, match="is a folder: name a file"):
        main(10, tmp_path / "folder.npy")


@pytest.mark.parametrize("note", ["{", "[]", "{}"])
def test_a_note_that_cannot_be_read_is_no_state(tmp_path, note):
    (tmp_path / ".z.npy.part.json").write_text(note)
    assert main(10, tmp_path / "z.npy", "cpu")["count"] == 10


def test_the_plan_reaches_every_count():
    for count in (1, 999, 2_001_052, 100_000_000):
        borders = plan(count, 1 << 18)
        assert borders[0] == 8
        assert all(b > a and (b - a) % 32 == 0 for a, b in pairwise(borders))


def test_incomplete_zeros_are_refused(monkeypatch):
    monkeypatch.setattr(generate, "_SAMPLES_PER_GAP", (1.0,))
    with pytest.raises(GenerationError, match="cannot be shown to be complete"):
        generate.compute_chunk(100_000, 101_024)


def test_save_and_load(tmp_path, zeros):
    save(tmp_path / "deep" / "z.npy", Zeros(zeros.centre[:10], zeros.offset[:10], {"first_index": 1}))
    again = load(tmp_path / "deep" / "z.npy", 4)
    np.testing.assert_array_equal(again.height, zeros.height[:4])
    assert isinstance(again.centre, np.memmap)
    with pytest.raises(ZerosError, match="holds 10"):
        load(tmp_path / "deep" / "z.npy", 11)


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "bad manifest", "wrong count", "empty"])
def test_damaged_files_are_named(tmp_path, zeros, damage):
    path = tmp_path / "z.npy"
    save(path, Zeros(zeros.centre[:100], zeros.offset[:100]))
    data, manifest = bytearray(path.read_bytes()), tmp_path / "z.json"
    if damage == "flip":
        data[700] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-50])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "count": 99}))
    with pytest.raises(ZerosError, match=r"z\.(npy|json)"):
        load(path)


def test_missing_file(tmp_path):
    with pytest.raises(ZerosError, match="rh-memory zeros"):
        load(tmp_path / "none.npy")
    with pytest.raises(ZerosError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "zeros6.txt").write_text("14.1\n")
    with pytest.raises(ZerosError, match=r"rh-memory import .*zeros6\.txt"):
        load(tmp_path / "zeros6.txt")


def test_default_zeros_are_computed_once(tmp_path, monkeypatch):
    first = default_zeros(50, tmp_path)
    monkeypatch.setattr(generate, "compute_chunk", None)
    note = tmp_path / ".zeros_50.npy.part.json"  # of a process killed between the manifest and the note's removal
    note.write_text("{}")
    np.testing.assert_array_equal(default_zeros(50, tmp_path).height, first.height)
    assert not note.exists()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        main(10, tmp_path / "file" / "z.npy", "cpu")
