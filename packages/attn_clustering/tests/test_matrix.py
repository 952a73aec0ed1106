"""The list of jobs of an experiment, and a tiny matrix run twice."""

import json
import re
from dataclasses import replace

import pytest
from attn_clustering import matrix
from attn_clustering.analysis.probes import middle_places
from attn_clustering.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from attn_clustering.data.settings import LANGUAGES
from attn_clustering.experiments import EXPERIMENTS, Experiment
from lab_shared.config import from_json
from lab_shared.errors import UserError

TINY = replace(
    EXPERIMENTS["smoke"][1],
    model=ModelConfig(vocab=32, d_model=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=24),
    data=DataConfig(
        replace(LANGUAGES["smoke"], vocab=32, seq_len=32, min_segment=8, train_sequences=40, val_sequences=8)
    ),
    optim=OptimConfig(steps=4, batch=4, warmup=1, eval_every=4, eval_sequences=8),
    attentions=("gqa",),
)


@pytest.fixture
def quiet(monkeypatch):
    """A matrix without analyses and report: the folders they were asked for."""
    import sys
    from types import SimpleNamespace

    analysed, reported = [], []
    modules = {
        "attn_clustering.analyze": SimpleNamespace(main=lambda folder: analysed.append(folder.name)),
        "attn_clustering.report": SimpleNamespace(write=lambda folder: reported.append(folder.name) or folder),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return analysed, reported


@pytest.mark.parametrize("name", ["smoke", "faithful-v1", "text"])
def test_every_job_stands_once_and_after_what_it_needs(name):
    jobs = matrix.jobs(EXPERIMENTS[name][1], seeds=1)
    seen = set()
    for job in jobs:
        config = from_json(RunConfig, json.dumps(job.kwargs["config"]))
        assert job.name == config.name
        assert job.name not in seen
        assert set(job.needs) <= seen
        assert (config.recal is not None) == bool(job.needs)
        if config.recal is not None:
            assert config.recal.parent == f"../{job.needs[0]}"
        seen.add(job.name)


def test_the_controlled_experiment_has_its_controls():
    names = [job.name for job in matrix.jobs(replace(EXPERIMENTS["controlled-v1"][1], attentions=("mha",)), seeds=2)]
    trained = [name for name in names if name.count("-") == 2]
    assert len(trained) == 3 * 2
    for name in trained:
        assert {f"{name}-drope-100pct-x1", f"{name}-extra-100pct-x1", f"{name}-nope"} <= set(names)
    sweep = [name for name in names if name.startswith("mha-random_blocks-s0-drope")]
    assert len(sweep) == 17
    assert not [name for name in names if name.startswith("mha-random_blocks-s1-drope-1pct")]


def test_the_endpoint_part_is_what_the_primary_contrast_rests_on():
    names = [job.name for job in matrix.jobs(EXPERIMENTS["controlled-v1"][1], seeds=2, parts="endpoint")]
    assert names == [
        f"mha-{ordering}-s{seed}{phase}"
        for seed in range(2)
        for ordering in ("shuffled", "topic_ordered", "random_blocks")
        for phase in ("", "-drope-100pct-x1", "-extra-100pct-x1")
    ]
    assert set(names) < {job.name for job in matrix.jobs(EXPERIMENTS["controlled-v1"][1], seeds=2)}


def test_the_small_experiment_has_the_design_of_the_large_one():
    large, small = (EXPERIMENTS[name][1] for name in ("controlled-v1", "controlled-small"))
    kept = ("orderings", "seeds", "first_seed", "controls")
    assert all(getattr(small, key) == getattr(large, key) for key in kept)
    for key in ("mode", "cooldown", "partial"):
        assert getattr(small.data, key) == getattr(large.data, key)
    assert small.optim.schedule == large.optim.schedule
    for experiment in (large, small):
        (recal,) = experiment.recals
        assert (recal.order, recal.lr_factor) == ("shared", 1.0)
        assert experiment.data.language.kind == "permutation"
    names = [job.name for job in matrix.jobs(small, parts="endpoint")]
    assert len(names) == 8 * 3 * 3
    # The middle half of the blocks has to lie behind the first, which knows no more than a pair of tokens.
    assert max(middle_places(small.model.layers)) >= 2


def test_two_calls_fill_one_folder_with_different_seeds(tmp_path, quiet):
    analysed, _ = quiet
    matrix.run_matrix(replace(TINY, first_seed=100), tmp_path / "m", seeds=1, workers=1)
    matrix.run_matrix(replace(TINY, first_seed=101), tmp_path / "m", seeds=2, workers=1)
    assert {name.split("-")[2] for name in analysed} == {"s100", "s101", "s102"}
    experiment = from_json(Experiment, (tmp_path / "m" / "experiment.json").read_text())
    assert list(matrix.seeds_of(experiment)) == [100, 101, 102]


def test_a_matrix_runs_once_and_then_only_what_is_new(tmp_path, quiet):
    analysed, reported = quiet
    text = matrix.run_matrix(TINY, tmp_path / "m", workers=1)
    names = [job.name for job in matrix.jobs(TINY)]
    assert len(names) == 4
    assert analysed == names
    assert all(name in text for name in names)
    assert "against RoPE" in text
    matrix.run_matrix(TINY, tmp_path / "m", workers=1)
    assert analysed == names
    assert reported == ["m", "m"]
    matrix.run_matrix(TINY, tmp_path / "m", seeds=2, workers=1)
    assert len(analysed) == 8
    with pytest.raises(UserError, match="another experiment"):
        matrix.run_matrix(replace(TINY, optim=replace(TINY.optim, steps=5)), tmp_path / "m", workers=1)
    with pytest.raises(UserError, match="seeds=0"):
        matrix.jobs(TINY, 0)


def test_a_job_killed_after_training_only_analyses(tmp_path, quiet, monkeypatch):
    analysed, _ = quiet
    job = matrix.jobs(TINY)[0]
    first = matrix.run_job(tmp_path, **job.kwargs)
    monkeypatch.setattr("attn_clustering.train._train", lambda *_: pytest.fail("trained again"))
    assert matrix.run_job(tmp_path, **job.kwargs) == first
    assert len(analysed) == 2


@pytest.mark.slow
def test_a_matrix_ends_in_a_report(tmp_path):
    """The smoke experiment with one attention variant, shorter runs and fewer sequences; nothing is replaced."""
    smoke = EXPERIMENTS["smoke"][1]
    experiment = replace(
        smoke,
        attentions=("gqa",),
        data=replace(smoke.data, language=replace(smoke.data.language, train_sequences=320, val_sequences=96)),
        optim=replace(smoke.optim, steps=20, warmup=2, eval_every=20, eval_sequences=32),
    )
    text = matrix.run_matrix(experiment, tmp_path / "m", workers=1)
    report = tmp_path / "m" / "report.html"
    assert str(report) in text
    page = report.read_text()
    for job in matrix.jobs(experiment):
        assert (tmp_path / "m" / job.name / "analysis" / "analysis.json").exists()
        assert job.name in page
    assert len(page) < 5_000_000
    assert not re.search(r'(src|href)="https?:|url\(https?:|<script', page)
    drawn = list((tmp_path / "m" / "figures").glob("*.png"))
    assert len(drawn) == page.count("<svg") == 9
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
