import csv
import os
from pathlib import Path

import numpy as np
import pytest
from iceaggr.geometry import (
    N_SENSORS,
    Geometry,
    ice_properties,
    icecube86,
    read_geometry_csv,
    write_geometry_csv,
)


@pytest.fixture
def reference() -> Path:
    folder = os.environ.get("LAB_REFERENCE_DATA")
    if not folder:
        pytest.skip("LAB_REFERENCE_DATA is not set")
    return Path(folder) / "iceaggr"


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    path = tmp_path / "own.csv"
    write_geometry_csv(path, icecube86())
    return path.read_text().splitlines()


def test_generated_array_is_the_published_one_to_the_byte(reference: Path, tmp_path: Path) -> None:
    write_geometry_csv(tmp_path / "own.csv", icecube86())
    assert (tmp_path / "own.csv").read_bytes() == (reference / "sensor_geometry.csv").read_bytes()


def test_strings_efficiencies_and_dead_doms_match_the_reference_table(reference: Path) -> None:
    with (reference / "sensor_extra.csv").open() as file:
        rows = list(csv.DictReader(file))
    array = icecube86()
    assert array.string.tolist() == [int(r["string"]) for r in rows]
    assert array.dom.tolist() == [int(r["dom"]) for r in rows]
    assert array.dead.tolist() == [r["in_graphnet_table"] == "False" for r in rows]
    known = [i for i, r in enumerate(rows) if r["rde"]]
    assert array.rde[known].tolist() == [float(rows[i]["rde"]) for i in known]


def test_the_array_without_any_file() -> None:
    array = icecube86()
    assert array.xyz.shape == (N_SENSORS, 3)
    assert array.dead.sum() == 77
    assert (array.rde == 1.35).sum() == 399
    assert np.diff(array.depth.reshape(86, 60), axis=1).min() > 5
    main = np.diff(array.depth.reshape(86, 60)[:78], axis=1)
    assert np.median(main) == pytest.approx(17.02)
    assert (array.string[-1], array.dom[-1]) == (86, 60)
    np.testing.assert_array_equal(array.xyz[0], [-256.14, -521.08, 496.03])


def test_the_shared_array_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        icecube86().xyz[0, 0] = 0.0


def test_ice_is_interpolated_and_held_beyond_the_table() -> None:
    scattering, absorption = ice_properties(np.array([0.0, 1398.4, 1403.4, 2048.5, 9999.0]))
    np.testing.assert_allclose(scattering, [13.2, 13.2, 13.6, 5.0, 56.7])
    np.testing.assert_allclose(absorption, [45.1, 45.1, 46.85, 17.9, 185.2])


def test_csv_round_trip_and_any_column_order(lines: list[str], tmp_path: Path) -> None:
    def check(text: list[str]) -> Geometry:
        path = tmp_path / "array.csv"
        path.write_text("\n".join(text) + "\n")
        return read_geometry_csv(path)

    np.testing.assert_array_equal(check(lines).xyz, icecube86().xyz)
    shuffled = [lines[0], *reversed(lines[1:])]
    np.testing.assert_array_equal(check(shuffled).xyz, icecube86().xyz)
    turned = [",".join(reversed(line.split(","))) for line in lines]
    np.testing.assert_array_equal(check(turned).xyz, icecube86().xyz)
    moved = [lines[0], "0,1.5,2.5,3.5", *lines[2:]]
    assert check(moved).xyz[0].tolist() == [1.5, 2.5, 3.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: ["sensor_id,x,y", *rows[1:]], "missing column z"),
        (lambda rows: rows[:-1], "5159 sensors"),
        (lambda rows: [*rows[:-1], rows[-2]], "sensor_id 5158 appears twice"),
        (lambda rows: [*rows[:-1], "5160,0,0,0"], "sensor_id 5160 is outside"),
        (lambda rows: [*rows[:-1], "5159,0,nan,0"], "must be finite"),
        (lambda rows: [*rows[:-1], "5159,0,here,0"], "row 5160: not numbers"),
        (lambda rows: [*rows[:-1], "5159,0,0"], "not numbers"),
        (lambda rows: [], "missing column sensor_id"),
    ],
)
def test_bad_files_are_named(change, message: str, lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_geometry_csv(path)
    assert str(path) in str(error.value)
