"""One perturbation for all micro-batches: SAM by accumulation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import msam
from msam.reference import msam_gradient
from tests.msam.small import convnet, data, gradients, loss_of, mlp, pure_loss
from tests.msam.test_composition import Box

IGNORED = -100


def shared(model, batch, m, loss_fn=None, **options):
    return msam.backward(loss_fn or loss_of(model), batch, model, micro_batches=m, shared=True, **options)


@settings(max_examples=40, deadline=None)
@given(
    examples=st.integers(1, 12),
    m=st.integers(1, 12),
    rho=st.floats(1e-4, 3.0),
    seed=st.integers(0, 5),
    adaptive=st.booleans(),
)
def test_it_is_sam_over_the_mini_batch(examples, m, rho, seed, adaptive):
    model, twin, batch = mlp(seed), mlp(seed), data(examples, 5, seed=seed)
    step = shared(model, batch, m, rho=rho, adaptive=adaptive)
    expected = msam.backward(loss_of(twin), batch, twin, rho=rho, adaptive=adaptive)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)
    for name in ("loss", "perturbed_loss", "gradient_norms"):
        torch.testing.assert_close(getattr(step, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), mlp(seed).parameters(), strict=True))


@pytest.mark.parametrize("adaptive", [False, True])
def test_with_batchnorm_it_equals_the_reference_over_the_same_micro_batches(adaptive):
    model, batch = convnet(), data(11, 3, 8, 8)
    parts = msam.split(batch, 4)
    w = {name: p.detach() for name, p in model.named_parameters()}
    expected = msam_gradient(pure_loss(model), w, parts, [3, 3, 3, 2], 0.3, adaptive, groups=[range(4)])
    twin = copy.deepcopy(model)
    shared(model, batch, 4, rho=0.3, adaptive=adaptive)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-11, atol=1e-13)
    for part in parts:
        twin(part[0])
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0)


def test_it_is_not_msam():
    model, twin, batch = mlp(), mlp(), data(8, 5)
    shared(model, batch, 4, rho=0.5)
    msam.backward(loss_of(twin), batch, twin, rho=0.5, micro_batches=4)
    assert (model[0].weight.grad - twin[0].weight.grad).norm() > 1e-3 * twin[0].weight.grad.norm()


def test_all_clean_passes_come_first_and_every_perturbed_one_is_at_the_same_place():
    model, batch, seen = mlp(), data(8, 5), []

    def loss_fn(part):
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        return loss_of(model)(part)

    shared(model, batch, 4, loss_fn, rho=0.5)
    assert len(seen) == 8
    assert all(torch.equal(w, seen[0]) for w in seen[:4])
    assert all(torch.equal(w, seen[4]) for w in seen[4:])
    assert (seen[4] - seen[0]).norm().item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("hidden", [[0], [4, 5, 6], [0, 1, 2, 3], []])
def test_it_weighs_by_what_is_counted(hidden):
    model, twin, (x, y) = mlp(), mlp(), data(10, 5)
    y[hidden] = IGNORED

    def counted(net):
        return lambda part: (
            F.cross_entropy(net(part[0]), part[1], ignore_index=IGNORED),
            (part[1] != IGNORED).sum(),
        )

    shared(model, (x, y), 3, counted(model), rho=0.3)
    msam.backward(counted(twin), (x, y), twin, rho=0.3)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-10, atol=1e-13)


def test_dropout_masks_are_each_micro_batchs_own_in_both_passes():
    model, (x, y) = mlp(dropout=0.5), data(8, 5)
    masks = []
    model[2].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    torch.manual_seed(3)
    shared(model, (x, y), 2, rho=1e-9)
    after = torch.get_rng_state()
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])
    torch.manual_seed(3)
    for part in x.tensor_split(2):
        model(part)
    assert torch.equal(torch.get_rng_state(), after)


def test_rho_zero_is_the_plain_gradient_and_gradients_accumulate():
    model, twin, batch = mlp(), mlp(), data(8, 5)
    shared(model, batch, 4, rho=0.0)
    msam.backward(loss_of(twin), batch, twin, rho=0.0, micro_batches=4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    model.zero_grad()
    shared(model, batch, 4, rho=0.3)
    once = {name: g.clone() for name, g in gradients(model).items()}
    shared(model, batch, 4, rho=0.3)
    torch.testing.assert_close(gradients(model), {name: 2 * g for name, g in once.items()})


def test_large_tables_are_moved_by_their_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9000, 8), nn.Flatten(), nn.Linear(16, 3)).double()
    twin, batch = copy.deepcopy(model), (torch.randint(0, 9000, (8, 2)), torch.arange(8) % 3)
    shared(model, batch, 4, rho=0.3)
    msam.backward(loss_of(twin), batch, twin, rho=0.3)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-10, atol=1e-13)


def test_activations_of_one_pass_are_alive_at_a_time():
    model, batch, alive = mlp(), data(12, 5), []

    def loss_fn(part):
        alive.append(Box.alive)
        return loss_of(model)(part)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: Box(t.detach()), lambda box: box.tensor):
        shared(model, batch, 3, loss_fn, rho=0.3)
    assert alive == [0] * 6


@pytest.mark.parametrize("fails_at", range(8))
def test_a_failure_leaves_no_trace(fails_at):
    model, batch, calls = convnet(), data(8, 3, 8, 8), iter(range(9))
    before = copy.deepcopy(model.state_dict())

    def loss_fn(part):
        loss = loss_of(model)(part)
        if next(calls) == fails_at:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        shared(model, batch, 4, loss_fn, rho=3.0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_refuses_what_does_not_go_together():
    model, batch = mlp(), data(8, 5)
    with pytest.raises(ValueError, match="choose one"):
        shared(model, batch, 4, rho=0.1, vectorized=True)
    with pytest.raises(ValueError, match="shared is 'all'"):
        msam.backward(loss_of(model), batch, model, rho=0.1, shared="all")
