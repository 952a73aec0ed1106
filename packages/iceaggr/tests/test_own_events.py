"""`iceaggr evaluate RUN` without --data: a run's own held-out events, found or simulated again, scored and kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from iceaggr.analysis.sample import held_out_events
from iceaggr.cli import main
from iceaggr.config import DataConfig, ModelConfig, TrainConfig
from iceaggr.data.prepare import STREAM, SplitError, simulate
from iceaggr.evaluate import remember_training_events
from iceaggr.own_events import evaluate_own, own_held_out
from lab_shared.checkpoint import save_weights
from lab_shared.config import to_json

MODEL = ModelConfig(slots=2, d_model=16, d_hidden=16, layers=1, heads=2, head_hidden=8)


def write_run(folder, model, config, trained_on=()):
    """A run as a study leaves it: weights and no scores."""
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config))
    remember_training_events(folder, np.array(trained_on, dtype=np.int64))
    save_weights(folder / "weights.safetensors", model)
    return folder


@pytest.fixture
def streamed(tmp_path, awake):
    data = DataConfig(data=STREAM, store=str(tmp_path / "store"), train_events=1000, val_events=5000)
    return write_run(tmp_path / "run", awake(MODEL, seed=1), TrainConfig(model=MODEL, data=data))


def scores(run):
    with np.load(run / "predictions.npz") as arrays:
        return dict(arrays)


def test_a_streamed_run_of_a_study_can_be_scored_later(streamed, capsys):
    for command in ("analyze", "calibrate"):
        assert main([command, str(streamed)]) == 1
        assert f"score it with `iceaggr evaluate {streamed}`" in capsys.readouterr().err
    assert main(["evaluate", str(streamed), "--events", "400", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n_events"], result["label"]) == (400, "simulated data")
    found = scores(streamed)
    assert result["predictors"]["model"]["mean_deg"]["value"] == pytest.approx(found["error_deg"].mean())
    assert {"energy", "type", "vertex_z"} <= found.keys()
    config = TrainConfig(model=MODEL, data=DataConfig(data=STREAM, train_events=1000, val_events=5000))
    sample = held_out_events(
        streamed, config, torch.device("cpu"), data=None, max_events=None, scored=found["event_id"]
    )
    np.testing.assert_array_equal(sample.cache.event_id[sample.index_N], found["event_id"])
    np.testing.assert_array_equal(sample.cache.zenith[sample.index_N], found["zenith"])
    assert main(["calibrate", str(streamed)]) == 1
    assert "kappa is no confidence here" in capsys.readouterr().err, "it has read the scores of this untrained model"


def test_fewer_events_are_the_first_of_more(streamed):
    evaluate_own(streamed, max_events=30, device="cpu")
    few = scores(streamed)
    evaluate_own(streamed, max_events=90, device="cpu")
    for name, values in scores(streamed).items():
        if name != "random_error_deg":  # one stream of guesses, cut elsewhere
            np.testing.assert_allclose(values[:30], few[name], rtol=1e-5, err_msg=name)


def test_events_of_a_folder_are_the_last_of_it_and_none_it_was_trained_on(tmp_path, awake):
    simulate(tmp_path / "data", 80, seed=3, device="cpu")
    data = DataConfig(data=str(tmp_path / "data"), store=str(tmp_path / "store"), val_events=30)
    config = TrainConfig(model=MODEL, data=data)
    run = write_run(tmp_path / "run", awake(MODEL), config)
    prepared, held_out_E = own_held_out(run, config, "cpu")
    assert held_out_E.tolist() == list(range(50, 80))
    result = evaluate_own(run, device="cpu", max_events=20)
    assert result["n_events"] == 20
    np.testing.assert_array_equal(scores(run)["event_id"], prepared.cache.event_id[50:70])
    remember_training_events(run, prepared.cache.event_id[60:61])
    with pytest.raises(SplitError, match="1 of 30 events to score were trained on"):
        own_held_out(run, replace(config, seed=5), "cpu")
