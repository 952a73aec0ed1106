"""Evaluation and report of a run from end to end, on simulated GUE spacings and on few zeros."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_shared.checkpoint import save_weights
from lab_shared.config import to_json
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from rh_memory import evaluate, figures, physics, physics_run, records, report, train
from rh_memory.config import EXPLICIT_SMALL, DataConfig, ModelConfig
from rh_memory.data.windows import split
from rh_memory.models import build_model
from rh_memory.zeros.store import Zeros, save


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


def test_every_context_shares_targets_with_the_baselines(toy_dataset):
    dataset = replace(toy_dataset, split=split(20_000))
    targets = evaluate.scored_starts(dataset, 257) + 256
    assert torch.equal(targets, dataset.split.starts("val_tail", 8, 257) + 256)
    ((first, last),) = dataset.split.val_tail
    for width in (2, 65, 101, 257, 300):
        starts = evaluate.scored_starts(dataset, width)
        found = starts + width - 1
        assert starts.min() >= first
        assert found.max() < last
        assert torch.isin(targets, found).sum() >= len(targets) - 6
    assert torch.isin(targets, evaluate.scored_starts(dataset, 101) + 100).all()


def test_a_run_on_rows_is_scored_at_the_contexts_it_was_trained_at(zeros_file, tmp_path, monkeypatch):
    """A row of 256 spacings has 255 of context: the 256th learned position has seen no gradient."""
    data = DataConfig(file=str(zeros_file), folder=str(tmp_path), windows="rows")
    run = _run(tmp_path / "run", data, context=256)
    seen = {}

    def score(model, data, starts, *, batch, width):
        seen.update(width=width, target=int(starts[0]) + width - 1)
        raise InterruptedError

    monkeypatch.setattr(evaluate, "score_model", score)
    with pytest.raises(InterruptedError):
        evaluate.evaluate(run, device="cpu")
    ((first, _),) = split(19_999).val_tail
    assert seen == {"width": 256, "target": first + 256}  # the baselines' first target
    with pytest.raises(UserError, match=r"model\.context = 64 learned positions are too few"):
        train._checked_data(replace(EXPLICIT_SMALL, model=ModelConfig(context=64), data=data), Dist())


def test_a_run_of_another_program_gets_no_report(tmp_path):
    (tmp_path / "config.json").write_text('{"layers": 3}')
    with pytest.raises(UserError, match="unknown key 'layers'"):
        report.write(tmp_path)
    with pytest.raises(UserError, match="unknown key 'layers'"):
        records.collect([tmp_path], tmp_path / "kept")


@pytest.mark.parametrize("name", ["evaluation.json", "physics.json", "diagnostics.json"])
def test_a_report_names_the_file_that_lacks_something(tmp_path, name):
    (tmp_path / "config.json").write_text(to_json(EXPLICIT_SMALL))
    (tmp_path / name).write_text('{"label": "zeros"}')
    with pytest.raises(UserError, match=rf"{name} lacks"):
        report.write(tmp_path)


def test_physics_of_too_few_zeros_and_of_other_zeros_is_refused(zeros, zeros_file, tmp_path):
    save(tmp_path / "few.npy", Zeros(zeros.centre[:400], zeros.offset[:400]))
    with pytest.raises(UserError, match=r"399 spacings .* span \d+ of height; a spectrum takes 2,048"):
        physics.main(data=tmp_path / "few.npy")
    with pytest.raises(UserError, match="more zeros than --zeros 100"):
        physics.main(data=zeros_file, zeros=100)
    run = _run(tmp_path / "run", DataConfig(file=str(zeros_file), folder=str(tmp_path)), context=64)
    np.savez(run / "predictions.npz", spacing=np.arange(100, 200), mean_last=np.ones(100))
    with pytest.raises(UserError, match=r"predictions.npz is not about zeta zeros of .* evaluate"):
        physics.main(run, device="cpu")
    (run / "predictions.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"predictions.npz is not a readable numpy file"):
        physics.main(run, device="cpu")


def test_lines_that_few_windows_cannot_tell_apart_are_left_out(zeros_file, tmp_path, monkeypatch, capsys):
    run = _run(tmp_path / "run", DataConfig(file=str(zeros_file), folder=str(tmp_path)), context=64)
    np.savez(run / "predictions.npz", spacing=np.arange(18_300, 18_400), mean_last=np.ones(100))
    monkeypatch.setattr(physics, "of_zeros", lambda s, gamma: {})
    monkeypatch.setattr(physics, "summary_of", lambda figures, height: {})
    _, result = physics_run.with_run(run, None, None, torch.device("cpu"))
    assert "100 predicted spacings for" in result["left_out"]["lines of primes"]
    assert "learned" not in result


def test_a_run_of_one_logged_step_shows_in_its_curve():
    one, two = ({"step": np.arange(n), "value": np.ones(n)} for n in (1, 2))
    (axes,) = figures.curve({"train": one, "val": two}, "nats", {}).axes
    assert [line.get_marker() for line in axes.lines] == ["o", "None"]


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
