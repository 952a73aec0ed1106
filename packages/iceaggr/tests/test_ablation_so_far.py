"""What the finished runs of a study say when others are not finished."""

import json

import numpy as np
import pytest
from iceaggr.ablation_so_far import so_far
from iceaggr.ablations import Budget, settled, study
from iceaggr.cli import main
from iceaggr.config import DataConfig
from lab_shared.config import to_json
from lab_shared.errors import UserError

BUDGET = Budget(events=1000, held_out=50, epochs=2.0, stream=True, tokens_per_batch=512)
NAMES = ("median_deg", "p10", "p25", "p75", "p90", "head_rank", "head_rank_untrained")


def write_run(out, variant, seed, mean, angles, *, budget=BUDGET, done=True):
    """A run folder with a logged angle every 5 steps."""
    folder = out / "runs" / f"{variant}-seed{seed}"
    folder.mkdir(parents=True)
    config = settled(study("v3").variants[variant], budget, seed, DataConfig(data="stream"))
    (folder / "config.json").write_text(to_json(config))
    (folder / "manifest.json").write_text(json.dumps({"git_sha": "abc", "git_dirty": False, "device": "a GPU"}))
    lines = [{"step": 5 * i, "split": "train", "angle_deg": angle} for i, angle in enumerate(angles, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        summary = {"label": "simulated data", "n_events": 50, "parameters": 7, "mean_deg": mean}
        (folder / "DONE.json").write_text(json.dumps({"summary": summary | dict.fromkeys(NAMES, 1.0)}))


@pytest.fixture
def cut_study(tmp_path):
    for seed, (base, fourier) in enumerate([(60.0, 51.0), (62.0, 52.0), (61.0, 50.0)]):
        write_run(tmp_path, "base", seed, base, [90, 86, 84, 70])
        write_run(tmp_path, "fourier", seed, fourier, [80, 60, 86, 50])
    write_run(tmp_path, "ice", 0, 59.0, [90, 89, 88, 85.5])
    write_run(tmp_path, "ice", 1, 0.0, [90], done=False)
    return tmp_path


def test_finished_runs_are_paired_seed_by_seed(cut_study, capsys):
    assert main(["ablate", "v3", "--so-far", "--out", str(cut_study), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (len(result["runs"]), result["git_sha"], result["budget"]["tokens_per_batch"]) == (7, "abc", 512)
    by_run = {(run["variant"], run["seed"]): run for run in result["runs"]}
    assert (by_run["base", 1]["events"], by_run["base", 1]["steps"]) == (2000, 20)
    assert [by_run[name, 0]["left_plateau"] for name in ("base", "fourier", "ice")] == [1500, 500, None]
    pairs = {c["treated"]: c for c in result["contrasts"]}
    assert set(pairs) == {"fourier", "ice"}
    differences = np.array([-9.0, -10.0, -11.0])
    assert pairs["fourier"]["mean"] == pytest.approx(-10)
    half = 4.302653 * differences.std(ddof=1) / np.sqrt(3)  # the 97.5% point of Student's t with 2 degrees of freedom
    assert (pairs["fourier"]["low"], pairs["fourier"]["high"]) == pytest.approx((-10 - half, -10 + half), rel=1e-5)
    assert (pairs["ice"]["seeds"], pairs["ice"]["low"]) == ([0], None)
    assert result["unfinished"]["ice"] == [0]
    assert result["unfinished"]["aggregates"] == []
    assert "base" not in result["unfinished"]
    assert "tta" in result["unfinished"]


def test_runs_of_two_studies_are_refused(cut_study, tmp_path):
    other = Budget(events=1000, held_out=50, epochs=2.0, stream=True)
    write_run(cut_study, "interval", 0, 60.0, [90], budget=other)
    with pytest.raises(UserError, match="not of one study: their budget"):
        so_far(study("v3"), cut_study)
    with pytest.raises(UserError, match="no finished run"):
        so_far(study("v3"), tmp_path / "nothing")
