"""Both passes see the same random numbers, and on the CPU dropout's are drawn once."""

import copy
import random
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import msam
from tests.msam.small import data, loss_of


class Noisy(nn.Module):
    """Dropout as a layer, within attention, in place, and other random numbers between them."""

    def __init__(self, mask=None, checkpointed=False):
        super().__init__()
        self.into, self.out, self.drop = nn.Linear(5, 8), nn.Linear(8, 3), nn.Dropout(0.3)
        self.mask, self.checkpointed = mask, checkpointed

    def middle(self, x):
        x = self.drop(x)
        x = x * torch.bernoulli(torch.full_like(x, 0.8))
        q = x.view(len(x), 2, 4)[:, None]
        x = F.scaled_dot_product_attention(q, q.flip(-2), q, self.mask, dropout_p=0.25).reshape(x.shape)
        return F.dropout(x + torch.rand(8), 0.2, inplace=True)

    def forward(self, x):
        x = torch.tanh(self.into(x))
        x = checkpoint(self.middle, x, use_reentrant=False) if self.checkpointed else self.middle(x)
        return self.out(self.drop(x))


def by_hand(loss_fn, params, batch, m, rho):
    """The loop with a generator that is put back, and nothing of the library but the split."""
    for part in msam.split(batch, m):
        state = torch.get_rng_state()
        g = torch.autograd.grad(loss_fn(part), params)
        scale = rho / torch.linalg.vector_norm(torch.stack(torch._foreach_norm(g)))
        w = [p.detach().clone() for p in params]
        torch.set_rng_state(state)
        with torch.no_grad():
            for p, e in zip(params, g, strict=True):
                p.addcmul_(e, scale)
        (loss_fn(part) * (len(part[1]) / len(batch[1]))).backward()
        with torch.no_grad():
            for p, value in zip(params, w, strict=True):
                p.copy_(value)


def check_bits(model):
    """The library's gradient and generator are, to the bit, those of the loop by hand."""
    twin = copy.deepcopy(model)
    x, y = data(12, 5)
    batch = x.float(), y
    torch.manual_seed(1)
    by_hand(loss_of(twin), list(twin.parameters()), batch, 3, 0.3)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=3)
    assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


MASKS = {
    "no mask": None,
    "bool": torch.tensor([[True, False], [True, True]]),
    "float": torch.tensor([[0.0, -1.0], [0.5, 0.0]]),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_to_the_bit_what_a_loop_that_draws_again_gives(mask, checkpointed):
    torch.manual_seed(0)
    check_bits(Noisy(MASKS[mask], checkpointed))


class Draws(TorchDispatchMode):
    """Counts how often dropout's numbers are drawn."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ == "bernoulli_"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("vectorized", [False, True])
def test_masks_are_drawn_in_the_first_pass_alone(vectorized):
    torch.manual_seed(0)
    x, y = data(12, 5)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 3), nn.Dropout(0.1))
    call = partial(
        msam.backward,
        loss_of(model),
        (x.float(), y),
        model,
        rho=0.3,
        micro_batches=3,
        vectorized=vectorized,
    )
    for same_noise, passes in ((True, 1), (False, 2)):
        with Draws() as draws:
            call(same_noise=same_noise)
        assert draws.count == passes * 2 * (1 if vectorized else 3)


class Calls:
    """Counts up. A number would be state, which starts the second pass as it started the first."""

    def __init__(self):
        self.count = 0

    def __next__(self):
        self.count += 1
        return self.count - 1


class Changes(nn.Module):
    """Draws more, or for another shape, or with another probability, in every second pass."""

    def __init__(self, change):
        super().__init__()
        self.into, self.out, self.drop, self.change = nn.Linear(5, 8), nn.Linear(8, 3), nn.Dropout(0.3), change
        self.calls = Calls()

    def forward(self, x):
        call = next(self.calls)
        x = torch.tanh(self.into(x))
        return self.out(self.change(self, x) if call % 2 else self.drop(x))


CHANGES = {
    "more": lambda net, x: net.drop(x + torch.rand(8)),
    "another seed": lambda net, x: net.drop(x) if torch.manual_seed(5) else x,
    "another p": lambda net, x: F.dropout(x, 0.1),
    "another shape": lambda net, x: net.drop(net.drop(x[:, :4]).repeat(1, 2)),
    "less": lambda net, x: x,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_second_pass_that_draws_otherwise_gets_what_it_would_have_drawn(change):
    torch.manual_seed(0)
    check_bits(Changes(CHANGES[change]))


@pytest.mark.parametrize("options", [{"scale": -0.3}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
def test_attention_that_only_torch_can_do_is_left_to_it(options):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.drop, self.out = nn.Linear(5, 16), nn.Dropout(0.1), nn.Linear(16, 3)

        def forward(self, x):
            q = self.drop(self.into(x)).view(-1, 2, 2, 4)
            return self.out(F.scaled_dot_product_attention(q, q, q, dropout_p=0.2, **options).flatten(1))

    torch.manual_seed(0)
    check_bits(Attends())


GENERATORS = {
    "numpy": (lambda: None, lambda _: numpy.random.beta(0.4, 0.4)),
    "python": (lambda: None, lambda _: random.random()),
    "a numpy generator": (lambda: numpy.random.default_rng(0), lambda own: own.beta(0.4, 0.4)),
    "an old numpy generator": (lambda: numpy.random.RandomState(0), lambda own: own.beta(0.4, 0.4)),
    "a python generator": (lambda: random.Random(0), lambda own: own.random()),
    "a torch generator": (lambda: torch.Generator().manual_seed(0), lambda own: torch.rand((), generator=own).item()),
}


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"vectorized": True}], ids=str)
@pytest.mark.parametrize("name", GENERATORS)
def test_both_passes_draw_the_same_of_every_generator_that_is_global_or_named(name, options):
    make, draw = GENERATORS[name]
    own, reference = make(), make()
    model, (x, y) = nn.Linear(5, 3).double(), data(8, 5)
    drawn = []

    def loss_fn(part):
        drawn.append(draw(own))
        return F.cross_entropy(model(part[0] * drawn[-1]), part[1])

    numpy.random.seed(1)
    random.seed(1)
    named = [] if own is None else [own]
    msam.backward(loss_fn, (x, y), model, rho=0.1, micro_batches=2, generators=named, **options)
    numpy.random.seed(1)
    random.seed(1)
    alone = [draw(reference) for _ in range(3)]
    expected = {"{}": [0, 0, 1, 1], "{'shared': True}": [0, 1, 0, 1], "{'vectorized': True}": [0, 0]}[str(options)]
    assert drawn == [alone[i] for i in expected]
    after = {"numpy": lambda: numpy.random.beta(0.4, 0.4), "python": random.random}.get(name, lambda: draw(own))
    if name not in ("numpy", "python"):
        assert after() == alone[max(expected) + 1]
    drawn.clear()
    msam.backward(loss_fn, (x, y), model, rho=0.1, micro_batches=2, same_noise=False, **options)
    assert len(set(drawn)) == len(drawn)


def test_what_is_no_generator_is_refused():
    model = nn.Linear(5, 3).double()
    with pytest.raises(ValueError, match="generators holds a str"):
        msam.backward(loss_of(model), data(4, 5), model, rho=0.1, generators=["seed"])
