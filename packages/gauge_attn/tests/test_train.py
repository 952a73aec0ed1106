import json
import math
from dataclasses import replace

import pytest
import torch
from gauge_attn.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from gauge_attn.data import load_corpus, windows
from gauge_attn.evaluate import ablated, ablation_costs, diagnose_run, evaluate_run, load_run, mean_loss
from gauge_attn.generate import generate_text
from gauge_attn.report import write_report
from gauge_attn.train import resume, train
from lab_shared.errors import UserError
from lab_shared.loop import Tick
from lab_shared.signals import Stopped

TINY = TrainConfig(
    model=ModelConfig(
        spec="1x0e+1x1e", layers=1, scalars=8, copies=2, hidden=8, value_scalars=2, kappa_mode="learnable"
    ),
    optim=OptimConfig(alignment=0.01),
    data=DataConfig(keys=4, window=8, batch=4, val_windows=16),
    steps=6,
    log_every=2,
    checkpoint_every=3,
    eval_every=3,
    wandb="disabled",
)
FAITHFUL = replace(TINY, model=ModelConfig(arch="faithful", spec="1x0e+1x1e", kappa_mode="standardised"))
GPT = replace(TINY, model=ModelConfig(arch="gpt", d_model=8, heads=2), optim=OptimConfig())
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_report(monkeypatch):
    """Figures cost more than these trainings."""
    monkeypatch.setattr("gauge_attn.train.write_report", lambda folder: folder / "report.html")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(TINY, out)
    return out


def test_a_run_leaves_everything(run_dir):
    for name in ("evaluation.json", "maps.npz", "report.html", "weights.safetensors", "DONE.json", "figures/maps.png"):
        assert (run_dir / name).exists(), name
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert result["generated"]
    assert set(result["predictors"]) == {"model", "unigram", "bigram", "optimal"}
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert [(h["layer"], h["head"], h["l"]) for h in result["diagnosis"]["heads"]] == [(0, 0, 0), (0, 1, 1)]
    assert len(result["ablation"]) == 2
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {"train", "val", "heads"} == {line["split"] for line in lines}
    assert all(f"L0.H{h}.row_std" in line for h in (0, 1) for line in lines if line["split"] == "heads")
    page = (run_dir / "report.html").read_text()
    assert "generated induction language" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_printed_lines_have_the_seeds_format(run_dir):
    lines = diagnose_run(run_dir, device="cpu")["lines"]
    assert lines[0].startswith("[DIVERSITY] μ_dist: ")
    assert any(line.startswith("Head 1 (ℓ1): row_std=0.") for line in lines)
    assert any("Averaged: row_std=" in line and "one-hot" in line for line in lines)


def test_evaluation_of_the_folder_is_that_of_the_run(run_dir):
    saved = json.loads((run_dir / "evaluation.json").read_text())
    again = evaluate_run(run_dir, split="valid", device="cpu")
    assert again["loss"] == pytest.approx(saved["loss"], rel=1e-6)
    for a, b in zip(again["ablation"], saved["ablation"], strict=True):
        assert a["removed"] == pytest.approx(b["removed"], abs=1e-6)
    assert "unigram" in again["text"]
    assert "Head 0" in again["text"]
    assert evaluate_run(run_dir, split="test", device="cpu", ablation=False)["loss"] != again["loss"]


def test_an_ablated_head_is_uniform_and_comes_back(run_dir):
    from gauge_attn.measure import attention_maps

    config, model, _ = load_run(run_dir, CPU)
    data = windows(load_corpus(config.data), "valid", CPU)
    before = mean_loss(model, data, config)
    with ablated(model, 0, 1, 0, "uniform"):
        beta = attention_maps(model, data.input_WN[:1])[1]["beta"]
        assert beta[4, :4].tolist() == pytest.approx([0.25] * 4, rel=1e-4)
    with ablated(model, 0, 0, 0, "removed"):
        assert mean_loss(model, data, config) != before
    assert mean_loss(model, data, config) == before
    assert {c["l"] for c in ablation_costs(model, data, config)} == {0, 1}


def test_generation_and_its_errors(run_dir):
    words = generate_text(run_dir, "k1 v2 k3", n_tokens=12, temperature=0.0, device="cpu").split()
    assert words[:3] == ["k1", "v2", "k3"]
    assert len(words) == 15
    a, b = (generate_text(run_dir, "k1", n_tokens=5, temperature=1.0, seed=s, device="cpu") for s in (1, 1))
    assert a == b
    for prompt, text in (("hello", "k0 ... k3"), ("", "empty")):
        with pytest.raises(UserError, match=text):
            generate_text(run_dir, prompt, n_tokens=1, temperature=1.0, device="cpu")
    with pytest.raises(UserError, match="--temperature -1"):
        generate_text(run_dir, "k1", n_tokens=1, temperature=-1.0, device="cpu")


@pytest.mark.parametrize("config", [FAITHFUL, GPT], ids=["faithful", "gpt"])
def test_other_models_train_too(config, tmp_path, no_report):
    assert "perplexity" in train(config, tmp_path / "run")
    if config is FAITHFUL:
        _, model, _ = load_run(tmp_path / "run", CPU)
        kappa = model.heads(0)[1].temperature()
        assert kappa.item() != config.model.kappa  # calibrated, saved and loaded


def test_a_stopped_run_ends_in_the_same_bits(tmp_path, monkeypatch, no_report):
    train(TINY, tmp_path / "whole")
    finish = Tick._finish

    def stop_at_4(tick, **kwargs):
        if tick.step == 4:
            raise Stopped(1)
        return finish(tick, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tick, "_finish", stop_at_4)
        with pytest.raises(Stopped):
            train(TINY, tmp_path / "stopped")
    resume(tmp_path / "stopped")
    a, b = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert a == b


def test_text_runs_keep_their_tokenizer(tmp_path, no_report):
    (tmp_path / "book.txt").write_text("the cat sat on the mat . the dog saw the cat .\n" * 60)
    data = DataConfig(data=str(tmp_path / "book.txt"), tokenizer="word", vocab=10, window=8, batch=4)
    config = replace(FAITHFUL, data=data)
    text = train(config, tmp_path / "run")
    assert "bigram" in text
    result = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert result["predictors"]["model"]["bits_per_byte"] > 0
    assert evaluate_run(tmp_path / "run", split="valid", device="cpu")["loss"] == pytest.approx(result["loss"])
    (tmp_path / "book.txt").write_text("the cat sat on the mat . the cat saw the dog .\n" * 60)
    for again in (
        lambda run: evaluate_run(run, split="valid", device="cpu"),
        lambda run: diagnose_run(run, device="cpu"),
        resume,
        lambda run: train(config, run),
    ):
        with pytest.raises(UserError, match="not the text that"):
            again(tmp_path / "run")
    (tmp_path / "book.txt").unlink()
    assert generate_text(tmp_path / "run", "the cat", n_tokens=3, temperature=0, device="cpu").startswith("the cat")


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_run(tmp_path, CPU)
    with pytest.raises(UserError, match="neither a run"):
        write_report(tmp_path)
