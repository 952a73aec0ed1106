"""The terms of the training loss: likelihood, orthogonal slots, rollouts; and which model may have which."""

import math
from dataclasses import replace

import pytest
import torch
from lab_shared.dist import Dist
from lab_shared.errors import UserError
from lab_shared.testing import assert_parity
from rh_memory.config import LossConfig, ModelConfig, TrainConfig
from rh_memory.data.windows import WindowBatch
from rh_memory.losses import drift_loss, likelihood, orthogonality, rollout
from rh_memory.mdn import Mixture
from rh_memory.models import build_model
from rh_memory.objective import Objective, check_losses

TINY = ModelConfig(context=32, d_model=32, layers=2, heads=2, dropout=0.0, n_memory=8, pos="rope", sigma_floor=1e-3)
MODELS = {
    "explicit": replace(TINY, inputs="height", values="prime_rotary", head_init="spread"),
    "frozen": replace(TINY, inputs="height", values="prime_rotary", height="frozen"),
    "prefix": replace(TINY, memory="prefix"),
    "free slots": replace(TINY, memory="prefix", causal_slots=False),
}
DRIFT = LossConfig(drift_weight=1.0, drift_every=2, drift_context=10, drift_horizon=4, drift_batch=3)


def test_likelihood_is_the_mean_nll_less_the_weighted_entropy():
    torch.manual_seed(0)
    parts = torch.randn(5, 8), torch.rand(5, 8) + 0.5, torch.rand(5, 8) + 0.1
    density, target = Mixture(*parts), torch.rand(5) + 0.5
    nll, entropy = -density.log_prob(target).mean(), density.entropy_of_weights().mean()
    for weight in (0.0, 0.1):
        loss, alone = likelihood(parts, "gaussian", target, weight)
        assert_parity(loss, nll - weight * entropy, atol=1e-6)
        assert_parity(alone, nll, atol=1e-6)


def test_orthogonality_is_zero_for_an_orthogonal_set_only():
    assert float(orthogonality(3 * torch.eye(4, 8))) == pytest.approx(0, abs=1e-10)
    assert float(orthogonality(torch.ones(3, 8))) == pytest.approx(6, rel=1e-5)


def step_by_step(model, batch, context, horizon):
    """The rollout loss by one pass with gradient for every step, over windows that end where the step stands."""
    s, gamma = batch.s_BW[:, :context], batch.gamma_BW[:, :context]
    predicted = []
    for _ in range(horizon):
        padded = torch.cat([s, torch.zeros(len(s), 1)], 1)  # predict leaves out the last spacing
        window = WindowBatch(padded, torch.full_like(padded, 11.5), torch.cat([gamma, gamma[:, -1:]], 1))
        mean = model.predict(window, "last").mean()
        predicted.append(mean)
        s = torch.cat([s, mean.detach()[:, None]], 1)
        gamma = torch.cat([gamma, gamma[:, -1:] + mean.detach()[:, None] * (2 * math.pi / 11.5)], 1)
    error = (torch.stack(predicted, 1) - batch.s_BW[:, context : context + horizon]).cumsum(1).abs()
    return (error * torch.arange(1, horizon + 1) / horizon).mean()


@pytest.mark.parametrize("name", MODELS)
def test_drift_loss_in_one_pass_has_the_value_and_gradient_of_one_pass_a_step(name, toy_dataset):
    torch.manual_seed(0)
    model = build_model(MODELS[name])
    batch = toy_dataset.data.window(toy_dataset.starts("train", 3), 33)
    mask = model.training_mask(13, torch.device("cpu"))
    rolled = rollout(model, batch, mask, "gaussian", context=10, horizon=4)
    fast = drift_loss(model, rolled, batch.s_BW[:, 10:14], mask, "gaussian")
    slow = step_by_step(model, batch, context=10, horizon=4)
    assert_parity(fast, slow, atol=1e-5)
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad(x, parameters.values(), allow_unused=True) for x in (fast, slow)]
    for which, ours, expected in zip(parameters, *gradients, strict=True):
        assert (ours is None) == (expected is None), which
        if ours is not None:
            assert_parity(ours, expected, atol=1e-5, rtol=1e-4, name=which)


@pytest.mark.parametrize("use_amp", [False, True])
def test_the_rollout_leaves_every_weight_its_gradient(use_amp, toy_dataset):
    """Within one autocast, weights cast without gradient for the rollout would serve the pass that needs one."""
    config = TrainConfig(model=MODELS["prefix"], loss=DRIFT, use_amp=use_amp)
    model = build_model(config.model)
    batch = toy_dataset.data.window(toy_dataset.starts("train", 5), 33)
    objective = Objective(config, model, toy_dataset, Dist())
    loss, parts = objective(batch, step=2)
    drift = (loss - parts["nll"]).detach()
    assert float(drift) > 0.01
    objective._drift(batch).backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.backbone.parameters())
    unused, _ = objective(batch, step=3)
    assert float((unused - objective(batch, step=3)[1]["nll"]).detach()) == pytest.approx(0, abs=1e-6)


def test_identities_are_dealt_anew_in_every_step_behind_the_warm_up(toy_dataset):
    model = replace(TINY, memory="postfix", slot_id_mode="permute_per_batch")
    config = TrainConfig(model=model, perm_warmup_steps=3)
    objective = Objective(config, build_model(model), toy_dataset, Dist())
    own = tuple(range(8))
    dealt = [tuple(objective._permutation(step).tolist()) for step in range(1, 12)]
    assert dealt[:3] == 3 * [own]
    assert len(set(dealt[3:])) > 5
    assert all(tuple(sorted(perm)) == own for perm in dealt)
    fixed = replace(config, model=replace(model, slot_id_mode="fixed"))
    assert Objective(fixed, build_model(fixed.model), toy_dataset, Dist())._permutation(9) is None


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        ({"memory": "postfix"}, {"drift_weight": 0.1}, "memory = none or prefix"),
        ({}, {"drift_weight": 0.1, "drift_horizon": 30}, "= 40 exceeds model.context = 32"),
        ({"use_aux_loss": True}, {}, "model.memory = none"),
        ({"memory": "postfix", "content_mode": "zeroed"}, {"ortho_weight": (1e-3, 1e-2)}, "content_mode = zeroed"),
        ({"memory": "postfix", "use_aux_loss": True, "n_memory": 3}, {"aux_mode": "diagonal"}, "n_memory = 3"),
    ],
)
def test_losses_the_model_cannot_have_are_refused(model, loss, message):
    config = TrainConfig(model=replace(TINY, **model), loss=replace(LossConfig(), **loss))
    with pytest.raises(UserError, match=message):
        check_losses(config)
