"""Prometheus-style parquet, made here with polars, into a Kaggle-format folder."""

import json

import numpy as np
import polars as pl
import pytest
from iceaggr.cli import main
from iceaggr.data.kaggle import KaggleFolder
from iceaggr.data.schema import DataError, MissingColumnError
from iceaggr.directions import angles_to_vector
from iceaggr.geometry import SURFACE_Z, icecube86, read_geometry_csv
from iceaggr.prometheus import TRIGGER_NS, coincident, convert
from lab_shared.errors import UserError

C = 0.299792


def write(path, events, *, charge=False):
    """events: a list of (photons as {sensor: [times]} or None, travel direction); sensors are (string, om, x, y, z)."""
    photons, truth = [], []
    for hits, (zenith, azimuth) in events:
        rows = [(*sensor, t) for sensor, times in (hits or {}).items() for t in times]
        columns = dict(zip(("string_id", "sensor_id", "sensor_pos_x", "sensor_pos_y", "sensor_pos_z", "t"),
                           map(list, zip(*rows, strict=True)) if rows else [[]] * 6, strict=True))  # fmt: skip
        if charge:
            columns["charge"] = [0.5] * len(rows)
        photons.append(columns)
        truth.append({"initial_state_zenith": zenith, "initial_state_azimuth": azimuth, "initial_state_energy": 1e4,
                      "initial_state_type": -14, "interaction": 1, "initial_state_x": 1.0, "initial_state_y": 2.0,
                      "initial_state_z": 3.0})  # fmt: skip
    lists = {name: pl.List(pl.Int64 if name.endswith("_id") else pl.Float64) for name in photons[0]}
    frame = pl.DataFrame({"photons": photons, "mc_truth": truth}, schema_overrides={"photons": pl.Struct(lists)})
    frame.write_parquet(path)
    return path


def dom(sensor, *, depth=False):
    """(string_id, sensor_id, x, y, z) of an IceCube DOM in Prometheus's numbering (from 0), depths perhaps negative."""
    x, y, z = icecube86().xyz[sensor]
    return sensor // 60, sensor % 60, x, y, z - SURFACE_Z if depth else z


def track(zenith, azimuth, *, depth=False, n=40):
    """Photons of a muon through the middle of the array: each of the nearest DOMs sees it when it passes."""
    direction = angles_to_vector(np.array(azimuth), np.array(zenith))
    xyz = icecube86().xyz
    along = xyz @ direction
    away = np.linalg.norm(xyz - along[:, None] * direction, axis=1)
    return {dom(int(i), depth=depth): [5_000 + along[i] / C, 5_001.0 + along[i] / C] for i in np.argsort(away)[:n]}


@pytest.mark.parametrize("depth", [False, True])
def test_icecube_events_keep_their_sensors_and_point_backwards(tmp_path, depth):
    angles = [(2.5, 1.0), (0.7, 5.0), (1.2, 3.0)]
    events = [(track(*a, depth=depth), a) for a in angles]
    file = write(tmp_path / "p.parquet", [*events[:1], (None, (1.0, 1.0)), *events[1:]])
    result = convert([file], tmp_path / "out")
    assert (result["events"], result["events_without_light"], result["geometry"]) == (3, 1, "IceCube-86")
    assert result["line_fit_agrees"] == 1
    folder = KaggleFolder(tmp_path / "out")
    pulses = folder.read_batch(1)
    assert pulses.event_id_E.tolist() == [0, 2, 3], "the row of the file"
    np.testing.assert_array_equal(read_geometry_csv(tmp_path / "out" / "sensor_geometry.csv").xyz, icecube86().xyz)
    expected = {60 * s + o for s, o, *_ in events[0][0]}
    assert set(pulses.sensor_P[: pulses.offsets_E1[1]].tolist()) == expected
    label = angles_to_vector(pulses.azimuth_E.numpy(), pulses.zenith_E.numpy())
    travel = angles_to_vector(*np.array(angles).T[::-1])
    np.testing.assert_allclose(label, -travel, atol=1e-12)
    assert folder.read_truth(pulses.event_id_E.numpy())["type"].tolist() == [1, 1, 1]
    assert "simulated" in json.loads((tmp_path / "out" / "simulation.json").read_text())["note"]


def test_photons_close_in_time_become_one_pulse(tmp_path):
    hits = {dom(100): [16.0, 17.5, 23.9, 24.0, 900.0], dom(102): [20.0], dom(700): [50.0]}
    file = write(tmp_path / "p.parquet", [(hits, (1.0, 1.0))])
    convert([file], tmp_path / "out")
    pulses = KaggleFolder(tmp_path / "out").read_batch(1)
    found = sorted(zip(pulses.sensor_P.tolist(), pulses.time_P.tolist(), pulses.charge_P.tolist(), strict=True))
    zero = TRIGGER_NS - 16
    assert found == [(100, zero + 16, 3.0), (100, zero + 24, 1.0), (100, zero + 900, 1.0), (102, zero + 20, 1.0),
                     (700, zero + 50, 1.0)]  # fmt: skip
    assert pulses.auxiliary_P[pulses.sensor_P == 700].all()
    assert not pulses.auxiliary_P[pulses.sensor_P != 700].any()


def test_coincidence_matches_a_loop():
    rng = np.random.default_rng(0)
    row, sensor, time = rng.integers(0, 3, 150), rng.integers(50, 70, 150), rng.integers(0, 20_000, 150)
    order = np.lexsort((time, sensor, row))
    row, sensor, time = row[order], sensor[order], time[order]

    def near(i):
        return any(
            row[i] == row[j] and sensor[i] // 60 == sensor[j] // 60 and 0 < abs(sensor[i] - sensor[j]) <= 2
            and abs(time[i] - time[j]) <= 1000
            for j in range(150)
        )  # fmt: skip

    direct = np.array([near(i) for i in range(150)])
    naive = [
        any(direct[j] and row[i] == row[j] and sensor[i] == sensor[j] and 0 <= time[i] - time[j] <= 6400
            for j in range(150))
        for i in range(150)
    ]  # fmt: skip
    assert 0 < np.sum(naive) < 150
    np.testing.assert_array_equal(coincident(row, sensor, time), naive)


def test_another_detector_gets_its_own_geometry(tmp_path):
    places = {(s, o): (1000.0 * s, 0.0, -30.0 * o) for s in (7, 3) for o in range(3)}
    hits = {(s, o, *xyz): [float(10 * o)] for (s, o), xyz in places.items()}
    file = write(tmp_path / "p.parquet", [(hits, (3.0, 0.0))], charge=True)
    result = convert([file, write(tmp_path / "q.parquet", [(hits, (3.0, 0.0))], charge=True)], tmp_path / "out")
    assert (result["geometry"], result["sensors"], result["events"]) == ("of the files", 6, 2)
    folder = KaggleFolder(tmp_path / "out")
    pulses, xyz = folder.read_batch(2), read_geometry_csv(tmp_path / "out" / "sensor_geometry.csv").xyz
    assert pulses.event_id_E.tolist() == [1], "counted over the files"
    assert sorted(pulses.sensor_P.tolist()) == [0, 1, 2, 60, 61, 62], "string 3 before 7, the top sensor first"
    assert xyz[61].tolist() == [7000.0, 0.0, -30.0]
    assert set(pulses.charge_P.tolist()) == {0.5}
    assert np.isfinite(xyz).all()


def test_direction_flag_and_its_warning(tmp_path, capsys):
    file = write(
        tmp_path / "p.parquet", [(track(2.0, 1.0), (2.0, 1.0))] * 3 + [(track(2.2, 1.0), (np.pi - 2.2, 1.0 + np.pi))]
    )
    assert main(["convert", str(file), "--out", str(tmp_path / "a"), "--direction", "origin"]) == 0
    assert "the other way round" in capsys.readouterr().out
    assert main(["convert", str(file), "--out", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["line_fit_agrees"] == 0.75
    opposite = write(tmp_path / "q.parquet", [(track(2.0, 1.0), (2.0, 1.0))])
    assert main(["convert", str(opposite), "--out", str(tmp_path / "c"), "--direction", "origin"]) == 0
    assert "the other way round" in capsys.readouterr().out, "where no event agrees"
    few = write(tmp_path / "r.parquet", [({dom(5): [1.0]}, (2.0, 1.0))])
    assert main(["convert", str(few), "--out", str(tmp_path / "d")]) == 0
    assert "no event has 20 pulses" in capsys.readouterr().out
    assert json.loads((tmp_path / "d" / "simulation.json").read_text())["line_fit_agrees"] is None


def test_files_that_are_something_else(tmp_path):
    good = write(tmp_path / "good.parquet", [({dom(5): [1.0]}, (1.0, 1.0))])
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(MissingColumnError, match="no column 'photons'"):
        convert([tmp_path / "a.parquet"], tmp_path / "out")
    frame = pl.read_parquet(good)
    frame.with_columns(mc_truth=pl.lit(1)).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="not a struct"):
        convert([tmp_path / "b.parquet"], tmp_path / "out")
    frame.with_columns(mc_truth=pl.struct(pl.lit(1.0).alias("initial_state_zenith"))).write_parquet(
        tmp_path / "c.parquet"
    )
    with pytest.raises(MissingColumnError, match="mc_truth lacks initial_state_azimuth"):
        convert([tmp_path / "c.parquet"], tmp_path / "out")
    with pytest.raises(UserError, match="has a photon"):
        convert([write(tmp_path / "d.parquet", [(None, (1.0, 1.0))])], tmp_path / "out")
    convert([good], tmp_path / "out2")
    with pytest.raises(UserError, match="not empty"):
        convert([good], tmp_path / "out2")


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("t", float("nan"), "t nan"),
        ("t", float("inf"), "t inf"),
        ("t", 1e30, "t 1e"),
        ("sensor_id", None, "sensor_id None"),
        ("sensor_pos_x", float("nan"), "sensor_pos_x nan"),
        ("charge", -1.0, "charge -1"),
        ("charge", float("nan"), "charge nan"),
    ],
)
def test_photons_that_make_no_sense_are_named_and_nothing_is_left(tmp_path, column, value, says):
    good = write(tmp_path / "p.parquet", [({dom(5): [1.0, 30.0]}, (1.0, 1.0))], charge=True)
    lists = pl.read_parquet(good)["photons"].struct.unnest()
    photons = {name: lists[name].to_list() for name in lists.columns}
    photons[column][0][1] = value
    bad = pl.DataFrame(photons, schema=lists.schema).select(photons=pl.struct(pl.all()))
    bad.hstack(pl.read_parquet(good).select("mc_truth")).write_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=says):
        convert([tmp_path / "bad.parquet"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_words_among_numbers_and_uneven_lists_are_named(tmp_path):
    good = pl.read_parquet(write(tmp_path / "p.parquet", [({dom(5): [1.0, 30.0]}, (1.0, 1.0))]))
    words = good.with_columns(pl.col("photons").struct.with_fields(string_id=pl.lit(["a", "b"])))
    uneven = good.with_columns(pl.col("photons").struct.with_fields(t=pl.lit([1.0])))
    angle = good.with_columns(pl.col("mc_truth").struct.with_fields(initial_state_zenith=pl.lit("x")))
    for name, frame in {"words": words, "uneven": uneven, "angle": angle}.items():
        frame.write_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(DataError, match="not as Prometheus writes it"):
            convert([tmp_path / f"{name}.parquet"], tmp_path / "out")


def test_a_second_file_that_fails_leaves_no_half_folder(tmp_path):
    good = write(tmp_path / "a.parquet", [({dom(5): [1.0]}, (1.0, 1.0))])
    bad = write(tmp_path / "b.parquet", [({dom(5): [1.0]}, (float("nan"), 1.0))])
    with pytest.raises(DataError, match="not finite"):
        convert([good, bad], tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    assert convert([good], tmp_path / "out")["events"] == 1
    assert not (tmp_path / "out" / ".partial").exists()
