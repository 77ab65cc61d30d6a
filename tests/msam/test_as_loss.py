"""`msam.loss`: the gradient that `.backward()` delivers is the reference's, times whatever comes in."""

import copy
import inspect
from typing import get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msam
from msam.as_loss import Options
from tests.msam.small import convnet, data, gradients, loss_of, mlp, reference

IGNORED = -100
SHAPES = {mlp: (5,), convnet: (3, 8, 8)}


def close(model, expected, factor=1.0):
    expected = {name: factor * g for name, g in expected.items()}
    torch.testing.assert_close(gradients(model), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"vectorized": True}, {"passes": "streams"}], ids=str)
@pytest.mark.parametrize("examples", [12, 11])
@pytest.mark.parametrize("make", [mlp, convnet])
def test_delivers_the_references_gradient_times_what_comes_in(make, examples, options):
    model, batch = make(), data(examples, *SHAPES[make])
    expected = reference(model, batch, 4, 0.3, options.get("adaptive", False))
    loss = msam.loss(loss_of(model), batch, model, rho=0.3, micro_batches=4, **options)
    assert all(p.grad is None for p in model.parameters())
    (3 * loss).backward()
    close(model, expected, 3)


@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("shared", [False, True])
def test_leaves_exactly_what_backward_leaves(rho, shared):
    """Gradients, statistics and the record, to the bit; loss is what is logged."""
    ours, theirs, batch = convnet(), convnet(), data(11, 3, 8, 8)
    options = {"rho": rho, "micro_batches": 3, "shared": shared}
    loss = msam.loss(loss_of(ours), batch, ours, **options)
    loss.backward()
    step = msam.backward(loss_of(theirs), batch, theirs, **options)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for b, c in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(b, c)
    assert torch.equal(loss, step.loss)
    assert torch.equal(loss.step.perturbed_loss, step.perturbed_loss)
    assert type(loss / 2) is type(loss.detach()) is torch.Tensor


def test_accumulation_clipping_and_an_optimizer():
    """Four batches, each divided by four, on top of what `.grad` holds; then a clipped step."""
    model = mlp()
    batches = [data(6, 5, seed=seed) for seed in range(4)]
    expected = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        for name, g in reference(model, batch, 2, 0.3).items():
            expected[name] += g / 4
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for batch in batches:
        (msam.loss(loss_of(model), batch, model, rho=0.3, micro_batches=2) / 4).backward()
    close(model, expected)
    before = [p.detach().clone() for p in model.parameters()]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for p, w, g in zip(model.parameters(), before, expected.values(), strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * 0.5 / (norm + 1e-6) * g)


def test_counts_weigh_micro_batches():
    """Valid labels, of which one micro-batch has none."""
    models, (x, y) = (mlp(), mlp()), data(12, 5)
    y[[0, 6, 7, 8]] = IGNORED

    def counted(model):
        return lambda part: (F.cross_entropy(model(part[0]), part[1], ignore_index=IGNORED), (part[1] != IGNORED).sum())

    msam.loss(counted(models[0]), (x, y), models[0], rho=0.3, micro_batches=4).backward()
    msam.backward(counted(models[1]), (x, y), models[1], rho=0.3, micro_batches=4)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_dropout_masks_are_those_of_backward():
    models = mlp(dropout=0.5), mlp(dropout=0.5)
    for model, method in zip(models, ("loss", "backward"), strict=True):
        torch.manual_seed(7)
        returned = getattr(msam, method)(loss_of(model), data(8, 5), model, rho=0.3, micro_batches=2)
        if method == "loss":
            returned.backward()
        model.drawn = torch.rand(3)
    close(models[0], gradients(models[1]))
    assert torch.equal(models[0].drawn, models[1].drawn)


def test_a_sum_of_losses_of_several_calls():
    model, twin = mlp(), mlp()
    first, second = (msam.loss(loss_of(model), data(6, 5, seed=i), model, rho=0.3, micro_batches=2) for i in (1, 2))
    penalty = sum(p.square().sum() for p in model.parameters())
    (first + 2 * second + 0.1 * penalty).backward()
    expected = [reference(twin, data(6, 5, seed=i), 2, 0.3) for i in (1, 2)]
    for name, p in twin.named_parameters():
        torch.testing.assert_close(
            gradients(model)[name], expected[0][name] + 2 * expected[1][name] + 0.2 * p.detach(), rtol=1e-11, atol=1e-13
        )


def test_torch_autograd_grad_gets_it_too():
    model, batch = mlp(), data(8, 5)
    loss = msam.loss(loss_of(model), batch, model, rho=0.3, micro_batches=2)
    found = dict(zip(gradients(model), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    torch.testing.assert_close(found, reference(model, batch, 2, 0.3), rtol=1e-11, atol=1e-14)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("counted", [False, True])
def test_parameters_outside_the_model_get_theirs_once_and_scaled(counted):
    model, head = mlp(), nn.Linear(3, 3).double()
    twin, its_head = copy.deepcopy(model), copy.deepcopy(head)

    def loss_of_both(network, last):
        def loss_fn(part):
            loss = F.cross_entropy(last(network(part[0])), part[1])
            return (loss, len(part[1])) if counted else loss

        return loss_fn

    head.bias.grad = torch.ones(3, dtype=torch.float64)
    loss = msam.loss(loss_of_both(model, head), data(7, 5), model, rho=0.3, micro_batches=2)
    assert torch.equal(head.bias.grad, torch.ones(3, dtype=torch.float64))
    assert head.weight.grad is None
    (loss / 2).backward()
    msam.backward(loss_of_both(twin, its_head), data(7, 5), twin, rho=0.3, micro_batches=2)
    torch.testing.assert_close(head.weight.grad, its_head.weight.grad / 2)
    torch.testing.assert_close(head.bias.grad, 1 + its_head.bias.grad / 2)
    close(model, gradients(twin), 0.5)


def test_parameters_that_are_unused_or_frozen_get_none():
    model = nn.ModuleDict({"used": mlp(), "spare": nn.Linear(2, 2)})
    model["used"][0].bias.requires_grad_(False)
    msam.loss(loss_of(model["used"]), data(8, 5), model, rho=0.3, micro_batches=2).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["used.0.bias", "spare.weight", "spare.bias"]


def test_sparse_gradients_stay_sparse():
    torch.manual_seed(0)
    model = nn.EmbeddingBag(20, 3, sparse=True)
    twin = copy.deepcopy(model)
    ids, y = torch.randint(0, 20, (8, 4)), torch.randint(0, 3, (8,))
    (3 * msam.loss(loss_of(model), (ids, y), model, rho=0.3, micro_batches=2)).backward()
    msam.backward(loss_of(twin), (ids, y), twin, rho=0.3, micro_batches=2)
    assert model.weight.grad.is_sparse
    torch.testing.assert_close(model.weight.grad.to_dense(), 3 * twin.weight.grad.to_dense())


# A GradScaler, autocast


def test_a_stock_gradscaler_trains_to_the_same_weights():
    """scale, backward, unscale, clip, step, update; the scale is a power of two, by which nothing is rounded."""
    models, (x, y) = (mlp().float(), mlp().float()), data(8, 5)
    for model, scaler in zip(models, (None, torch.amp.GradScaler("cpu", init_scale=2.0**16)), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            loss = msam.loss(loss_of(model), (x.float(), y), model, rho=0.3, micro_batches=3, scaler=scaler)
            if scaler:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
            else:
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer) if scaler else optimizer.step()
            if scaler:
                scaler.update()
    torch.testing.assert_close(dict(models[0].named_parameters()), dict(models[1].named_parameters()))


def test_the_scalers_factor_reaches_the_passes():
    """Gradients that underflow in fp16 without it; an ambient autocast without it is refused."""
    model, (x, y) = mlp().float(), data(8, 5)
    batch = x.float(), y
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    small = lambda part: loss_of(model)(part) * 1e-7  # noqa: E731
    with torch.autocast("cpu", torch.float16):
        loss = msam.loss(small, batch, model, rho=0.3, micro_batches=2, scaler=scaler)
        with pytest.raises(ValueError, match="scaler=scaler"):
            msam.loss(small, batch, model, rho=0.3)
    scaler.scale(loss).backward()
    expected = reference(mlp(), (x, y), 2, 0.3)
    for name, g in gradients(model).items():
        torch.testing.assert_close(g.double() / 2.0**20 * 1e7, expected[name], rtol=0.05, atol=0.01)


def test_an_overflow_is_skipped_by_the_scaler():
    model, (x, y) = mlp().float(), data(8, 5)
    before, calls = copy.deepcopy(model.state_dict()), iter(range(9))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    huge = lambda part: loss_of(model)(part) * (1e36 if next(calls) == 0 else 1)  # noqa: E731
    scaler.scale(msam.loss(huge, (x.float(), y), model, rho=0.1, micro_batches=2, scaler=scaler)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert scaler.get_scale() == 2.0**15


# What it leaves alone, and what it refuses


def test_hooks_see_the_delivered_gradient_alone():
    model, batch, seen = mlp(), data(8, 5), []
    model[0].weight.register_hook(lambda g: seen.append("tensor") or 2 * g)
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    loss = msam.loss(loss_of(model), batch, model, rho=0.3, micro_batches=2)
    assert seen == []
    loss.backward()
    assert seen == ["tensor", "accumulated"]
    expected = reference(model, batch, 2, 0.3)
    close(model, expected | {"0.weight": 2 * expected["0.weight"]})


def test_without_gradients_it_is_one_plain_pass():
    model, batch, calls = convnet(), data(11, 3, 8, 8), []

    def loss_fn(part):
        calls.append(len(part[1]))
        return msam.Output(loss_of(model)(part), aux=len(part[1]))

    model.eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = msam.loss(loss_fn, batch, model, rho=0.3, micro_batches=4)
            assert torch.equal(loss, loss_of(model)(batch))
        assert not loss.requires_grad
        assert loss.step.aux == (11,)
        assert loss.step.sharpness == 0
    assert calls == [11, 11]
    with torch.no_grad():
        parts = msam.split(batch, 4)
        ready = msam.loss(loss_fn, None, model, rho=0.3, micro_batches=parts)
        torch.testing.assert_close(ready.detach(), loss_of(model)(batch))
    msam.loss(loss_fn, batch, model, rho=0.3, micro_batches=4).backward()
    close(model, reference(model, batch, 4, 0.3))


def test_a_second_backward_is_refused_and_adds_nothing():
    model = mlp()
    loss = msam.loss(loss_of(model), data(8, 5), model, rho=0.3)
    loss.backward(retain_graph=True)
    kept = {name: g.clone() for name, g in gradients(model).items()}
    with pytest.raises(RuntimeError, match=r"second time.*call msam\.loss again"):
        loss.backward()
    close(model, kept)


def test_weights_that_have_moved_are_noticed():
    model = mlp()
    loss = msam.loss(loss_of(model), data(8, 5), model, rho=0.3)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights have changed"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rho": -1.0}, "rho is -1.0"),
        ({}, "rho is None"),
        ({"rho": 0.1, "shared": "ranks"}, r"msam\.backward"),
        ({"rho": 0.1, "micro_batches": 0}, "micro_batches is 0"),
    ],
)
def test_refusals_leave_everything(options, words):
    model = mlp()
    model[0].bias.grad = kept = torch.ones(7, dtype=torch.float64)
    with pytest.raises(ValueError, match=words):
        msam.loss(loss_of(model), data(8, 5), model, **options)
    assert model[0].bias.grad is kept


def test_a_failing_loss_fn_leaves_grads_and_hooks():
    model, seen = mlp(), []
    model[0].bias.grad = kept = torch.ones(7, dtype=torch.float64)
    model[0].bias.register_hook(seen.append)
    with pytest.raises(ZeroDivisionError):
        msam.loss(lambda part: 1 / 0, data(8, 5), model, rho=0.3)
    assert model[0].bias.grad is kept
    loss_of(model)(data(8, 5)).backward()
    assert len(seen) == 1


def test_options_are_those_of_backward():
    """But for `shared`, which has one value less."""
    parameters = inspect.signature(msam.backward).parameters
    keywords = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    ours, theirs = get_type_hints(Options), get_type_hints(msam.backward)
    assert {name: ours[name] for name in keywords - {"shared"}} == {
        name: theirs[name] for name in keywords - {"shared"}
    }
    assert set(ours) == keywords


def test_takes_one_gradient_more():
    """Between the call and `.backward()` there is one gradient; `.backward()` itself makes no other."""
    model, batch = mlp(), data(8, 5)
    loss = msam.loss(loss_of(model), batch, model, rho=0.3)
    (ready,) = (node for node in [loss.grad_fn.next_functions[0][0]] if hasattr(node, "ready"))
    held = {g.data_ptr() for g in ready.ready._gradient}
    loss.backward()
    assert {p.grad.data_ptr() for p in model.parameters()} <= held
    assert ready.ready._gradient is None
