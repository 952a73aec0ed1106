"""Files written whole or not at all: what cannot be written is said, what is no plain file is left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab_shared.files import StorageError, atomic_write


@pytest.mark.parametrize("name", ["file/x.json", "y" * 253, "."])
def test_what_is_wrong_with_a_path_is_said(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"choose (a shorter|another) (name|folder)"):
        atomic_write(tmp_path / name if name != "." else tmp_path, "x")


def test_links_stay_and_what_is_no_file_is_not_replaced(tmp_path):
    link, null = tmp_path / "link", tmp_path / "null"
    link.symlink_to("target")
    null.symlink_to("/dev/null")
    for path in (link, null):
        atomic_write(path, "x")
        assert path.is_symlink()
    assert (tmp_path / "target").read_text() == "x"
    assert Path("/dev/null").is_char_device()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "null", "target"]


def test_a_name_that_is_no_unicode_is_said(tmp_path):
    with pytest.raises(StorageError, match="no Unicode"):
        atomic_write(tmp_path / "x.json", '{"folder": "/data/\udcff"}')
    assert not list(tmp_path.iterdir())
