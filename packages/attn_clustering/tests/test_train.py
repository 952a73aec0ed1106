"""The training loop on tiny runs: golden losses, exact resume, overfitting, and what a run leaves behind."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attn_clustering import bench, runs, train
from attn_clustering.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from attn_clustering.data.ordering import Plan
from attn_clustering.data.settings import LANGUAGES
from attn_clustering.experiments import EXPERIMENTS, phase2_config, run_config
from attn_clustering.model import build_model, next_token_targets
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.run import read_metrics
from lab_shared.testing import golden

LANGUAGE = replace(LANGUAGES["smoke"], vocab=32, seq_len=32, min_segment=8, train_sequences=40, val_sequences=8)
TINY = replace(
    EXPERIMENTS["smoke"][1],
    model=ModelConfig(vocab=32, d_model=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=24),
    data=DataConfig(LANGUAGE),
    optim=OptimConfig(steps=7, batch=4, warmup=2, lr=3e-3, eval_every=4, eval_sequences=8, log_every=3),
)
RUN = run_config(TINY, "mha", "shuffled", 0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return runs.load_run(folder)[0].state_dict()


@pytest.mark.parametrize("condition", ["mha-shuffled", "gqa-topic_ordered"])
def test_golden_losses(condition, tmp_path):
    """The first 20 losses in float32 on one CPU thread."""
    attention, ordering = condition.split("-")
    experiment = replace(TINY, optim=replace(TINY.optim, steps=20, log_every=1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.train(run_config(experiment, attention, ordering, 0), tmp_path / "run", device="cpu")
    finally:
        torch.set_num_threads(threads)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run", "train")]
    golden(Path(__file__).parent / "golden" / f"{condition}.json", losses, rtol=1e-5)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    config = replace(RUN, optim=replace(RUN.optim, checkpoint_every=2))
    train.train(config, tmp_path / "whole", device="cpu")
    calls = 0

    def dies_in_step_6(tokens_BT):
        nonlocal calls
        calls += 1
        if calls == 9:  # 2 batches of validation at the start and 2 in step 4
            raise KeyboardInterrupt
        return next_token_targets(tokens_BT)

    with monkeypatch.context() as patch:
        patch.setattr(train, "next_token_targets", dies_in_step_6)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path / "killed", device="cpu")
    assert not (tmp_path / "killed" / "DONE.json").exists()
    train.resume(tmp_path / "killed")
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def record(folder):
        return [(r["step"], r["split"], r["loss"]) for r in read_metrics(folder)]

    assert record(tmp_path / "killed") == record(tmp_path / "whole")


def test_what_a_run_leaves_behind(tmp_path, capsys):
    summary = train.train(RUN, tmp_path / "run", device="cpu")
    assert summary["epochs"] == pytest.approx(7 * 4 / 40)
    assert "0.70 epochs of 40 sequences" in capsys.readouterr().err
    assert summary["val_loss"] == read_metrics(tmp_path / "run", "val")[-1]["loss"] < summary["val_loss_at_start"]
    plan = Plan.load(tmp_path / "run" / "plan.npz")
    assert plan.hash == summary["plan"]
    assert plan.index_S.shape == (28,)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert json.loads((tmp_path / "run" / "DONE.json").read_text())["summary"] == summary
    # A finished run is read, not repeated; another configuration is refused.
    written = (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns
    assert train.train(RUN, tmp_path / "run", device="cpu") == summary
    assert (tmp_path / "run" / "weights.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="another configuration"):
        train.train(replace(RUN, seed=1), tmp_path / "run", device="cpu")


def test_the_step_by_itself_is_the_ticks_step_to_the_same_bits(tmp_path):
    """Off CUDA, what a graph would record runs as it is."""
    for graphed in ("off", "on"):
        config = replace(RUN, optim=replace(RUN.optim, step_graph=graphed, log_every=1))
        train.train(config, tmp_path / graphed, device="cpu")
    off, on = weights(tmp_path / "off"), weights(tmp_path / "on")
    assert all(torch.equal(off[name], on[name]) for name in off)
    records = [
        [(r["loss"], r.get("grad_norm"), r.get("lr")) for r in read_metrics(tmp_path / g)] for g in ("off", "on")
    ]
    assert records[0] == records[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it
def test_blocks_of_all_models_share_one_compiled_code(monkeypatch):
    """With and without positions: two graphs of a block, one of embedding and head each, for any number of models."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=backend, **options))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 256)
    shape = replace(TINY.model, layers=3)
    tokens = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    for seed, rope in ((0, True), (1, True), (2, False), (3, True)):
        model, plain = build_model(shape, seed), build_model(shape, seed)
        model.rope_on = plain.rope_on = rope
        train.compile_blocks(model, replace(TINY.optim, compile="block"), torch.device("cpu"))
        targets = next_token_targets(tokens)
        assert model(tokens, targets).item() == pytest.approx(plain(tokens, targets).item(), abs=1e-6)
    assert len(graphs) == 4


@pytest.mark.parametrize("name", ["sanity", "faithful-v1", "text"])
def test_long_runs_on_a_gpu_are_compiled_and_recorded_and_short_recalibrations_are_not(name):
    trained = run_config(EXPERIMENTS[name][1], "mha", "shuffled", 0)
    short = phase2_config(trained, EXPERIMENTS[name][1].recals[0])
    for config, pays in ((trained, True), (short, False)):
        for device in ("cuda", "cpu"):
            dist = SimpleNamespace(world=1, device=torch.device(device))
            assert train.step_graphed(config.optim, dist) == train.preparing_pays(config.optim, dist.device)
            assert train.preparing_pays(config.optim, dist.device) == (pays and device == "cuda")


def test_a_model_overfits_one_batch():
    model = build_model(TINY.model, 0)
    optimizer = train.training_optimizer(model, replace(TINY.optim, lr=0.03))
    tokens = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(80):
        loss = model(tokens, next_token_targets(tokens))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_optimizer_groups_are_the_first_runs(tmp_path):
    faithful = EXPERIMENTS["faithful-v1"][1]
    model = build_model(TINY.model, 0)
    muon, embedding, gains = train.training_optimizer(model, faithful.optim).param_groups
    assert sum(p.numel() for p in muon["params"]) == 16 * 16 * 4 + 3 * 16 * 24
    assert embedding["param_names"] == ["embed.weight"]
    assert (muon["lr"], muon["momentum"], embedding["lr"], gains["lr"]) == (0.02, 0.95, 3e-4, 3e-4)
    assert [g["weight_decay"] for g in (muon, embedding, gains)] == [0.01, 0.01, 0.01]
    assert (embedding["eps"], embedding["betas"]) == (1e-10, (0.9, 0.95))
    kept = train.training_optimizer(model, replace(faithful.optim, decay_gains=False))
    assert kept.param_groups[2]["weight_decay"] == 0


def test_evaluation_is_the_mean_over_all_positions_of_whole_batches():
    model = build_model(TINY.model, 0)
    tokens = torch.randint(32, (11, 16), generator=torch.Generator().manual_seed(0))
    autocast = train.set_precision(model, TINY.optim, torch.device("cpu"))
    expected = torch.nn.functional.cross_entropy(model(tokens[:8, :-1]).flatten(0, 1), tokens[:8, 1:].flatten())
    assert train.evaluate(model, autocast, tokens, 4) == pytest.approx(expected.item(), abs=1e-6)
    with pytest.raises(UserError, match="less than one batch"):
        train.evaluate(model, autocast, tokens, 12)


def test_fresh_data_are_met_once_and_the_recalibration_stream_is_new():
    fresh = replace(TINY, data=replace(TINY.data, mode="fresh", cooldown=0.5))
    config = run_config(fresh, "mha", "topic_ordered", 0)
    assert config.data.language.train_sequences == 28
    sequences, plan = runs.training_data(config, "cpu")
    assert sorted(plan.index_S.tolist()) == list(range(28))
    assert len(sequences) == 28
    other = runs.training_data(run_config(fresh, "gqa", "shuffled", 0), "cpu")[1]
    assert plan.cooldown_steps == 4
    assert plan.index_S[-16:].equal(other.index_S[-16:])
    assert not plan.index_S[:-16].equal(other.index_S[:-16])


def test_config_survives_json():
    from lab_shared.config import from_json, to_json

    for _, experiment in EXPERIMENTS.values():
        config = run_config(experiment, "gqa", "interleaved", 5)
        assert from_json(RunConfig, to_json(config)) == config


def test_a_missing_corpus_says_how_to_make_one(tmp_path):
    text = replace(TINY, data=DataConfig(corpus=str(tmp_path / "none")))
    with pytest.raises(UserError, match="attn-clustering prepare"):
        train.train(run_config(text, "mha", "shuffled", 0), tmp_path / "run", device="cpu")


def test_bench_rows_say_what_was_measured():
    row = bench.bench_training(TINY, "gqa", device="cpu", quick=True)
    assert row["stage"] == "train smoke gqa"
    assert row["tokens_per_s"] == pytest.approx(4 * 32 / row["ms_per_step"] * 1000, rel=1e-6)
    assert "train smoke gqa" in bench.table([row])
    with pytest.raises(UserError, match="stages are"):
        bench.bench(only=["nothing"])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """Two CPU processes, in the environment that torchrun gives them, reach the losses of one; this one is rank 0."""
    train.train(RUN, tmp_path / "one", device="cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**place, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    script = (
        "import sys\nfrom pathlib import Path\nfrom lab_shared.config import from_json\n"
        "from attn_clustering.config import RunConfig\nfrom attn_clustering.train import train\n"
        "config = from_json(RunConfig, Path(sys.argv[1]).read_text())\ntrain(config, Path(sys.argv[2]), device='cpu')\n"
    )
    argv = [sys.executable, "-c", script, str(tmp_path / "one" / "config.json"), str(tmp_path / "two")]
    env = {**os.environ, "RANK": "1", "LOCAL_RANK": "1"}
    with subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as other:
        try:
            train.train(RUN, tmp_path / "two", device="cpu")
            said = other.communicate(timeout=60)[1]
        finally:
            other.kill()  # it would wait for a rank 0 that failed
    assert other.returncode == 0, said[-3000:]
    one, two = ([r["loss"] for r in read_metrics(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("compile_", "graph"), [("block", "off"), ("off", "on"), ("block", "on")])
def test_compiled_training_follows_eager(compile_, graph, tmp_path):
    losses = []
    for how, graphed in (("off", "off"), (compile_, graph)):
        optim = replace(RUN.optim, compile=how, step_graph=graphed, dtype="float32", log_every=1, steps=10)
        run = tmp_path / f"{how}-{graphed}"
        train.train(replace(RUN, optim=optim), run, device="cuda")
        losses.append([r["loss"] for r in read_metrics(run)])
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_a_run_whose_metrics_lost_their_end_still_says_its_last_loss(tmp_path, monkeypatch):
    config = replace(RUN, optim=replace(RUN.optim, checkpoint_every=7))
    whole = train.train(config, tmp_path / "whole", device="cpu")
    monkeypatch.setattr(train.Run, "finish", lambda *_: 1 / 0)  # after the last checkpoint
    with pytest.raises(ZeroDivisionError):
        train.train(config, tmp_path / "cut", device="cpu")
    monkeypatch.undo()
    file = tmp_path / "cut" / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:3]))
    cut = train.train(config, tmp_path / "cut", device="cpu")
    assert cut["val_loss"] == whole["val_loss"]
    assert cut["val_loss_at_start"] == whole["val_loss_at_start"]


def test_only_rank_0_reads_out_a_finished_run(tmp_path, monkeypatch):
    train.train(RUN, tmp_path / "run", device="cpu")
    for rank, found in ((0, True), (1, False)):
        monkeypatch.setattr(train, "init", lambda device, rank=rank: Dist(rank))
        assert (train.train(RUN, tmp_path / "run") is not None) == found


@pytest.mark.parametrize(
    ("field", "value", "said"), [("eval_sequences", 3, "3 validation sequences"), ("batch", 3, "divide among 2")]
)
def test_what_cannot_be_trained_leaves_no_folder(tmp_path, monkeypatch, field, value, said):
    config = replace(RUN, optim=replace(RUN.optim, **{field: value}))
    monkeypatch.setattr(train, "init", lambda device: Dist(world=1 if field == "eval_sequences" else 2))
    monkeypatch.setattr(Dist, "shutdown", lambda self: None)
    with pytest.raises(UserError, match=said):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
