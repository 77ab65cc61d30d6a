"""The fastest way of running micro-batches is found by a measurement that leaves nothing behind."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import msam
from msam import ways
from tests.msam.small import convnet, data, gradients, loss_of, mlp


def random_states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def test_the_first_step_is_the_one_that_the_chosen_way_takes():
    model, batch = convnet(), data(8, 3, 8, 8)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    twin = copy.deepcopy(model)
    twin[5].weight.grad = torch.ones_like(twin[5].weight)
    held = model[5].weight.grad
    results = []
    for net, passes in ((model, "auto"), (twin, None)):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        passes = passes or results[0][0].passes
        step = msam.backward(loss_of(net), batch, net, rho=0.3, micro_batches=4, passes=passes)
        results.append((step, random_states()))
    assert model[5].weight.grad is held
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert torch.equal(results[0][1][0], results[1][1][0])
    assert results[0][1][1:] == results[1][1][1:]
    (found,) = ways.measured(model)
    assert found.fastest == results[0][0].passes
    assert found.fastest in found.seconds
    assert found.refused["streams"] == "a cpu has no streams"


def timed(monkeypatch, seconds):
    """The measurement finds these times."""
    monkeypatch.setattr(ways, "_seconds", lambda step, way, params: seconds[way])


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"loop": 1.0, "vectorized": 0.5}, "vectorized"),
        ({"loop": 1.0, "vectorized": 0.99}, "loop"),
        ({"loop": 1.0, "vectorized": 2.0}, "loop"),
    ],
)
def test_another_way_must_be_worth_it(monkeypatch, seconds, chosen):
    timed(monkeypatch, seconds)
    model = mlp()
    assert msam.backward(loss_of(model), data(8, 5), model, rho=0.3, micro_batches=4, passes="auto").passes == chosen


def test_what_is_refused_is_not_taken_and_says_why():
    model, batch = nn.Sequential(nn.LSTM(5, 3, batch_first=True)).double(), data(8, 2, 5)

    def loss_fn(part):
        return model(part[0])[0].square().mean()

    step = msam.backward(loss_fn, batch, model, rho=0.3, micro_batches=4, passes="auto")
    assert step.passes == "loop"
    (found,) = ways.measured(model)
    assert "lstm" in found.refused["vectorized"].lower()


def test_it_is_measured_once_for_each_m(monkeypatch):
    timed(monkeypatch, {"loop": 1.0, "vectorized": 0.5})
    model = mlp()
    for m in (2, 4, 2, 4):
        msam.backward(loss_of(model), data(8, 5), model, rho=0.3, micro_batches=m, passes="auto")
    assert len(ways.measured(model)) == 2


def test_nothing_is_measured_where_there_is_no_choice(monkeypatch):
    timed(monkeypatch, {})
    model = mlp()
    for options in ({"rho": 0.0, "micro_batches": 4}, {"rho": 0.3, "micro_batches": 1}):
        assert msam.backward(loss_of(model), data(8, 5), model, passes="auto", **options).passes == "loop"


def test_an_error_in_a_measured_step_leaves_everything_as_it_was():
    model, batch = convnet(), data(8, 3, 8, 8)
    before, calls = copy.deepcopy(model.state_dict()), iter(range(100))

    def loss_fn(part):
        if next(calls) == 11:
            raise RuntimeError("out of luck")
        return loss_of(model)(part)

    with pytest.raises(RuntimeError, match="out of luck"):
        msam.backward(loss_fn, batch, model, rho=0.3, micro_batches=4, passes="auto")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert not ways.measured(model)
