"""Published formats, written here from the definition of the format, read back, and broken in every way."""

from __future__ import annotations

import gzip
import os
import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rh_memory.data.unfold import spacings
from rh_memory.zeros import tables
from rh_memory.zeros.store import load
from rh_memory.zeros.tables import import_table


@pytest.fixture
def lines(zeros):
    """The first 3000 zeros as in Odlyzko's zeros6: 9 decimals, one per line."""
    return [f"{h:.9f}" for h in zeros.height[:3000]]


def write(path, lines, end="\n"):
    path.write_text("\n".join(lines) + end)
    return path


def platt_bytes(zeros, borders=(14, 1014, 2014)):
    """A file of Platt's layout, from exact integers."""
    exact = [
        Fraction(float(c)) + Fraction(float(o)) for c, o in zip(zeros.centre[:3000], zeros.offset[:3000], strict=True)
    ]
    parts = [struct.pack("<Q", len(borders) - 1)]
    for t0, t1 in pairwise(borders):
        before = sum(g < t0 for g in exact)
        inside = [g for g in exact if t0 <= g < t1]
        parts.append(struct.pack("<ddQQ", t0, t1, before, before + len(inside)))
        place = Fraction(t0)
        for g in inside:
            units = int((g - place) * 2**101)
            parts.append(struct.pack("<QIB", units % 2**64, units // 2**64 % 2**32, units // 2**96))
            place += Fraction(units, 2**101)
    return b"".join(parts)


def test_one_height_per_line(tmp_path, lines, zeros):
    manifest = import_table(write(tmp_path / "zeros6", lines), tmp_path / "z.npy")
    again = load(tmp_path / "z.npy")
    assert manifest["count"] == 3000
    assert manifest["first_index"] == 1
    assert np.abs(again.height - zeros.height[:3000]).max() < 1e-9
    assert again.manifest["decimals"] == 9


@pytest.mark.parametrize("style", ["padded", "crlf", "no final newline", "gzip", "indexed", "blank lines"])
def test_styles(tmp_path, lines, style):
    path = tmp_path / "zeros"
    if style == "padded":
        write(path, [f"   {x} " for x in lines])
    elif style == "crlf":
        path.write_bytes("\r\n".join(lines).encode() + b"\r\n")
    elif style == "no final newline":
        write(path, lines, end="")
    elif style == "gzip":
        path = tmp_path / "zeros.gz"
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif style == "indexed":
        write(path, [f"{i + 1} {x}" for i, x in enumerate(lines)])
    else:
        write(path, ["", *lines[:5], "", *lines[5:], ""])
    assert import_table(path, tmp_path / "z.npy")["count"] == 3000


def test_a_table_from_the_middle_finds_its_number(tmp_path, lines):
    assert import_table(write(tmp_path / "t", lines[1234:]), tmp_path / "z.npy")["first_index"] == 1235


def test_many_digits_survive(tmp_path, zeros):
    text = [
        f"{int(c) + int(o // 1)}.{round((o % 1) * 10**16):016d}"
        for c, o in zip(zeros.centre[:100], zeros.offset[:100], strict=True)
    ]
    import_table(write(tmp_path / "t", text), tmp_path / "z.npy")
    again = load(tmp_path / "z.npy")
    assert np.abs((again.centre - zeros.centre[:100]) + (again.offset - zeros.offset[:100])).max() < 1e-15


def test_a_table_relative_to_a_height(tmp_path, zeros):
    base = 5000
    heights = zeros.height[(zeros.height > base) & (zeros.height < base + 500)]
    head = ["Zeros of the zeta function, from zero number 4521 on.", f"Values of gamma - {base}, one per line.", ""]
    import_table(write(tmp_path / "zeros3", head + [f"{h - base:.8f}" for h in heights]), tmp_path / "z.npy")
    again = load(tmp_path / "z.npy")
    assert np.abs(again.height - heights).max() < 1e-8
    assert again.manifest["first_index"] == int(np.searchsorted(zeros.height, base)) + 1


def test_heights_beyond_exact_integers(tmp_path, zeros):
    """As in Odlyzko's table around zero 10^21: only spacings can be judged, and they keep their digits."""
    base, density = 144176897509546973000, np.log(144176897509546973000 / (2 * np.pi)) / (2 * np.pi)
    unfolded = np.cumsum(spacings(zeros.centre[5000:6000], zeros.offset[5000:6000])) / density
    text = ["gamma - 144176897509546973000", *(f"{x:.9f}" for x in unfolded)]
    assert import_table(write(tmp_path / "zeros4", text), tmp_path / "z.npy")["first_index"] is None
    again = load(tmp_path / "z.npy")
    assert np.all(again.centre == float(base))
    assert np.abs(again.offset - unfolded).max() < 1e-9
    with pytest.raises(tables.DensityError):
        import_table(write(tmp_path / "zeros4", [*text[:500], *text[501:]]), tmp_path / "z.npy")


def broken(lines, how):
    lines = list(lines)
    if how == "swap":
        lines[500], lines[501] = lines[501], lines[500]
    elif how == "twice":
        lines.insert(700, lines[700])
    elif how == "one missing":
        del lines[900]
    elif how == "ten missing":
        del lines[900:910]
    elif how == "one too many":
        lines.insert(801, f"{(float(lines[800]) + float(lines[801])) / 2:.9f}")
    elif how == "word":
        lines[42] = "forty-two"
    elif how == "negative":
        lines[42] = "-" + lines[42]
    elif how == "nan":
        lines[42] = "nan"
    elif how == "a number left out":
        lines = [f"{i + (i > 42)} {line}" for i, line in enumerate(lines, start=1)]
    elif how == "three columns":
        lines[42] = "1 2 3.5"
    elif how == "below the first":
        lines.insert(0, "10.500000000")
    elif how == "first missing":
        del lines[0]
    return lines


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("swap", tables.NotMonotoneError, "line 502"),
        ("twice", tables.DuplicateZeroError, "line 702"),
        ("one missing", tables.DensityError, "too few"),
        ("ten missing", tables.GapError, "line 901"),
        ("one too many", tables.DensityError, "too many"),
        ("word", tables.MalformedTableError, "line 43"),
        ("negative", tables.MalformedTableError, "line 43"),
        ("nan", tables.MalformedTableError, "line 43"),
        ("three columns", tables.MalformedTableError, "line 43"),
        ("a number left out", tables.MalformedTableError, "line 43: the zero is numbered 44, but 43 comes next"),
        ("below the first", tables.DensityError, "line 1"),
    ],
)
def test_broken_tables_are_named(tmp_path, lines, how, error, message):
    with pytest.raises(error, match=message):
        import_table(write(tmp_path / "t", broken(lines, how)), tmp_path / "z.npy")
    assert not (tmp_path / "z.npy").exists()


def test_the_density_error_names_the_place(tmp_path, lines):
    with pytest.raises(tables.DensityError, match=r"lines? (8\d\d|9\d\d) to"):
        import_table(write(tmp_path / "t", broken(lines, "one missing")), tmp_path / "z.npy")


def test_truncated_text(tmp_path, lines):
    text = "\n".join(lines)
    (tmp_path / "t").write_text(text[:-4])
    with pytest.raises(tables.TruncatedTableError, match="line 3000"):
        import_table(tmp_path / "t", tmp_path / "z.npy")
    (tmp_path / "t.gz").write_bytes(gzip.compress(text.encode())[:-30])
    with pytest.raises(tables.TruncatedTableError):
        import_table(tmp_path / "t.gz", tmp_path / "z.npy")


@pytest.mark.parametrize("content", ["", "\n\n", "hello\n" * 300, "1\n2\n3\n"])
def test_not_a_table(tmp_path, content):
    (tmp_path / "t").write_text(content)
    with pytest.raises(tables.MalformedTableError, match="not a table"):
        import_table(tmp_path / "t", tmp_path / "z.npy")


def test_platt(tmp_path, zeros):
    (tmp_path / "zeros_14.dat").write_bytes(platt_bytes(zeros))
    manifest = import_table(tmp_path / "zeros_14.dat", tmp_path / "z.npy")
    again = load(tmp_path / "z.npy")
    n = len(again)
    assert n == int(np.searchsorted(zeros.height, 2014))
    assert manifest["first_index"] == 1
    assert np.abs((again.centre - zeros.centre[:n]) + (again.offset - zeros.offset[:n])).max() < 1e-15


def test_platt_from_the_middle(tmp_path, zeros):
    (tmp_path / "a.dat").write_bytes(platt_bytes(zeros, (1014, 2014)))
    manifest = import_table(tmp_path / "a.dat", tmp_path / "z.npy")
    assert manifest["first_index"] == int(np.searchsorted(zeros.height, 1014)) + 1


@pytest.mark.parametrize("cut", [4, 30, 600, -5])
def test_truncated_platt(tmp_path, zeros, cut):
    (tmp_path / "a.dat").write_bytes(platt_bytes(zeros)[:cut])
    with pytest.raises(tables.TruncatedTableError, match=r"a\.dat"):
        import_table(tmp_path / "a.dat", tmp_path / "z.npy")


def test_damaged_platt(tmp_path, zeros):
    data = platt_bytes(zeros)
    path = tmp_path / "a.dat"
    path.write_bytes(data + b"x")
    with pytest.raises(tables.MalformedTableError, match="after the last block"):
        import_table(path, tmp_path / "z.npy")
    # One zero fewer claimed by the second block than the first one ended with.
    second = 8 + 32 + 13 * struct.unpack_from("<Q", data, 8 + 24)[0]
    path.write_bytes(data[: second + 16] + struct.pack("<Q", 5) + data[second + 24 :])
    with pytest.raises(tables.GapError, match="block 2"):
        import_table(path, tmp_path / "z.npy")
    path.write_bytes(data[:8] + struct.pack("<d", float("nan")) + data[16:])
    with pytest.raises(tables.MalformedTableError, match="block 1"):
        import_table(path, tmp_path / "z.npy")


def test_a_table_is_not_replaced_by_its_manifest(tmp_path, lines):
    table = write(tmp_path / "zeros.json", lines)
    with pytest.raises(tables.TableError, match="would replace the table"):
        import_table(table, tmp_path / "zeros.npy")
    assert table.read_text().startswith(lines[0])


def test_missing_table(tmp_path):
    with pytest.raises(tables.TableError, match="no table"):
        import_table(tmp_path / "none", tmp_path / "z.npy")


def test_real_tables(tmp_path, zeros):
    root = os.environ.get("LAB_REFERENCE_DATA")
    files = sorted(Path(root).glob("**/zeros*")) if root else []
    files = [f for f in files if f.is_file() and f.suffix in ("", ".txt", ".gz", ".dat")]
    if not files:
        pytest.skip("needs LAB_REFERENCE_DATA, a folder with tables of zeros (zeros1, zeros6, zeros_14.dat, ...)")
    for file in files:
        manifest = import_table(file, tmp_path / "z.npy")
        if manifest["first_index"] == 1:
            n = min(manifest["count"], len(zeros))
            assert np.abs(load(tmp_path / "z.npy", n).height - zeros.height[:n]).max() < 5e-9
