"""`msam.diagnose`: the distance is measured, and nothing is left behind."""

import copy

import pytest
import torch
from torch import nn

import msam
from tests.msam.small import convnet, data, loss_of, mlp


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_every_perturbed_pass_is_at_distance_rho(shared, adaptive):
    model = mlp()
    found = msam.diagnose(
        loss_of(model), data(12, 5), model, rho=0.3, micro_batches=4, shared=shared, adaptive=adaptive
    )
    torch.testing.assert_close(found.distances, torch.full((4,), 0.3, dtype=torch.float64))
    assert found.on
    assert found.step.sharpness > 0
    assert str(found).startswith("On: the weights moved by 0.3 to 0.3 in 4 perturbed passes")


def test_only_what_is_perturbed_counts():
    model = mlp()
    options = {"rho": 0.3, "micro_batches": 2, "perturb": lambda name: name == "0.weight"}
    found = msam.diagnose(loss_of(model), data(8, 5), model, **options)
    torch.testing.assert_close(found.distances, torch.full((2,), 0.3, dtype=torch.float64))


def test_nothing_is_left_behind():
    model, batch = convnet(), data(12, 3, 8, 8)
    model[0].bias.grad = kept = torch.ones(4, dtype=torch.float64)
    before, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    msam.diagnose(loss_of(nn.Sequential(nn.Dropout(0.5), model)), batch, model, rho=0.3, micro_batches=3)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws)
    assert model[0].bias.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert model[0].weight.grad is None


def test_rho_zero_is_said():
    model = mlp()
    found = msam.diagnose(loss_of(model), data(8, 5), model, rho=0.0, micro_batches=2)
    assert not found.on
    assert found.distances.shape == (0,)
    assert "plain training" in str(found)


def test_a_gradient_of_zero_is_said():
    model = mlp()
    found = msam.diagnose(lambda part: 0 * loss_of(model)(part), data(8, 5), model, rho=0.3, micro_batches=2)
    assert not found.on
    assert found.distances.tolist() == [0, 0]
    assert "The gradient of a micro-batch is 0" in str(found)


@pytest.mark.filterwarnings("ignore:Weights of torch.bfloat16")
def test_weights_that_round_it_away_are_said():
    model, (x, y) = mlp().bfloat16(), data(8, 5)
    found = msam.diagnose(loss_of(model), (x.bfloat16(), y), model, rho=1e-3, micro_batches=2)
    assert not found.on
    assert "keep them in float32" in str(found)


@pytest.mark.parametrize("options", [{"vectorized": True}, {"passes": "streams"}])
def test_ways_that_do_not_move_the_weights_are_refused(options):
    model = mlp()
    with pytest.raises(ValueError, match="leave passes and vectorized out"):
        msam.diagnose(loss_of(model), data(8, 5), model, rho=0.3, **options)
