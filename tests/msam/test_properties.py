"""What holds for every model, batch, m and rho."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import msam
from tests.msam.small import convnet, data, gradients, loss_of, mlp, reference


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x + y).mean(1))


def attention(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Attention().double()


MODELS = {"mlp": (mlp, (5,)), "convnet": (convnet, (3, 8, 8)), "attention": (attention, (6, 4))}

CASES = {
    "model": st.sampled_from(list(MODELS)),
    "examples": st.integers(2, 9),
    "m": st.integers(1, 10),
    "rho": st.floats(1e-5, 10.0),
    "seed": st.integers(0, 3),
    "adaptive": st.booleans(),
}


def case(model, examples, seed):
    make, shape = MODELS[model]
    return make(seed), data(examples, *shape, seed=seed)


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_the_reference_gradient_and_the_same_bits_afterwards(model, examples, m, rho, seed, adaptive):
    network, batch = case(model, examples, seed)
    before = [p.detach().clone() for p in network.parameters()]
    expected = reference(network, batch, m, rho, adaptive)
    msam.backward(loss_of(network), batch, network, rho=rho, micro_batches=m, adaptive=adaptive)
    torch.testing.assert_close(gradients(network), expected, rtol=1e-7, atol=1e-10)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


@settings(max_examples=30, deadline=None)
@given(**{k: CASES[k] for k in ("model", "examples", "m", "rho", "seed")})
def test_the_distance_travelled_is_rho(model, examples, m, rho, seed):
    network, batch = case(model, examples, seed)
    start = nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    distances = []

    def loss_fn(part):
        distances.append((nn.utils.parameters_to_vector(network.parameters()) - start).norm())
        return loss_of(network)(part)

    msam.backward(loss_fn, batch, network, rho=rho, micro_batches=m)
    travelled = torch.stack(distances[1::2])
    torch.testing.assert_close(travelled, torch.full_like(travelled, rho), rtol=1e-7, atol=0)
    assert not torch.stack(distances[0::2]).any()


@settings(max_examples=30, deadline=None)
@given(**{k: CASES[k] for k in ("model", "examples", "m", "seed")})
def test_rho_zero_is_autograds_gradient_over_the_micro_batches(model, examples, m, seed):
    network, batch = case(model, examples, seed)
    twin = copy.deepcopy(network)
    for part in msam.split(batch, m):
        (loss_of(twin)(part) * len(part[1]) / examples).backward()
    msam.backward(loss_of(network), batch, network, rho=0, micro_batches=m)
    torch.testing.assert_close(gradients(network), gradients(twin), rtol=1e-10, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(model=CASES["model"], seed=CASES["seed"], order=st.permutations(range(4)))
def test_the_order_within_a_micro_batch_is_nothing_and_the_split_is_something(model, seed, order):
    network, (x, y) = case(model, 8, seed)

    def gradient(indices: list[int]) -> torch.Tensor:
        network.zero_grad()
        msam.backward(loss_of(network), (x[indices], y[indices]), network, rho=0.5, micro_batches=2)
        return nn.utils.parameters_to_vector([p.grad for p in network.parameters()])

    usual = gradient(list(range(8)))
    torch.testing.assert_close(gradient([*order, *(4 + i for i in order)]), usual, rtol=1e-8, atol=1e-11)
    if model != "convnet":  # whose ReLU and pooling may leave little to tell
        assert (gradient([0, 4, 1, 5, 2, 6, 3, 7]) - usual).norm() > 1e-5 * usual.norm()


@settings(max_examples=20, deadline=None)
@given(seed=CASES["seed"], examples=st.integers(1, 12), m=st.integers(1, 12), rho=CASES["rho"])
def test_the_record_adds_up(seed, examples, m, rho):
    network, batch = mlp(seed), data(examples, 5, seed=seed)
    step = msam.backward(loss_of(network), batch, network, rho=rho, micro_batches=m)
    assert step.gradient_norms.shape == (min(m, examples),)
    torch.testing.assert_close(step.loss, F.cross_entropy(network(batch[0]), batch[1]).detach())
    torch.testing.assert_close(step.sharpness, step.perturbed_loss - step.loss)
