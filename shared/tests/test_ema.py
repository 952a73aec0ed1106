"""The moving average of weights: its recursion, what a checkpoint keeps of it, what it refuses."""

import pytest
import torch
from lab_shared.ema import Ema
from lab_shared.errors import UserError
from lab_shared.testing import assert_parity


def test_ema_is_the_recursion_and_survives_a_checkpoint():
    model = torch.nn.Linear(3, 2)
    ema, shadow = Ema(model, 0.9), {k: v.detach().clone() for k, v in model.named_parameters()}
    for n in range(25):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update()
        d = min(0.9, (1 + n) / (10 + n))
        shadow = {k: d * shadow[k] + (1 - d) * p.detach() for k, p in model.named_parameters()}
    own = model.weight.detach().clone()
    with ema.applied():
        assert_parity(model.weight.detach(), shadow["weight"], atol=1e-5)
    assert torch.equal(model.weight, own)
    other = torch.nn.Linear(3, 2)
    again = Ema(other, 0.9)
    again.load_state_dict(ema.state_dict())
    assert again.steps == 25
    again.copy_to_model()
    assert_parity(other.bias.detach(), shadow["bias"], atol=1e-5)
    with pytest.raises(ValueError, match="'bias' is in one only"):
        Ema(torch.nn.Linear(3, 2, bias=False), 0.9).load_state_dict(ema.state_dict())
    with pytest.raises(UserError, match=r"optim.ema is 1.0"):
        Ema(model, 1.0)
