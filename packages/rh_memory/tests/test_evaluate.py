"""Evaluation and report of a run from end to end, on simulated GUE spacings and on few zeros."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_shared.checkpoint import save_weights
from lab_shared.config import to_json
from lab_shared.errors import UserError
from rh_memory import evaluate, physics, report
from rh_memory.config import EXPLICIT_SMALL, DataConfig, ModelConfig
from rh_memory.models import build_model


def _run(folder: Path, data: DataConfig, **model) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    config = replace(
        EXPLICIT_SMALL,
        model=ModelConfig(d_model=16, layers=1, heads=2, dropout=0.0, pos="rope", head_init="spread", **model),
        data=data,
    )
    (folder / "config.json").write_text(to_json(config))
    save_weights(folder / "weights.safetensors", build_model(config.model))
    return folder


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        evaluate.evaluate(tmp_path, device="cpu")
    with pytest.raises(UserError, match=r"no config\.json"):
        report.write(tmp_path)
    (tmp_path / "config.json").write_text(to_json(EXPLICIT_SMALL))
    with pytest.raises(UserError, match="no weights yet"):
        evaluate.evaluate(tmp_path, device="cpu")


def test_report_of_an_unevaluated_run_names_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text(to_json(EXPLICIT_SMALL))
    text = report.write(tmp_path).read_text()
    for missing in ("evaluation.json", "physics.npz", "diagnostics.json"):
        assert missing in text
    assert "http://" not in text.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_gue_run_is_scored_beside_the_baselines_without_heights(tmp_path, capsys):
    run = _run(tmp_path / "gue", DataConfig(source="gue", zeros=20_480, folder=str(tmp_path)), context=64)
    result = evaluate.main(run, json=True, device="cpu")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))
    known = {row["name"]: row["nll_last"]["value"] for row in result["baselines"]["rows"]}
    # A few hundred windows of simulated matrices: single figures scatter, paired differences hardly.
    assert known["sine process, 8 gaps"] - known["sine-process gap"] == pytest.approx(-0.095, abs=0.04)
    assert "prime phases" not in known
    gap = result["nll_last_minus"]["iid marginal"]["value"]
    saved = np.load(run / "predictions.npz")
    assert saved["nll_last"].mean() == pytest.approx(result["nll_last"]["value"])
    assert gap == pytest.approx(result["nll_last"]["value"] - known["iid marginal"], abs=0.05)
    with pytest.raises(UserError, match="no primes"):
        physics.main(run, device="cpu")


@pytest.mark.slow
def test_zeta_run_gets_scores_physics_and_a_report(zeros_file, data_folder, tmp_path):
    options = {"inputs": "height", "values": "prime_rotary", "context": 64}
    run = _run(tmp_path / "zeta", DataConfig(file=str(zeros_file), folder=str(data_folder)), **options)
    result = evaluate.evaluate(run, device="cpu")
    assert result["nll_last_minus"]["prime phases"]["value"] > 0  # untrained
    assert "better" in evaluate.table(result)
    found = physics.main(run, device="cpu")
    assert found["learned"]["lines_that_stand_out"] > 5
    page = report.write(run).read_text()
    assert page.count("<svg") == 11
    for name in ("scores", "pit", "context", "number_variance", "form_factor", "lines", "frequency_use"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 1000
        assert (run / "figures" / f"{name}.csv").read_text().count("\n") > 2
