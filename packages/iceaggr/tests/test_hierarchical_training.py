"""T1 and T2: learning, the commands, and the memory that an extreme event takes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from iceaggr import bench_hierarchical
from iceaggr.cli import main
from iceaggr.config import ModelConfig, TrainConfig
from iceaggr.data.features import LIGHT_SPEED
from iceaggr.data.pulse_batches import PulseBatches, build_pulse_batch
from iceaggr.directions import angles_to_vector
from iceaggr.losses import angle_loss
from iceaggr.metrics import opening_angle_deg
from iceaggr.models.build import build_model
from iceaggr.models.hierarchical import pulse_inputs
from lab_shared.testing import golden

TINY = ModelConfig(arch="hierarchical", d_model=32, d_hidden=32, layers=2, heads=2, head_hidden=16)
pytestmark = pytest.mark.usefixtures("one_thread")


def plane_waves(make_pulses, tables, n_events=16, hits=20):
    """Events whose light front crosses 20 DOMs at the speed of light: the direction is plain to see."""
    pulses = make_pulses([hits] * n_events, seed=0)
    from_D3 = angles_to_vector(pulses.azimuth_E, pulses.zenith_E).repeat_interleave(hits, 0)
    time_P = 1e4 - (tables.xyz_S3[pulses.sensor_P.long()] * from_D3).sum(1) / LIGHT_SPEED
    order_P = np.lexsort((time_P.numpy(), pulses.event_of_pulse_P().numpy()))
    return replace(pulses, sensor_P=pulses.sensor_P[order_P], time_P=time_P[order_P].round().int())


def fit(pulses, tables, steps, lr=3e-3):
    torch.manual_seed(0)
    model = build_model(TINY)
    batch = build_pulse_batch(pulses, TINY, tables)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        total, count = angle_loss(model(*pulse_inputs(batch)), batch.target_E3)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append(float(total.detach() / count))
    return losses, opening_angle_deg(model(*pulse_inputs(batch)).detach(), batch.target_E3)


def test_overfits_a_few_events(make_pulses, tables):
    pulses = plane_waves(make_pulses, tables)
    _, before = fit(pulses, tables, 0)
    _, after = fit(pulses, tables, 120)
    assert before.mean() > 45
    assert after.mean() < 8


def test_golden_losses(make_pulses, tables):
    losses, _ = fit(make_pulses([20, 4, 700, 31], seed=4, sensors=30), tables, 12)
    golden(Path(__file__).parent / "golden" / "hierarchical.json", losses, rtol=5e-6)


TRAIN = [
    "t1t2", "--epochs", "1.5", "--model.d-model", "16", "--model.d-hidden", "16", "--model.layers", "1",
    "--model.heads", "2", "--model.head-hidden", "16", "--data.val-events", "40", "--tokens-per-batch", "2500",
    "--checkpoint-every", "3", "--eval-every", "3", "--log-every", "1", "--wandb", "disabled",
]  # fmt: skip


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line.get("split") == "train"}


@pytest.mark.slow
def test_commands_train_resume_and_predict(tmp_path, monkeypatch, capsys):
    data = ["--data", str(tmp_path / "sim"), "--data.store", str(tmp_path / "store")]
    assert main(["simulate", "--out", str(tmp_path / "sim"), "--events", "160", "--seed", "1"]) == 0
    assert main(["train", *TRAIN, *data, "--out", str(tmp_path / "whole")]) == 0
    assert "held-out events (simulated data)" in capsys.readouterr().out

    steps, original = [0], PulseBatches.__next__

    def stopping(self):
        steps[0] += 1
        if steps[0] == 5:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(PulseBatches, "__next__", stopping)
    assert main(["train", *TRAIN, *data, "--out", str(tmp_path / "stopped")]) == 130
    monkeypatch.setattr(PulseBatches, "__next__", original)
    assert main(["train", "--resume", str(tmp_path / "stopped")]) == 0
    names = [tmp_path / name / "weights.safetensors" for name in ("whole", "stopped")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "stopped")

    out = tmp_path / "submission.csv"
    assert main(["predict", str(tmp_path / "whole"), "--data", str(tmp_path / "sim"), "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 161


MEMORY = """
import json
import torch
from iceaggr.bench_hierarchical import EXTREME_EVENTS, extreme_memory
from iceaggr.config import ModelConfig, TrainConfig
from iceaggr.data.features import Tables
from iceaggr.geometry import icecube86
torch.set_num_threads(1)
config = TrainConfig(model=ModelConfig(arch="hierarchical", d_model=64, d_hidden=128, layers=1, heads=4))
size, tables = EXTREME_EVENTS["178,250 pulses"], Tables.of(icecube86(), "cpu")
runs = [(False, 16), (True, 16), (True, 400)]
print(json.dumps([extreme_memory(config, tables, *size, max_batch_size=n, train=t)["peak_gb"] for t, n in runs]))
"""


@pytest.mark.slow
def test_mini_batches_bound_the_memory_of_an_extreme_event():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predict, train, without_limit = np.cumsum(json.loads(done.stdout))  # each is growth beyond the one before
    assert predict < 0.3
    assert train < 0.6
    assert without_limit > 1.5 * train


def test_parts_of_a_step_are_not_cut_to_fit_it(monkeypatch, store, tables):
    """T1 and T2 are timed apart: where they take longer together than the step, the rest is below 0 and is shown so."""
    monkeypatch.setattr(bench_hierarchical, "measure", lambda *_, **__: {"median_s": 3600.0})
    config = TrainConfig(model=TINY, tokens_per_batch=512)
    result = bench_hierarchical.bench_hierarchical(config, store, tables, quick=True)
    assert result["split"]["rest_s"] < -3600
    assert "rest -" in result["text"]
