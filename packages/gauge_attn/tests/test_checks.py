import json
import math
import re
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from gauge_attn import grid
from gauge_attn.checks import checked
from gauge_attn.cli import main
from gauge_attn.config import PRESETS, DataConfig, ModelConfig, OptimConfig, TrainConfig
from gauge_attn.diagnostics import sharpness
from gauge_attn.evaluate import evaluate_run, score
from gauge_attn.generate import generate_text
from gauge_attn.report import write_report
from gauge_attn.train import train, train_in
from lab_shared.config import with_field
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.loop import NonFiniteLoss

TINY = TrainConfig(
    model=ModelConfig(spec="1x0e+1x1e", layers=1, scalars=8, copies=1, hidden=8),
    data=DataConfig(keys=4, window=8, batch=2, val_windows=2),
    steps=2,
    eval_every=2,
    wandb="disabled",
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(TINY, out)
    return out


@pytest.fixture
def copy(run_dir, tmp_path):
    """The finished run, to be damaged."""
    return shutil.copytree(run_dir, tmp_path / "copy")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound(preset):
    assert checked(PRESETS[preset][1]) is PRESETS[preset][1]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "steps"),
        ("seed", -1, "seed"),
        ("model.kappa", math.nan, "model.kappa"),
        ("model.kappa", 1e-300, "model.kappa=1e-300"),
        ("model.spec", "3x", "model.spec='3x'"),
        ("model.spec", "0x0e", "model.spec='0x0e'"),
        ("model.route", "dense", "--model.arch faithful"),
        ("model.curvature", 1.0, "--model.arch faithful"),
        ("data.window", 2, "data.window=2"),
        ("data.window", 7, "even window"),
        ("data.keys", 1, "keys"),
        ("data.keys", 10**12, "65,536"),
    ],
)
def test_nonsense_is_refused_by_name_before_a_folder_is_made(field, value, said, tmp_path):
    config = with_field(TINY, field, value)
    with pytest.raises(UserError, match=re.escape(said)):
        checked(config)
    with pytest.raises(UserError, match=re.escape(said)):
        train_in(config, tmp_path / "run", Dist())
    assert not (tmp_path / "run").exists()


def test_a_gpt_has_nothing_to_align():
    with pytest.raises(UserError, match=r"optim\.alignment=1"):
        checked(replace(TINY, model=ModelConfig(arch="gpt"), optim=OptimConfig(alignment=1.0)))


def test_a_wrong_text_leaves_no_folder(tmp_path):
    for data in (str(tmp_path / "none.txt"), str(tmp_path)):
        config = replace(TINY, data=replace(TINY.data, data=data))
        with pytest.raises(UserError, match=r"--data|no train file"):
            train_in(config, tmp_path / "run", Dist())
        assert not (tmp_path / "run").exists()


def test_a_dry_run_checks_as_the_run_does(capsys):
    assert main(["train", "quick", "--dry-run", "--model.spec", "zz"]) == 1
    assert "model.spec='zz'" in capsys.readouterr().err


def test_a_run_with_a_wrong_field_names_its_file(copy):
    file = copy / "config.json"
    wrong = json.loads(file.read_text())
    wrong["model"]["spec"] = "zz"
    file.write_text(json.dumps(wrong))
    for command in (["evaluate"], ["diagnose"], ["generate", "--prompt", "k1"], ["train", "--resume"]):
        assert main([*command, str(copy)]) == 1
    with pytest.raises(UserError, match=r"config\.json: model\.spec='zz'"):
        evaluate_run(copy, split="valid", device="cpu")


def test_a_step_that_is_not_finite_names_its_windows(tmp_path):
    config = replace(TINY, optim=replace(TINY.optim, lr=1e30, readout_lr=1e30))
    with pytest.raises(NonFiniteLoss, match=r"batch ids \[windows of step \d\]"):
        train(config, tmp_path / "run")


class Loud(torch.nn.Module):
    """Logits that miss by `size` nats."""

    def __init__(self, size):
        super().__init__()
        self.size = torch.nn.Parameter(torch.tensor(size))

    def forward(self, tokens_BN):
        from gauge_attn.models import Output

        return Output(self.size * torch.nn.functional.one_hot(tokens_BN, 8).float(), None)


@pytest.mark.parametrize("size", [1e4, math.inf])
def test_a_loss_beyond_all_perplexity_is_said(size):
    from gauge_attn.data import load_corpus, windows
    from gauge_attn.printed import perplexity_text

    corpus = load_corpus(TINY.data)
    data = windows(corpus, "valid", torch.device("cpu"))
    model: Any = Loud(size)
    if math.isinf(size):
        with pytest.raises(UserError, match="loss on the valid split"):
            score(model, corpus, data, TINY, "valid")
        return
    result = score(model, corpus, data, TINY, "valid")
    assert result["loss"] > 709
    assert result["perplexity"] is None
    assert perplexity_text(result["perplexity"]) == "> 1e308"


def test_figures_stay_in_their_ranges_at_any_temperature():
    generator = torch.Generator().manual_seed(0)
    mu = 1e15 * torch.randn(2, 3, 16, 3, generator=generator, dtype=torch.float64)
    figures = sharpness(mu, torch.ones_like(mu), None, 1e-9, self_mask=True)
    for name, (low, high) in {"row_std": (0, 1), "entropy_ratio": (0, 1), "participation": (0, 1)}.items():
        values = getattr(figures, name)
        assert (values >= low).all(), name
        assert (values <= high).all(), name


@pytest.mark.parametrize("temperature", [math.nan, math.inf, 1e-40, -1.0])
def test_temperatures_that_nothing_can_be_drawn_at(run_dir, temperature):
    with pytest.raises(UserError, match="--temperature"):
        generate_text(run_dir, "k1", n_tokens=1, temperature=temperature, device="cpu")


def test_seeds_and_prompts_that_are_none(run_dir):
    with pytest.raises(UserError, match="--seed"):
        generate_text(run_dir, "k1", n_tokens=1, temperature=1.0, seed=10**30, device="cpu")
    with pytest.raises(UserError, match=r"--prompt .* UTF-8"):
        generate_text(run_dir, "k1 \udcff", n_tokens=1, temperature=1.0, device="cpu")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("evaluation.json", "{}"),
        ("evaluation.json", '{"label": 3, "loss": "x"}'),
        ("maps.npz", "xx"),
        ("metrics.jsonl", None),
    ],
)
def test_a_report_names_the_record_it_cannot_read(copy, name, text):
    if text is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(copy)


@pytest.mark.parametrize(
    "text", ["{}", '{"name": "a", "cells": {}, "runs": []}', '{"name": "a", "cells": {}, "runs": [3]}']
)
def test_a_grids_report_names_the_record_it_cannot_read(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        write_report(tmp_path)


def test_a_missing_tokenizer_is_said(tmp_path):
    from gauge_attn.data.tokenizers import Tokenizer

    with pytest.raises(UserError, match=r"there is no .*tokenizer\.json"):
        Tokenizer.read(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_collecting_names_a_damaged_result(tmp_path, text):
    file = tmp_path / "runs" / "free-seed=0" / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(UserError, match=r"result\.json"):
        grid.run_grid("smoke", tmp_path, only_done=True)


def test_a_grids_list_leaves_out_what_is_done(tmp_path):
    done = tmp_path / "runs" / "free-seed=0"
    done.mkdir(parents=True)
    (done / "result.json").write_text("{}")
    text = grid.run_grid("smoke", tmp_path, only_list=True)["text"]
    assert "free-seed=0" not in text
    assert "2 to run, 1 done" in text


def test_sections_do_not_go_with_whole_models(capsys):
    assert main(["bench", "--models", "--only", "speed", "--device", "cpu"]) == 1
    assert "--models" in capsys.readouterr().err
