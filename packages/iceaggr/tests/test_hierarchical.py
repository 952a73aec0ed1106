"""T1 and T2: the rows pulses are laid out in, the function the model computes, training and the commands with it."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iceaggr.cli import main
from iceaggr.config import PRESETS, ModelConfig, TrainConfig
from iceaggr.data.batches import TokenBatches
from iceaggr.data.cache import EventCache
from iceaggr.data.features import LIGHT_SPEED, rotate_z
from iceaggr.data.grouping import group_doms
from iceaggr.data.pulse_batches import (
    Capacity,
    PulseBatches,
    build_pulse_batch,
    one_pass_of_pulses,
    pulse_features,
)
from iceaggr.data.rows import SEQUENCE, attended_bound, count_attended, lay_out, plan_rows
from iceaggr.directions import angles_to_vector
from iceaggr.losses import angle_loss
from iceaggr.metrics import opening_angle_deg
from iceaggr.models import hierarchical
from iceaggr.models.build import build_model, not_hidden
from iceaggr.models.hierarchical import pulse_inputs
from iceaggr.predict import predict_events
from lab_shared.attention import attend
from lab_shared.optim import split_params
from lab_shared.testing import assert_parity, golden

TINY = ModelConfig(arch="hierarchical", d_model=16, d_hidden=32, layers=2, heads=2, head_hidden=16)


@pytest.fixture(autouse=True)
def one_thread():
    """These models are smaller than the cost of sharing them between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes):
    torch.manual_seed(0)
    return build_model(replace(TINY, **changes))


@pytest.fixture(scope="module")
def mixed(make_pulses):
    """Events of one DOM, of few and of many, one of them with DOMs of more than 512 pulses."""
    return make_pulses([5, 1, 60, 3000, 7], seed=4, sensors=4)


# --- rows -----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 900), min_size=1, max_size=8),
    sensors=st.sampled_from([1, 3, 60, 5160]),
    limit=st.sampled_from([None, 2, 3]),
    spare=st.integers(0, 700),
)
def test_rows_hold_each_pulse_once_and_whole_chunks(make_pulses, counts, sensors, limit, spare):
    doms = group_doms(make_pulses(counts, sensors=sensors))
    n_pulses, n_attended = sum(counts), count_attended(doms)
    plan = plan_rows(n_pulses + spare, min(n_attended + spare, n_pulses + spare), limit)
    row_P, offsets_BK = lay_out(doms, plan)
    assert offsets_BK.shape == (plan.batches, plan.batch_rows + 1)
    assert len(set(row_P.tolist())) == n_pulses
    assert int(row_P.max()) < plan.rows
    dom_R = np.full(plan.rows, -1)
    dom_R[row_P.numpy()] = doms.dom_of_pulse_P.numpy()
    attended = plan.batches * plan.batch_rows
    segments: dict[int, list[int]] = {}
    for b, offsets in enumerate(offsets_BK.numpy()):
        for low, high in pairwise(offsets):
            rows = dom_R[b * plan.batch_rows + low : b * plan.batch_rows + high]
            if rows.size:
                assert 0 <= rows.min() == rows.max()  # pulses of one DOM, no unused row
                segments.setdefault(int(rows[0]), []).append(rows.size)
        assert (dom_R[b * plan.batch_rows + offsets[-1] : (b + 1) * plan.batch_rows] == -1).all()
    count_D = doms.count_D.numpy()
    for dom, lengths in segments.items():
        assert sum(lengths) == count_D[dom]
        assert len(lengths) == -(-count_D[dom] // SEQUENCE)
        assert max(lengths) - min(lengths) <= 1
    behind = dom_R[attended:]
    assert (count_D[behind[behind >= 0]] == 1).all()
    assert set(np.flatnonzero(count_D > 1)) <= set(segments)
    if limit is not None:
        assert plan.batch_rows <= SEQUENCE * limit


def test_the_bound_is_known_without_looking_at_pulses(make_pulses):
    for sensors in (1, 5, 60, 5160):
        pulses = make_pulses(np.random.default_rng(1).integers(1, 200, 40), sensors=sensors)
        doms = group_doms(pulses)
        several_D = torch.where(doms.count_D > 1, doms.count_D, 0)
        attended_E = torch.zeros(40, dtype=torch.int64).index_add_(0, doms.event_D, several_D).numpy()
        bound_E = attended_bound(pulses.counts_E.numpy(), doms.offsets_E1.diff().numpy())
        assert (attended_E <= bound_E).all()
        assert (bound_E <= pulses.counts_E.numpy()).all()
    # exact where no DOM has more than two
    assert attended_bound(np.array([7]), np.array([5])).tolist() == [4]


def test_mini_batches_lose_at_most_511_rows_each():
    plan = plan_rows(178_250, 170_000, 64)
    assert plan.batch_rows == 32_768
    assert plan.batches == 6
    with pytest.raises(ValueError, match="max_batch_size is 1"):
        plan_rows(10, 5, 1)


# --- the function the model computes --------------------------------------------------------------


def naive(model, pulses, tables):
    """The definition: one DOM at a time in chunks, one event at a time, one head at a time, with plain softmax."""

    def block(layer, x):
        a, outputs = layer.attention, []
        for i in range(a.heads):
            rows = slice(i * x.shape[1] // a.heads, (i + 1) * x.shape[1] // a.heads)
            q, k, v = (x @ part.weight[rows].T + part.bias[rows] for part in (a.q, a.k, a.v))
            outputs.append(torch.softmax(q @ k.T / q.shape[1] ** 0.5, -1) @ v)
        x = layer.norm1(x + a.c_proj(torch.cat(outputs, -1)))
        return layer.norm2(x + layer.c_proj(torch.nn.functional.gelu(layer.c_fc(x))))

    doms = group_doms(pulses)
    features_PF = pulse_features(pulses, doms)
    embeddings = []
    for start, count in zip(doms.start_D.tolist(), doms.count_D.tolist(), strict=True):
        n = -(-count // 512)
        outputs = []
        for chunk in torch.tensor_split(features_PF[start : start + count], [-(-j * count // n) for j in range(1, n)]):
            x = model.t1.input(chunk)
            for layer in model.t1.blocks:
                x = block(layer, x)
            outputs.append(model.t1.norm(x))
        embeddings.append(torch.cat(outputs).mean(0))
    x_DM = torch.stack(embeddings) + model.t2.geometry(tables.xyz_S3[doms.sensor_D] / 500)
    answers = []
    for low, high in zip(doms.offsets_E1[:-1].tolist(), doms.offsets_E1[1:].tolist(), strict=True):
        x = x_DM[low:high]
        for layer in model.t2.blocks:
            x = block(layer, x)
        answers.append(model.head(x.mean(0)))
    return torch.stack(answers)


def test_forward_and_gradients_match_the_definition(mixed, tables):
    model = tiny()
    v_E3 = model(*pulse_inputs(build_pulse_batch(mixed, TINY, tables)))
    expected = naive(model, mixed, tables)
    assert_parity(v_E3, expected, atol=1e-5)
    weights = torch.randn(v_E3.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((v_E3 * weights).sum(), list(model.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert_parity(a, b, atol=2e-5 * (1 + float(b.abs().max())), name=name)


def gradients(model, batch):
    model.zero_grad()
    v_E3 = model(*pulse_inputs(batch))
    loss, n = angle_loss(v_E3, batch.target_E3, batch.valid_E)
    (loss / n).backward()
    return v_E3[: batch.n_events].detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch_size": 2},
        {"max_batch_size": 4, "checkpoint": True},
        {"checkpoint": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("capacity", [None, Capacity(9, 300, 3400, 3300)], ids=["exact", "static"])
def test_memory_options_and_capacities_change_nothing(mixed, tables, changes, capacity):
    model = tiny()
    v_E3, grads = gradients(model, build_pulse_batch(mixed, TINY, tables))
    config = replace(TINY, **changes)
    other = build_model(config)
    other.load_state_dict(model.state_dict())
    batch = build_pulse_batch(mixed, config, tables, capacity=capacity)
    other_v_E3, other_grads = gradients(other, batch)
    assert_parity(other_v_E3, v_E3, atol=1e-5)
    for a, b in zip(other_grads, grads, strict=True):
        assert_parity(a, b, atol=1e-5 * (1 + float(b.abs().max())))


def test_single_pulse_doms_skip_attention_exactly(make_pulses, tables, monkeypatch):
    """With room for attention they are segments of one row there; without, no query or key is made for them."""
    pulses, model = make_pulses([40, 12, 30], seed=2), tiny()
    attended = count_attended(group_doms(pulses))
    assert 0 < attended < 10
    through = build_pulse_batch(pulses, TINY, tables, capacity=Capacity(3, 90, 82, 82))
    assert through.batch_rows == 82
    expected = model(*pulse_inputs(through))
    seen = []
    monkeypatch.setattr(hierarchical, "attend", lambda q, k, v, mask: seen.append(len(q)) or attend(q, k, v, mask))
    assert_parity(model(*pulse_inputs(build_pulse_batch(pulses, TINY, tables))), expected, atol=1e-6)
    n_doms = group_doms(pulses).n_doms
    assert seen == [attended] * 2 + [n_doms] * 2


def test_events_do_not_mix_and_order_in_a_batch_does_not_matter(make_pulses, tables):
    model = tiny().eval()
    cache = EventCache.in_memory(make_pulses([30, 80, 5, 200, 1], seed=8, sensors=30))
    config = TrainConfig(model=TINY)
    whole = predict_events(model, cache, np.arange(5), config, tables)
    for i in (3, 0, 4):
        assert_parity(predict_events(model, cache, np.array([i]), config, tables)[0], whole[i], atol=1e-5)
    assert_parity(predict_events(model, cache, np.array([2, 0, 1]), config, tables), whole[[2, 0, 1]], atol=1e-5)


def test_the_seeds_configuration_has_its_parameters():
    """1.6 million in the seed; the formula of its description: T1, T2 and the direction head."""
    c = PRESETS["t1t2"][1].model
    assert (c.d_model, c.heads, c.layers) == (128, 8, 4)
    d, h, head = c.d_model, c.d_hidden, c.head_hidden
    layer = 4 * (d * d + d) + 2 * d * h + h + d + 4 * d
    t1, t2 = 4 * d + d + c.layers * layer + 2 * d, 3 * d // 2 + d // 2 + d // 2 * d + d + c.layers * layer
    count = sum(p.numel() for p in build_model(c).parameters())
    assert count == t1 + t2 + d * head + head + 3 * head + 3 == 1_612_547


def test_every_parameter_has_one_kind_of_optimizer():
    model = tiny()
    split = split_params(model, not_hidden=not_hidden(model))
    names = [*split.muon, *split.decay, *split.no_decay]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(split.muon) == 2 * TINY.layers * 6
    assert all(".blocks." in name for name in split.muon)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "multiple of 2 and of heads = 5"),
        ({"layers": 0}, "model.layers is 0"),
        ({"dom_cap": 64}, "model.dom_cap is an option of the flat models"),
        ({"features": "summary"}, "model.features is an option of the flat models"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_autocast_bfloat16(mixed, tables):
    model, batch = tiny(), build_pulse_batch(mixed, TINY, tables)
    exact = model(*pulse_inputs(batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v_E3 = model(*pulse_inputs(batch))
    assert v_E3.dtype == torch.float32
    assert_parity(v_E3, exact, atol=0.1 * exact.abs().max().item())
    angle_loss(v_E3, batch.target_E3)[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# --- batches --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(make_pulses):
    counts = np.random.default_rng(3).integers(1, 60, 120)
    counts[17] = 900
    return EventCache.in_memory(make_pulses(counts, seed=9, sensors=200))


def same(a, b):
    tensors = ("features_RF", "dom_R", "offsets_BK", "xyz_D3", "count_D", "event_D", "offsets_E1", "target_E3")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors) and np.array_equal(
        a.index_E, b.index_E
    )


def test_static_batches_all_have_one_shape_and_every_event_once(cache, tables):
    batches = PulseBatches(cache, np.arange(120), TINY, tables, token_budget=400, seed=1, static=True)
    taken, shapes = [], set()
    while len(taken) < 120:
        batch = next(batches)
        taken += batch.index_E.tolist()
        shapes.add((batch.features_RF.shape, batch.offsets_BK.shape, batch.xyz_D3.shape, batch.valid_E.shape))
        assert int(batch.valid_E.sum()) == batch.n_events
    assert sorted(taken[:120]) == list(range(120))
    assert len(shapes) == 1
    counts = cache.n_pulses_E
    assert max(counts[taken[:5]].sum(), 900) <= batches.capacity.pulses
    with pytest.raises(ValueError, match="exceed Capacity"):
        build_pulse_batch(cache.gather(np.arange(120)), TINY, tables, capacity=batches.capacity)


def test_the_stream_resumes_exactly_and_two_ranks_share_it(cache, tables):
    def stream(**options):
        return PulseBatches(cache, np.arange(120), TINY, tables, token_budget=300, seed=5, rotate=True, **options)

    whole = stream()
    first = [next(whole) for _ in range(3)]
    state = json.loads(json.dumps(whole.state_dict()))
    rest = [next(whole) for _ in range(3)]
    other = stream()
    other.load_state_dict(state)
    assert all(same(a, next(other)) for a in rest)
    ranks = [stream(rank=rank, world=2) for rank in range(2)]
    shared = [next(ranks[i % 2]) for i in range(6)]
    assert all(same(a, b) for a, b in zip(first + rest, shared, strict=True))


def test_the_order_of_events_is_that_of_the_flat_models(cache, tables):
    flat = TokenBatches(cache, np.arange(120), ModelConfig(), tables, token_budget=2000, seed=5)
    pulses = PulseBatches(cache, np.arange(120), TINY, tables, token_budget=2000, seed=5)
    assert next(flat).index_E[:20].tolist() == next(pulses).index_E[:20].tolist()


def test_one_pass_sees_every_event_once(cache, tables):
    for static in (False, True):
        batches = list(one_pass_of_pulses(cache, np.arange(100), TINY, tables, token_budget=300, static=static))
        assert len(batches) > 5
        assert sorted(np.concatenate([b.index_E for b in batches])) == list(range(100))


def test_rotation_turns_positions_and_targets(cache, tables):
    pulses = cache.gather(np.arange(4))
    angle_E = torch.tensor([0.3, 1.0, 2.0, -1.0])
    plain = build_pulse_batch(pulses, TINY, tables)
    turned = build_pulse_batch(pulses, TINY, tables, rotation_E=angle_E)
    assert_parity(turned.xyz_D3, rotate_z(plain.xyz_D3, angle_E[plain.event_D]), atol=1e-6)
    assert_parity(turned.target_E3, rotate_z(plain.target_E3, angle_E), atol=1e-6)
    assert torch.equal(turned.features_RF, plain.features_RF)


# --- training -------------------------------------------------------------------------------------


def plane_waves(make_pulses, tables, n_events=16, hits=20):
    """Events whose light front crosses 20 DOMs at the speed of light: the direction is plain to see."""
    pulses = make_pulses([hits] * n_events, seed=0)
    from_D3 = angles_to_vector(pulses.azimuth_E, pulses.zenith_E).repeat_interleave(hits, 0)
    time_P = 1e4 - (tables.xyz_S3[pulses.sensor_P.long()] * from_D3).sum(1) / LIGHT_SPEED
    order_P = np.lexsort((time_P.numpy(), pulses.event_of_pulse_P().numpy()))
    return replace(pulses, sensor_P=pulses.sensor_P[order_P], time_P=time_P[order_P].round().int())


def fit(pulses, tables, steps, lr=3e-3):
    model = tiny(d_model=32)
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
    with pytest.raises(KeyboardInterrupt):
        main(["train", *TRAIN, *data, "--out", str(tmp_path / "stopped")])
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


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("changes", [{}, {"max_batch_size": 2, "checkpoint": True}], ids=str)
def test_compiled_training_on_gpu_matches_the_cpu(make_pulses, tables, dtype, atol, changes):
    config = replace(TINY, d_model=32, **changes)
    torch.manual_seed(0)
    model = build_model(config)
    cases = [make_pulses(counts, seed=i, sensors=20) for i, counts in enumerate([[5, 60, 1500], [80, 2, 9], [1]])]
    expected = [model(*pulse_inputs(build_pulse_batch(pulses, config, tables))).detach() for pulses in cases]
    model.cuda()
    tables = replace(tables, **{name: x.cuda() for name, x in vars(tables).items()})
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    for i, (pulses, cpu) in enumerate(zip(cases, expected, strict=True)):
        batch = build_pulse_batch(pulses.to("cuda"), config, tables, capacity=Capacity(8, 128, 2048, 1600))
        model.zero_grad()
        with (
            torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"),
            torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32),
        ):
            v_E3 = compiled(*pulse_inputs(batch))
        angle_loss(v_E3, batch.target_E3, batch.valid_E)[0].backward()
        assert_parity(v_E3[: len(cpu)], cpu, atol=atol * (1 + cpu.abs().max().item()))
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.gpu
def test_batches_are_made_without_waiting_for_the_gpu(cache, tables):
    tables = replace(tables, **{name: x.cuda() for name, x in vars(tables).items()})
    batches = PulseBatches(cache, np.arange(120), TINY, tables, token_budget=400, seed=1, static=True, prefetch=0)
    next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pulse_inputs(next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        batches.close()
