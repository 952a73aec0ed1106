"""T1 and T2: the function the model computes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from iceaggr.config import PRESETS, ModelConfig, TrainConfig
from iceaggr.data.cache import EventCache
from iceaggr.data.grouping import group_doms
from iceaggr.data.pulse_batches import Capacity, build_pulse_batch, pulse_features
from iceaggr.data.rows import count_attended
from iceaggr.losses import angle_loss
from iceaggr.models import hierarchical
from iceaggr.models.build import build_model, not_hidden
from iceaggr.models.hierarchical import pulse_inputs
from iceaggr.predict import predict_events
from lab_shared.attention import attend
from lab_shared.optim import split_params
from lab_shared.testing import assert_parity

TINY = ModelConfig(arch="hierarchical", d_model=16, d_hidden=32, layers=2, heads=2, head_hidden=16)
pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**changes):
    torch.manual_seed(0)
    return build_model(replace(TINY, **changes))


@pytest.fixture(scope="module")
def mixed(make_pulses):
    """Events of one DOM, of few and of many, one of them with DOMs of more than 512 pulses."""
    return make_pulses([5, 1, 60, 3000, 7], seed=4, sensors=4)


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


@pytest.mark.parametrize("counts", [[2000] * 3, [40] * 80], ids=["few singles", "nearly only singles"])
def test_mini_batches_bound_every_row_that_t1_takes_at_once(make_pulses, tables, counts):
    """The pulses that skip attention too: many events hold more of them than of those that attend."""
    config, rows = replace(TINY, max_batch_size=2), []
    model = tiny(max_batch_size=2)
    model.t1.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    batch = build_pulse_batch(make_pulses(counts, seed=3), config, tables)
    v_E3 = model(*pulse_inputs(batch))
    assert max(rows) <= 2 * 512 < sum(rows) == len(batch.features_RF)
    assert_parity(v_E3, tiny()(*pulse_inputs(build_pulse_batch(make_pulses(counts, seed=3), TINY, tables))), atol=1e-5)


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
        ({"slots": 41}, "model.slots is an option of the flat models"),
        ({"empty": "zero"}, "model.empty is an option of the flat models"),
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
