"""Diagnostics of memory: what they must find in models whose slots are known to matter, or not to."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lab_shared.checkpoint import save_weights
from lab_shared.config import to_json
from lab_shared.errors import UserError
from rh_memory import diagnostics, report
from rh_memory.config import EXPLICIT_SMALL, DataConfig, ModelConfig
from rh_memory.data.unfold import Spacings
from rh_memory.data.windows import SpacingData
from rh_memory.diagnostics import ablation, aggregate, attention, blocks, geometry, identity, legacy, rollout
from rh_memory.diagnostics.golden import Golden, readout_nll, slot_states, under_changes, window_nll
from rh_memory.linear import LinearFit
from rh_memory.models import build_model

TINY = {"d_model": 16, "layers": 1, "heads": 2, "context": 32, "dropout": 0.0, "n_memory": 3, "head_init": "spread"}


@pytest.fixture(scope="module")
def golden() -> Golden:
    rng = np.random.default_rng(0)
    s = rng.gamma(6, 1 / 6, 4000).astype(np.float32)
    height = 1e4 + np.cumsum(s, dtype=np.float64)
    spacings = Spacings(s, height, np.zeros(4000), np.log(height / 2 / np.pi).astype(np.float32))
    return Golden.spread(SpacingData(spacings), torch.arange(0, 3800, 8), 120, 40, 33)


@pytest.fixture(scope="module")
def postfix():
    torch.manual_seed(0)
    model = build_model(ModelConfig(memory="postfix", pos="rope", **TINY)).eval()
    with torch.no_grad():  # large enough that what slots say shows
        for parameter in (*model.backbone.parameters(), *model.slots.parameters()):
            parameter.mul_(4)
        model.readout_M.copy_(torch.tensor([2.0, 0.0, -60.0]))
    return model


def test_removals_match_the_readout_without_the_slot(golden, postfix):
    found = ablation.removals(postfix, golden)
    y = golden.targets()
    base = window_nll(postfix, golden)
    gone = torch.tensor([True, False, False])
    states = slot_states(postfix, golden, remove=gone)
    cost = (readout_nll(postfix, states, y, keep=~gone) - base).mean()
    assert found["removed"][0]["value"] == pytest.approx(float(cost), abs=1e-5)
    assert found["base"]["value"] == pytest.approx(float(base.mean()), abs=1e-5)
    # The slot with hardly any readout weight that nobody looks at (it is last) cannot matter.
    assert abs(found["removed"][2]["value"]) < 1e-4


def test_subsets_hold_the_whole_and_the_singles(golden, postfix):
    h = slot_states(postfix, golden)
    found = ablation.subsets(postfix, golden, h)
    assert len(found["nll"]) == 7
    assert found["nll"][-1] == pytest.approx(float(window_nll(postfix, golden).mean()), abs=1e-5)
    only = torch.tensor([False, True, False])
    assert found["nll"][1] == pytest.approx(
        float(readout_nll(postfix, h, golden.targets(), keep=only).mean()), abs=1e-5
    )
    assert [row["slots"] for row in found["by_size"]] == [1, 2, 3]
    even_W = torch.from_numpy(golden.spacing_W // 256 % 2 == 0)
    alone = {
        tuple(i for i in range(3) if code >> i & 1): readout_nll(
            postfix, h, golden.targets(), keep=torch.tensor([bool(code >> i & 1) for i in range(3)])
        )
        for code in range(1, 8)
    }
    assert found["nll"] == pytest.approx([float(nll_W.mean()) for nll_W in alone.values()], abs=1e-5)
    for row in found["by_size"]:  # chosen on the odd blocks, scored on the even ones
        rivals = [slots for slots in alone if len(slots) == row["slots"]]
        best, worst = (f(rivals, key=lambda slots: float(alone[slots][~even_W].mean())) for f in (min, max))
        assert tuple(row["best_slots"]) == best
        assert row["best"] == pytest.approx(float(alone[best][even_W].mean()), abs=1e-5)
        assert row["worst"] == pytest.approx(float(alone[worst][even_W].mean()), abs=1e-5)
        assert row["mean"] == pytest.approx(np.mean([float(alone[slots][even_W].mean()) for slots in rivals]), abs=1e-5)
    assert row["best"] == row["mean"] == row["worst"]  # there is one way to take all slots


def test_replacements_and_effects_match_the_readout_of_changed_states(golden, postfix):
    h, y = slot_states(postfix, golden), golden.targets()
    base = readout_nll(postfix, h, y)
    changed = h.clone()
    changed[:, 1] = h[:, 1].mean(0)
    found = ablation.replacements(postfix, golden, h)
    assert found["mean"][1]["value"] == pytest.approx(float((readout_nll(postfix, changed, y) - base).mean()), abs=1e-5)
    without = torch.tensor([True, False, True])
    with torch.inference_mode():
        shift = postfix.readout(h, keep=without).mean() - postfix.readout(h).mean()
    assert ablation.effect_sizes(postfix, h)["effect"][1] == pytest.approx(
        float(shift.square().mean().sqrt()), rel=1e-4
    )


@pytest.mark.parametrize("memory", ["none", "prefix", "postfix"])
def test_changes_at_once_are_predictions_one_by_one(golden, memory):
    torch.manual_seed(0)
    model = build_model(ModelConfig(memory=memory, **TINY)).eval()
    few = golden.few(10)
    changes = [{}, {}] if memory == "none" else [{}, {"id_perm": torch.tensor([1, 2, 0])}]
    together = under_changes(model, few, changes, title="test")
    for change, nll_W in zip(changes, together, strict=True):
        assert torch.allclose(nll_W, window_nll(model, few, **change), atol=1e-5)


@pytest.mark.parametrize("memory", ["prefix", "postfix"])
def test_gradients_of_groups_are_those_of_each_alone(golden, memory):
    torch.manual_seed(0)
    model = build_model(ModelConfig(memory=memory, **TINY)).eval()
    few = golden.few(11)
    together = geometry.content_gradients(model, few, 4)
    assert together.shape == (3, 3, 16)
    for row, starts in zip(together, few.starts_W.split(4), strict=True):
        window = few.data.window(starts, few.width)
        content = model.slot_embeddings()[0].detach().clone().requires_grad_(True)
        loss = -model.predict(window, "last", content=content).log_prob(window.s_BW[:, -1]).mean()
        (alone,) = torch.autograd.grad(loss, content)
        assert torch.allclose(row, alone, atol=1e-6 + 1e-4 * float(alone.abs().max()))


def test_replacing_a_state_that_never_varies_costs_nothing(golden, postfix):
    h = torch.randn(len(golden), 3, 16, generator=torch.Generator().manual_seed(0))
    h[:, 1] = 0.3
    found = ablation.replacements(postfix, golden, h)
    for name in ("mean", "resampled"):
        assert abs(found[name][1]["value"]) < 1e-6
        assert abs(found[name][0]["value"]) > 1e-4


def test_permuting_a_symmetric_model_costs_nothing_and_permuting_weights_does(golden, postfix):
    torch.manual_seed(1)
    options = {"slot_id_mode": "off", "slot_position": False, "readout_weight": "uniform", "causal_slots": False}
    symmetric = build_model(ModelConfig(memory="postfix", pos="rope", **TINY, **options)).eval()
    found = identity.permutation_test(symmetric, golden, count=2)
    assert all(abs(row["value"]) < 1e-6 for row in found.values())
    found = identity.permutation_test(postfix, golden, count=2)
    assert max(abs(row["largest"]) for row in found.values()) > 1e-3
    assert set(found) == set(identity.PARTS)


def test_ranks_and_cosines_of_known_matrices():
    assert geometry.effective_rank(torch.eye(5)) == pytest.approx(5)
    assert geometry.effective_rank(torch.ones(5, 7)) == pytest.approx(1, abs=1e-6)
    same = torch.ones(4, 3, 6)
    found = geometry.gradient_geometry(same)
    assert found["cosine_within_groups"]["value"] == pytest.approx(1)
    assert found["effective_rank_share"] == pytest.approx(1 / 3, abs=1e-6)


def test_attention_summary_of_a_known_profile():
    profile = torch.zeros(2, 1, 1, 2, 64)
    profile[..., 0, -1] = 1
    profile[..., 1, :] = 1 / 64
    (row,) = attention.summary(profile)
    assert row["mean distance"]["value"] == pytest.approx((1 + 32.5) / 2)
    assert row["spacings looked at"]["value"] == pytest.approx((1 + 64) / 2, rel=1e-4)
    assert row["weight on newest 8"]["value"] == pytest.approx((1 + 8 / 64) / 2)


def test_block_differences_find_a_shift_and_no_shift():
    rng = np.random.default_rng(0)
    index = np.arange(0, 256 * 80, 8)
    flat = rng.standard_normal(index.size)
    assert blocks.block_differences(flat, index)["p"] > 0.01
    assert blocks.block_differences(flat + 0.3 * (index > 256 * 60), index)["p"] < 0.002


def test_heights_and_linear_rollout(golden):
    gamma = torch.tensor([100.0, 1e6], dtype=torch.float64)
    u = lambda g: g / (2 * torch.pi) * torch.log(g / (2 * torch.pi * torch.e))  # noqa: E731
    for s in (0.05, 1.0, 3.3):
        after = rollout.next_height(gamma, torch.full((2,), s, dtype=torch.float64))
        assert (u(after) - u(gamma) - s).abs().max() < 1e-9
    fit = LinearFit(torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64), 0.0, 1.0, 1.0)
    last = torch.cat([b.s_BW[:, -2] for b in golden.windows()]).double()
    rolled = rollout.roll_linear(fit, golden, 3)
    assert torch.allclose(rolled, 1 + (last - 1)[:, None] * 0.5 ** torch.arange(1, 4))


def test_rollout_feeds_itself_what_predict_says(golden, postfix):
    few = golden.few(5)
    rolled = rollout.roll(postfix, few, 2, has_heights=True)
    first = torch.cat([postfix.predict(b, "last").mean() for b in few.windows()])
    assert torch.allclose(rolled[:, 0], first, atol=1e-5)
    assert torch.equal(rollout.true_future(few, 2)[:, 0], few.targets())


def test_errors_of_the_phase_add_up_and_are_paired_with_the_autoregression(golden):
    few = golden.few(8)
    truth = torch.rand(len(few), 20) + 0.5
    rows = rollout.phase_errors(few, truth, {"model": truth + 0.1, "AR": truth - 0.05, "constant": truth})
    assert [row["steps"] for row in rows] == [1, 2, 5, 10, 20]
    assert [rows[-1][name]["value"] for name in ("model", "AR", "constant")] == pytest.approx([2, 1, 0], abs=1e-4)
    assert rows[-1]["model minus AR, squared"]["value"] == pytest.approx(3, abs=1e-4)


def test_statistics_of_continuations_are_those_of_each_sequence():
    s_BS = np.random.default_rng(0).gamma(6, 1 / 6, (2, 60))
    found = rollout._statistics(s_BS)
    for b, s in enumerate(s_BS):
        u = np.cumsum(s)
        assert found["variance of spacings"][b] == pytest.approx(np.mean((s - 1) ** 2))
        assert found["lag-2 covariance"][b] == pytest.approx(np.mean((s[2:] - 1) * (s[:-2] - 1)))
        assert found["share below 0.3"][b] == pytest.approx(np.mean(s < 0.3))
        starts = np.arange(u[0], u[-1] - 5, 0.5)
        counts = np.array([np.sum((u >= a) & (u < a + 5)) for a in starts])
        assert found["number variance L=5"][b] == pytest.approx(np.mean((counts - 5) ** 2))
    assert "number variance L=20" in found
    assert "number variance L=20" not in rollout._statistics(s_BS[:, :30])
    crowded = rollout._statistics(np.full((1, 60), 0.01))  # all in one window
    assert crowded["number variance L=5"][0] == pytest.approx((60 - 5) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["postfix", "prefix"])
def test_a_run_is_diagnosed_and_reported(zeros_file, tmp_path, memory, capsys, monkeypatch):
    """On the first 20,000 zeros."""
    small = diagnostics.Size(64, 4, 10, 1, 4, 64)
    monkeypatch.setattr(diagnostics.Size, "for_device", lambda device, windows=None: small)
    run = tmp_path / memory
    run.mkdir()
    torch.manual_seed(0)
    options = {} if memory == "prefix" else {"pos": "rope"}
    config = replace(
        EXPLICIT_SMALL,
        model=ModelConfig(memory=memory, **TINY, **options),
        data=DataConfig(file=str(zeros_file), folder=str(tmp_path)),
    )
    (run / "config.json").write_text(to_json(config))
    save_weights(run / "weights.safetensors", build_model(config.model))
    result = diagnostics.main(run)
    assert json.loads((run / "diagnostics.json").read_text())["base"] == result["base"]
    assert "RMS error of u" in capsys.readouterr().out
    assert ("left_out" in result) == (memory == "prefix")
    assert not result.get("left_out", {}).keys() & result.keys()
    assert report.write(run).read_text().count("<svg") == (3 if memory == "postfix" else 2)
    original = diagnostics.main(run, legacy=True)["legacy"]
    over_seeds = aggregate.headlines({"legacy": original})
    assert over_seeds["largest_ablation"] == original["A ablation"]["largest"]
    assert over_seeds["gradient_rank_ratio"] == original["K gradient rank"]["ratio"]
    assert all(test["vacuous"] for test in original.values())
    assert ("D uniformity" in original) == (memory == "postfix")


def _write(run, seed=0, **model):
    run.mkdir()
    config = replace(EXPLICIT_SMALL, seed=seed, model=ModelConfig(**(TINY | model)))
    (run / "config.json").write_text(to_json(config))
    save_weights(run / "weights.safetensors", build_model(config.model))
    return run


def test_runs_that_have_no_mean_are_refused_before_any_is_diagnosed(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnostics, "diagnose", None)
    for name, seed, heads in (("a1", 1, 2), ("a2", 1, 2), ("b3", 3, 4)):
        _write(tmp_path / name, seed, memory="postfix", heads=heads)
    with pytest.raises(UserError, match=r"a2 is .*b3 is .*, heads=4.*one experiment"):
        diagnostics.main(tmp_path / "*")
    with pytest.raises(UserError, match=r"seeds \[1, 1\]: one occurs twice"):
        diagnostics.main(tmp_path / "a*")


def test_one_slot_and_one_window_are_refused(tmp_path):
    with pytest.raises(UserError, match="one memory slot"):
        diagnostics.diagnose(_write(tmp_path / "one", memory="postfix", n_memory=1), device="cpu")
    with pytest.raises(UserError, match="--windows 1"):
        diagnostics.diagnose(tmp_path / "one", device="cpu", windows=1)


def test_few_blocks_are_not_compared(zeros_file, tmp_path, monkeypatch, capsys):
    small = diagnostics.Size(3, 2, 4, 1, 2, 64)
    monkeypatch.setattr(diagnostics.Size, "for_device", lambda device, windows=None: small)
    run = _write(tmp_path / "none")
    result = diagnostics.main(run, data=zeros_file, device="cpu")
    assert "blocks" not in result
    assert "targets in 3 blocks of 256" in result["left_out"]["blocks"]
    assert "left out, blocks" in capsys.readouterr().out


def test_a_short_rollout_has_no_slope_and_zeros_have_no_rank(golden, postfix):
    assert geometry.effective_rank(torch.zeros(3, 4)) == 0
    found = legacy._error_growth(postfix, golden.few(4), 5, has_heights=True)
    assert (found["slope"], found["passes"]) == (None, None)
    assert list(found["mae"]) == ["1"]
    assert found["starts"] == 4


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run matches"):
        diagnostics.main(tmp_path / "nothing*")
