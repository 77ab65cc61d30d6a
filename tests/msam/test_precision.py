"""Autocast, GradScaler, weights of half precision, and numbers that are not finite."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msam
from tests.msam.small import data, gradients, loss_of, mlp, reference


def single(**options) -> nn.Module:
    return mlp(**options).float()


def batch32(examples: int = 8):
    x, y = data(examples, 5)
    return x.float(), y


def autocast_loss(model, dtype, inside=True):
    def loss_fn(part):
        with torch.autocast("cpu", dtype, enabled=inside):
            return F.cross_entropy(model(part[0]).float(), part[1])

    return loss_fn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_the_reference(dtype):
    model, batch = single(), batch32()
    expected = reference(mlp(), (batch[0].double(), batch[1]), 2, 0.3)
    msam.backward(autocast_loss(model, dtype), batch, model, rho=0.3, micro_batches=2)
    for name, g in gradients(model).items():
        assert g.dtype == torch.float32
        error = (g.double() - expected[name]).norm() / expected[name].norm()
        assert error < 0.03, name


def test_a_surrounding_autocast_does_not_hide_the_perturbation_behind_its_cache():
    """Autocast keeps its casts of the weights: the second pass must not be given those of the first."""
    inside, outside, batch = single(), single(), batch32()
    msam.backward(autocast_loss(inside, torch.bfloat16), batch, inside, rho=0.3, micro_batches=2)
    with torch.autocast("cpu", torch.bfloat16):
        step = msam.backward(
            lambda part: F.cross_entropy(outside(part[0]).float(), part[1]), batch, outside, rho=0.3, micro_batches=2
        )
    assert step.sharpness > 0.01
    torch.testing.assert_close(gradients(outside), gradients(inside), rtol=0, atol=0)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_a_stock_gradscaler_trains_to_the_same_weights(rho, counted):
    """scale, unscale, clip, step, update as they are; 2**16 is a power of two, so nothing is rounded by it."""
    models, batch = (single(), single()), batch32()
    steps = []
    for model, scaler in zip(models, (None, torch.amp.GradScaler("cpu", init_scale=2.0**16)), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        mean = loss_of(model)
        loss_fn = (lambda part, mean=mean: (mean(part), len(part[1]))) if counted else mean
        for _ in range(5):
            optimizer.zero_grad()
            step = msam.backward(loss_fn, batch, model, rho=rho, micro_batches=3, scaler=scaler)
            if scaler:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        steps.append(step)
    torch.testing.assert_close(dict(models[0].named_parameters()), dict(models[1].named_parameters()))
    torch.testing.assert_close(steps[0].loss, steps[1].loss)
    torch.testing.assert_close(steps[0].perturbed_loss, steps[1].perturbed_loss)
    if rho:
        torch.testing.assert_close(steps[0].gradient_norms, steps[1].gradient_norms)


def test_the_scaler_reaches_the_ascent_pass():
    """Gradients that underflow in fp16 without it: the perturbation would be nothing."""
    batch = batch32()
    tiny = lambda model: lambda part: autocast_loss(model, torch.float16)(part) * 1e-7  # noqa: E731
    plain, saved = single(), single()
    lost = msam.backward(tiny(plain), batch, plain, rho=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    kept = msam.backward(tiny(saved), batch, saved, rho=0.3, scaler=scaler)
    exact = mlp()
    expected = msam.backward(loss_of(exact), (batch[0].double(), batch[1]), exact, rho=0.3).gradient_norms * 1e-7
    torch.testing.assert_close(kept.gradient_norms.double(), expected, rtol=0.01, atol=0)
    assert not torch.allclose(lost.gradient_norms.double(), expected, rtol=0.01, atol=0)


def test_an_overflow_in_the_ascent_pass_is_skipped_by_the_scaler():
    model, batch = single(), batch32()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    calls = iter(range(9))

    def loss_fn(part):
        loss = loss_of(model)(part)
        return loss * 1e36 if next(calls) == 0 else loss  # times 2**16: infinite, in the first pass only

    msam.backward(loss_fn, batch, model, rho=0.1, micro_batches=2, scaler=scaler)
    assert not all(torch.isfinite(p.grad).all() for p in model.parameters())
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert scaler.get_scale() == 2.0**15


def test_the_norm_of_fp16_gradients_is_taken_in_float32():
    """Finite fp16 gradients whose squares overflow in fp16: a norm of 4e4 * sqrt(16) is no infinity here."""
    w = nn.ParameterList([torch.zeros(16, dtype=torch.float16)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = msam.backward(lambda x: ((w[0].float() * 4e4) * x).sum(), torch.ones(1, 1), w, rho=1.0)
    assert step.gradient_norms.dtype == torch.float32
    torch.testing.assert_close(step.gradient_norms, torch.tensor([1.6e5]), rtol=1e-3, atol=0)
    torch.testing.assert_close(step.sharpness, torch.tensor(1.6e5), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_warned_about_once_with_what_is_left(dtype):
    torch.manual_seed(0)
    model = nn.Linear(200, 200, bias=False).to(dtype)
    x = torch.randn(4, 200).to(dtype)
    before, distances = model.weight.detach().double(), []

    def loss_fn(part):
        distances.append((model.weight.double() - before).norm().item())
        return model(part).float().square().mean()

    with pytest.warns(UserWarning, match="under torch.autocast") as warned:
        msam.backward(loss_fn, x, model, rho=0.05)
    assert f"{distances[1] / 0.05:.0%} of rho" in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        msam.backward(loss_fn, x, model, rho=0.05)


def test_a_gradient_that_is_not_finite_shows_in_grad_and_not_in_the_weights():
    model, (x, y) = mlp(), data(8, 5)
    before = copy.deepcopy(model.state_dict())
    x[5] = float("inf")
    msam.backward(loss_of(model), (x, y), model, rho=0.1, micro_batches=4)
    assert not all(torch.isfinite(p.grad).all() for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_norm_that_overflows_does_not_turn_quietly_into_the_plain_gradient():
    w = nn.Linear(1, 1, bias=False)
    msam.backward(lambda x: (w(x) * 1e30).mean(), torch.full((2, 1), 1e-3), w, rho=0.1)
    assert torch.isfinite(w.weight.grad).all()
    big = nn.ParameterList([torch.full((2,), 1.0)])
    msam.backward(lambda x: (big[0] * 3e38).sum() * x.mean(), torch.ones(2, 1), big, rho=0.1)
    assert not torch.isfinite(big[0].grad).any()
