"""v3 as a whole: it learns, its losses, and options that contradict each other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from iceaggr.config import V3_PARTS, ModelConfig, TrainConfig, with_parts
from iceaggr.data.cache import EventCache
from iceaggr.data.tokens import build_tokens
from iceaggr.losses import angle_loss, mean_vector, mixture_nll, pointing
from iceaggr.metrics import opening_angle_deg
from iceaggr.models.build import build_model
from iceaggr.train import training_parts
from lab_shared.attention import Mask
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.testing import assert_parity, golden

TINY = TrainConfig(model=ModelConfig(slots=2, d_model=32, d_hidden=48, layers=2, heads=2, head_hidden=16))
V3 = with_parts(TINY, *V3_PARTS).model
pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(batch):
    total = batch.features_TF.shape[0]
    return batch.features_TF, Mask.segments(batch.offsets_E1, total), batch.cls_E


def plane_waves(tables, n_events=32, doms=14, seed=0):
    """Events of single pulses at the times of a plane wave, so that the direction is plain to see."""
    from iceaggr.data.pulses import Pulses

    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(n_events, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    sensor = np.stack([rng.choice(5160, doms, replace=False) for _ in range(n_events)])
    xyz = tables.xyz_S3.numpy()[sensor].astype(np.float64)
    time = np.rint(11_000 - np.einsum("edk,ek->ed", xyz, direction) / 0.2998).astype(np.int32)
    order = np.argsort(time, 1)
    sensor, time = np.take_along_axis(sensor, order, 1), np.take_along_axis(time, order, 1)
    n = n_events * doms
    return Pulses(
        event_id_E=torch.arange(n_events),
        offsets_E1=torch.arange(n_events + 1) * doms,
        sensor_P=torch.from_numpy(sensor.ravel().astype(np.int32)),
        time_P=torch.from_numpy(time.ravel()),
        charge_P=torch.ones(n),
        auxiliary_P=torch.zeros(n, dtype=torch.bool),
        azimuth_E=torch.from_numpy(np.arctan2(direction[:, 1], direction[:, 0]) % (2 * np.pi)),
        zenith_E=torch.from_numpy(np.arccos(direction[:, 2])),
    )


def train(batch, steps, lr=3e-3):
    torch.manual_seed(0)
    model = build_model(V3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        out = model(*inputs(batch))
        nll, n = mixture_nll(out, batch.target_E3)
        loss = (nll + 0.3 * angle_loss(pointing(out), batch.target_E3)[0]) / n
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    error = opening_angle_deg(mean_vector(model(*inputs(batch))).detach(), batch.target_E3)
    return losses, error


def test_v3_overfits_a_few_events(tables):
    batch = build_tokens(plane_waves(tables, n_events=16), V3, tables)
    losses, error = train(batch, 60, lr=1e-2)
    assert error.mean() < 8
    assert losses[-1] < 0 < losses[0]


def test_golden_losses(tables):
    batch = build_tokens(plane_waves(tables, seed=4), V3, tables)
    losses, _ = train(batch, 12)
    golden(Path(__file__).parent / "golden" / "v3.json", losses, rtol=5e-6)


def test_constant_column_keeps_the_scale_of_raw_features(make_pulses, tables):
    raw = replace(TINY.model, input="none")
    proper = replace(raw, input_norm="none")
    batch = build_tokens(make_pulses([9, 6]), raw, tables)
    features, mask, cls = inputs(batch)
    is_dom = torch.ones(len(features), dtype=torch.bool).index_fill_(0, cls, False)
    for scale in (1.0, 0.5):
        x = build_model(proper).embed(features * scale, mask)[is_dom]
        assert torch.equal(x[:, : features.shape[1]], (features * scale)[is_dom])
        assert (x[:, features.shape[1]] == 1).all()
        assert not x[:, features.shape[1] + 1 :].any()
    same = [build_model(raw).embed(features * scale, mask)[is_dom] for scale in (1.0, 0.5)]
    assert_parity(same[0], same[1], atol=1e-3)
    with pytest.raises(ValueError, match="free column"):
        build_model(replace(proper, d_model=10))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (with_parts(TINY, "mixture"), "vmf_weight"),
        (replace(TINY, tta=0), "tta = 0"),
        (replace(TINY, model=ModelConfig(arch="hierarchical", interval=True)), "flat models"),
        (
            replace(TINY, model=replace(TINY.model, arch="hierarchical"), data=replace(TINY.data, data="stream")),
            "folder",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(make_pulses, tables, config, says):
    cache = EventCache.in_memory(make_pulses([9, 6]))
    with pytest.raises(UserError, match=says):
        training_parts(config, cache, np.arange(2), tables, Dist())
