"""Linear stability: boundaries in closed form, the order of the methods, and where the prediction does not hold."""

from dataclasses import replace

import pytest
import torch

from experiments import theory as listed
from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import SpecError
from experiments.harness.work import stability
from experiments.harness.work.execute import execute
from experiments.harness.work.session import Session

DESCENT = listed.DESCENT


def simulated(spec, root):
    execute(spec, Session(root))
    return record_of(spec, root).summary()


@pytest.mark.parametrize("model", ["regression", "two-layer"])
@pytest.mark.parametrize(("m", "rho"), [(1, 0.0), (1, 0.1), (8, 0.1), (8, 0.3)])
def test_the_simulated_boundary_is_the_predicted_one(model, m, rho, tmp_path):
    summary = simulated(replace(DESCENT, model=model, micro_batches=m, rho=rho), tmp_path)
    assert abs(summary["relative_error"]) < 0.005


def test_predictions_in_closed_form():
    """Gradient descent: 2 / eta. SAM: the root of x + rho x^2 = 2 / eta, for any other eigenvalues of the Hessian."""
    eta, rho = DESCENT.learning_rate, 0.1
    minimum = stability.interpolating_minimum(DESCENT)
    assert stability.predicted_sharpness(DESCENT, minimum) == pytest.approx(2 / eta)
    sam = stability.predicted_sharpness(replace(DESCENT, rho=rho), minimum)
    assert sam == pytest.approx(((1 + 8 * rho / eta) ** 0.5 - 1) / (2 * rho), rel=1e-9)
    msam = [stability.predicted_sharpness(replace(DESCENT, rho=rho, micro_batches=m), minimum) for m in (2, 4, 8, 16)]
    assert [sam, *msam] == sorted([sam, *msam], reverse=True)
    assert msam[-1] < 0.8 * sam


@pytest.mark.parametrize("model", ["regression", "two-layer"])
def test_the_minimum_interpolates_and_its_hessians_are_those_of_the_losses(model):
    minimum = stability.interpolating_minimum(replace(DESCENT, model=model))
    w = minimum.weights
    loss = minimum.loss(w, minimum.x, minimum.y)
    assert loss.item() == 0
    H_i = minimum.hessians(8)
    torch.testing.assert_close(H_i.mean(0), minimum.hessians(1)[0])
    assert torch.linalg.eigvalsh(H_i).min() > -1e-12
    flat, shapes = stability._flat(w)
    d = 1e-4 * torch.randn(flat.shape, dtype=torch.float64)
    near = minimum.loss(stability._shaped(flat + d, shapes), minimum.x, minimum.y)
    assert near.item() == pytest.approx((d @ H_i.mean(0) @ d / 2).item(), rel=1e-2)
    if model == "regression":
        torch.testing.assert_close(H_i[0], minimum.x[:8].T @ minimum.x[:8] / 8)


def test_each_seed_is_a_different_problem():
    spec = replace(DESCENT, micro_batches=8, rho=0.1)
    first, second = (stability.interpolating_minimum(replace(spec, seed=seed)) for seed in (0, 1))
    assert stability.predicted_sharpness(spec, first) != stability.predicted_sharpness(spec, second)


def test_the_steps_are_the_methods(tmp_path):
    """Just inside and outside the boundary of m = 8; SAM and gradient descent have different boundaries."""
    spec = replace(DESCENT, micro_batches=8, rho=0.1)
    minimum = stability.interpolating_minimum(spec)
    sharpness = torch.linalg.eigvalsh(minimum.hessians(1)[0])[-1].item()
    boundary = stability.predicted_sharpness(spec, minimum) / sharpness
    scales = torch.tensor([0.5, 0.98, 1.02, 2.0], dtype=torch.float64) * boundary
    assert stability.decaying(spec, minimum, scales).tolist() == [True, True, False, False]
    assert stability.decaying(replace(spec, micro_batches=1), minimum, scales).tolist() == [True, True, True, False]
    assert stability.decaying(replace(spec, rho=0.0), minimum, scales).tolist() == [True, True, True, True]


@pytest.mark.parametrize("m", [1, 8])
def test_normalised_perturbations_are_bounded_up_to_two_over_eta(m):
    spec = replace(DESCENT, normalised=True, rho=0.3, micro_batches=m)
    minimum = stability.interpolating_minimum(spec)
    edge = 2 / spec.learning_rate / torch.linalg.eigvalsh(minimum.hessians(1)[0])[-1].item()
    assert stability.bounded(spec, minimum, 0.95 * edge)
    assert not stability.bounded(spec, minimum, 1.05 * edge)


def test_the_prediction_does_not_hold_for_small_batches(tmp_path):
    spec = replace(DESCENT, batch_size=8, epochs=64, micro_batches=8, rho=0.1)
    assert simulated(spec, tmp_path)["relative_error"] < -0.3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"momentum": 0.9}, "momentum is 0.9, but must be 0.0"),
        ({"batch_size": 48}, "must divide the 64 examples"),
        ({"base_optimizer": "adamw"}, "base_optimizer is 'adamw'"),
        ({"rho": 1e5}, "There is no boundary between"),
    ],
)
def test_specs_that_cannot_be_simulated_are_rejected(changes, words, tmp_path):
    with pytest.raises(SpecError, match=words):
        execute(replace(DESCENT, **changes), Session(tmp_path))
