"""Compiled models and recorded steps."""

import pytest
import torch
from gauge_attn.compiled import compiled_model
from gauge_attn.config import OptimConfig
from gauge_attn.models import build_optimizer
from lab_shared.dist import init
from lab_shared.graphs import StepGraph
from lab_shared.optim import clip_grads
from lab_shared.testing import assert_parity
from torch.nn import functional as F

MODELS = ("faithful", "practical", "gpt")
VARIANTS = (*MODELS, "faithful-vfe", "practical-seeing-itself", "practical-scalars", "practical-no-scalar-heads")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_one_graph_without_breaks(name, make, tokens):
    model = make(name, layers=1)
    model(tokens())  # tables are made outside the graph
    forward = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert_parity(forward(tokens()).logits_BNV, model(tokens()).logits_BNV, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it, and hides the warning otherwise
def test_the_blocks_share_one_compiled_code_and_only_training_uses_it(monkeypatch, make, tokens):
    from torch._dynamo.testing import CompileCounter

    monkeypatch.setattr("gauge_attn.tables.could_be_tf32", lambda x: x.dtype == torch.float32)  # as on CUDA
    model = make("practical", layers=3)
    plain = model(tokens()).logits_BNV
    gradient = torch.autograd.grad(plain.square().sum(), model.phi_V3)[0]
    counter = CompileCounter()
    model.compile_regions(lambda part: torch.compile(part, backend=counter, fullgraph=True, dynamic=False))
    fast = model(tokens()).logits_BNV
    assert_parity(fast, plain, atol=1e-6)
    assert_parity(torch.autograd.grad(fast.square().sum(), model.phi_V3)[0], gradient, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model(tokens(2, 5))
        model(tokens(1, 4), cache=model.new_cache())
    model(tokens(2), record=[])
    assert counter.frame_count == 3  # embedding, block, readout
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*MODELS, "faithful-vfe"])
def test_compiled_model_on_cuda(name, make, tokens):
    """Logits and every gradient, of random sums so that none of them is zero by symmetry."""
    with init("cuda") as dist:
        model = make(name).to(dist.device)
        x = tokens().to(dist.device)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        torch.manual_seed(0)
        weights = torch.randn_like(model(x).logits_BNV)

        def logits_and_gradients(run):
            logits = run(x).logits_BNV
            return logits, torch.autograd.grad((logits * weights).sum(), list(parameters.values()))

        plain, exact = logits_and_gradients(model)  # first, as compiling may change the model itself
        fast, found = logits_and_gradients(compiled_model(model, x))
        assert_parity(fast, plain, atol=1e-4)
        for parameter, ours, theirs in zip(parameters, found, exact, strict=True):
            assert_parity(ours, theirs, atol=1e-4 * (1 + theirs.abs().max().item()), name=parameter)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["faithful", "practical", "gpt"])
def test_a_recorded_step_gives_the_losses_of_plain_ones(name, make, tokens):
    """Several optimiser steps: parameters change under the graph, and nothing of a step is left over."""

    def losses(recorded):
        with init("cuda") as dist:
            model = make(name).to(dist.device)
            x = torch.cat([tokens(2), tokens(2)[:, :1]], 1).to(dist.device)
            forward = compiled_model(model, x[:, :-1]) if recorded else model

            def loss_of(y):
                return F.cross_entropy(forward(y[:, :-1]).logits_BNV.flatten(0, 1), y[:, 1:].flatten())

            optimizer = build_optimizer(model, OptimConfig())
            if recorded:
                step = StepGraph(loss_of, model, optimizer, clip=1.0)
                return [step(x.roll(i, 0))[0].item() for i in range(6)]
            found = []
            for i in range(6):
                loss = loss_of(x.roll(i, 0))
                loss.backward()
                clip_grads(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                found.append(loss.item())
            return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)
