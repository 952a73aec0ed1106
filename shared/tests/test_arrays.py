"""numpy files: atomic, without pickles, and one error for everything that can be wrong."""

import io
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_shared.arrays import ArrayFileError, load_array, load_arrays, save_array, save_arrays
from lab_shared.files import StorageError


def test_round_trip(tmp_path):
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)
    save_array(tmp_path / "a.npy", array)
    save_arrays(tmp_path / "b.npz", x=array, y=np.array(["é"]))
    mapped = load_array(tmp_path / "a.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, array)
    assert mapped.dtype == array.dtype
    found = load_arrays(tmp_path / "b.npz")
    assert list(found) == ["x", "y"]
    assert np.array_equal(found["x"], array)
    assert found["y"][0] == "é"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "b.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_arrays(tmp_path / "a.npz", x=np.zeros(3))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="free some space"):
        save_arrays(tmp_path / "a.npz", x=np.ones(3))
    assert load_arrays(tmp_path / "a.npz")["x"].sum() == 0


class Bomb:
    """Says so when a pickle of it is loaded."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def test_pickles_are_refused_both_ways(tmp_path):
    objects = np.array([Bomb()], dtype=object)
    with pytest.raises(ValueError, match="pickle"):
        save_array(tmp_path / "a.npy", objects)
    np.save(tmp_path / "bomb.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "bomb.npz", a=objects)
    with pytest.raises(ArrayFileError, match=r"bomb\.npy"):
        load_array(tmp_path / "bomb.npy")
    with pytest.raises(ArrayFileError, match=r"bomb\.npz"):
        load_arrays(tmp_path / "bomb.npz")


def test_the_wrong_kind_and_nothing_at_all(tmp_path):
    np.savez(tmp_path / "b.npy.npz", a=np.zeros(2))
    (tmp_path / "b.npy.npz").rename(tmp_path / "b.npy")
    with pytest.raises(ArrayFileError, match="archive of arrays"):
        load_array(tmp_path / "b.npy")
    for read in (load_array, load_arrays):
        with pytest.raises(ArrayFileError, match=r"there is no .*absent\.np"):
            read(tmp_path / "absent.np")


@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_changed_byte_is_the_same_content_or_an_error(tmp_path_factory, at, byte):
    """In an archive, which has checksums. The member's name is outside of them."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(50))
    data = bytearray(buffer.getvalue())
    data[at % len(data)] = byte
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(data)
    try:
        found = load_arrays(path)
    except ArrayFileError:
        return
    assert all(np.array_equal(array, np.arange(50)) for array in found.values())
