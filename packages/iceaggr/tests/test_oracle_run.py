"""The oracle on simulated folders, and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from iceaggr.cli import main
from iceaggr.geometry import icecube86
from iceaggr.oracle.run import STORE, fit_events, held_out_errors
from iceaggr.oracle.truth import Known, folder_simulation, read_known, streamed_known
from iceaggr.sim.config import SimConfig
from iceaggr.sim.feed import HELD_OUT_SEED, held_out_store
from iceaggr.sim.stream import iter_events
from iceaggr.sim.write import simulate_folder
from lab_shared.errors import UserError

FAINT = replace(SimConfig(), energy_max=3e3, hard_fraction=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return simulate_folder(tmp_path_factory.mktemp("oracle") / "events", 4, seed=3, config=FAINT)


@pytest.mark.slow
def test_a_folder_knows_what_the_simulation_knew(folder: Path) -> None:
    from iceaggr.data.kaggle import KaggleFolder

    geometry, config = folder_simulation(folder)
    assert config == FAINT
    np.testing.assert_array_equal(geometry.xyz, icecube86().xyz)
    pulses = KaggleFolder(folder).read_batch(1)
    found = read_known(folder, pulses.event_id_E.numpy(), config, torch.device("cpu"))
    _, truth = next(iter_events(4, seed=3, stream=1, config=FAINT))
    expected = Known.of(truth)
    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), values, msg=name)

    first = held_out_errors(folder, pulses, torch.device("cpu"))
    assert ((first >= 0) & (first <= 180)).all()
    (folder / "truth.parquet").rename(folder / "away")  # what is known is not computed again
    np.testing.assert_array_equal(held_out_errors(folder, pulses, torch.device("cpu")), first)
    (folder / "oracle.npz").unlink()
    with pytest.raises(UserError, match=r"no truth\.parquet"):
        held_out_errors(folder, pulses, torch.device("cpu"))
    (folder / "away").rename(folder / "truth.parquet")


def test_held_out_events_of_a_stream_are_simulated_again() -> None:
    """Which no folder has; their truth comes back in the order asked, and other events are refused."""
    cpu = torch.device("cpu")
    store = held_out_store(12, device=cpu, geometry=icecube86())
    index = np.array([11, 2, 7])
    pulses = store.gather(index)
    known = streamed_known(pulses, cpu)
    assert store.truth is not None
    np.testing.assert_array_equal(known.energy_E.float().numpy(), store.truth["energy"][index])
    np.testing.assert_allclose(known.direction_E3.numpy(), store.direction_E3[index], atol=1e-12)
    with pytest.raises(UserError, match="cannot be simulated again on cpu"):
        streamed_known(replace(pulses, azimuth_E=pulses.azimuth_E + 1e-9), cpu)


@pytest.mark.slow
def test_a_streams_held_out_events_have_errors_without_a_folder(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    found = held_out_errors(tmp_path, held_out_store(2, device=cpu, geometry=icecube86()).gather(np.arange(2)), cpu)
    pulses, truth = next(iter_events(2, seed=HELD_OUT_SEED))
    expected = fit_events(pulses, Known.of(truth), icecube86(), SimConfig())["error_deg"]
    np.testing.assert_array_equal(found, expected)
    assert not list(tmp_path.iterdir())


def test_missing_truth_has_a_named_error(folder: Path, tmp_path: Path) -> None:
    import polars as pl

    with pytest.raises(UserError, match=r"no simulation\.json"):
        folder_simulation(tmp_path)
    old = pl.read_parquet(folder / "truth.parquet").drop("chance_time")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "batch_1.parquet").write_bytes((folder / "train" / "batch_1.parquet").read_bytes())
    old.write_parquet(tmp_path / "truth.parquet")
    with pytest.raises(UserError, match="lacks chance_time"):
        read_known(tmp_path, old["event_id"].to_numpy(), SimConfig(), torch.device("cpu"))


@pytest.mark.slow
def test_the_command_says_what_it_measured(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "oracle.json"
    argv = [
        "oracle",
        "--data",
        str(folder),
        "--events",
        "3",
        "--scan",
        "1",
        "--steps",
        "6",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["all"]["n"] == len(printed["errors_deg"]) == 3
    assert printed["all"]["mean_deg"]["value"] == pytest.approx(np.mean(printed["errors_deg"]), abs=1e-3)
    assert printed["label"] == "simulated data"
    assert (printed["settings"]["scan"], printed["settings"]["steps"]) == (1, 6)
    assert 0 <= printed["self_test"]["direction"]["within 90%"] <= 1


@pytest.mark.parametrize(("text", "says"), [("{", "not valid JSON"), ("[]", "no JSON object"), ("{}", "does not say")])
def test_a_damaged_record_of_a_simulation_is_named(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "simulation.json").write_text(text)
    with pytest.raises(UserError, match=says):
        folder_simulation(tmp_path)


def test_damaged_errors_of_the_oracle_are_named(folder: Path, make_pulses) -> None:
    store = folder / STORE
    store.write_bytes(b"junk")
    try:
        with pytest.raises(UserError, match=r"oracle\.npz is not a readable"):
            held_out_errors(folder, make_pulses([30]), torch.device("cpu"))
    finally:
        store.unlink()
