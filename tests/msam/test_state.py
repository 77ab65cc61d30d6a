"""State that a forward pass reads and moves: both passes start from it alike, and the clean passes alone move it."""

import copy
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize, MovingAveragePerChannelMinMaxObserver
from torch.nn.utils import parametrizations

import msam
from msam import state
from msam.state import State
from tests.msam.small import data, loss_of


class Stateful(nn.Module):
    """A layer, and something between it and the next that reads and moves state."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.build()

    def build(self):
        pass

    def between(self, h):
        return h

    def forward(self, x):
        return self.out(torch.tanh(self.between(self.into(x))))


class Queue(Stateful):
    """Momentum contrast's queue, with its position in a buffer."""

    def build(self):
        self.register_buffer("queue", torch.randn(16, 4))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def between(self, h):
        out = h + (h @ self.queue.clone().T).softmax(1) @ self.queue.clone()
        with torch.no_grad():
            i = int(self.at)
            self.queue[i : i + len(h)] = h
            self.at[0] = (i + len(h)) % 16
        return out


class QueueWithAnInteger(Queue):
    """Its position is a plain number."""

    def build(self):
        self.register_buffer("queue", torch.randn(16, 4))
        self.at = 0

    def between(self, h):
        out = h + (h @ self.queue.clone().T).softmax(1) @ self.queue.clone()
        self.queue[self.at : self.at + len(h)] = h.detach()
        self.at = (self.at + len(h)) % 16
        return out


class Bank(Stateful):
    """A memory that is a plain container of tensors."""

    def build(self):
        self.memory = deque([torch.ones(4)], maxlen=3)

    def between(self, h):
        out = h * sum(self.memory)
        self.memory.append(h.detach().mean(0))
        return out


class Recurrent(Stateful):
    """Its state is a plain attribute, there from the first pass on."""

    def build(self):
        self.h = None

    def between(self, h):
        h = h if self.h is None else h + self.h
        self.h = h.detach().mean(0)
        return h


class Codebook(Stateful):
    """A table whose rows follow what is assigned to them, in eval mode too."""

    def build(self):
        self.register_buffer("codes", torch.randn(6, 4))

    def between(self, h):
        near = torch.cdist(h.detach(), self.codes).argmin(1)
        out = h + 0.1 * self.codes[near]
        self.codes.data[near] = 0.9 * self.codes[near] + 0.1 * h.detach()
        return out


class ReplacedCodebook(Stateful):
    """Each pass makes another parameter of it."""

    def build(self):
        self.table = nn.Embedding(6, 4)

    def between(self, h):
        w = self.table.weight.detach()
        near = torch.cdist(h.detach(), w).argmin(1)
        self.table.weight = nn.Parameter(0.9 * w + 0.1 * h.detach().mean(0))
        return h + w[near]


class Follower(Stateful):
    """A frozen encoder that follows the trained one, by one of the ways that are in use."""

    way = "mul_"

    def build(self):
        self.key = copy.deepcopy(self.into).requires_grad_(False)
        self.large = nn.Parameter(torch.randn(state.LARGE), requires_grad=False)

    def between(self, h):
        with torch.no_grad():
            for k, p in zip(self.key.parameters(), self.into.parameters(), strict=True):
                if self.way == "mul_":
                    k.mul_(0.9).add_(0.1 * p)
                elif self.way == ".data in place":
                    k.data.mul_(0.9).add_(0.1 * p.data)
                else:
                    k.data = 0.9 * k.data + 0.1 * p.data
            self.large.data[:4] += h.mean(0)
        return h + self.key.weight.sum(1) + self.large[:4]


class FollowerByData(Follower):
    way = ".data in place"


class FollowerReplaced(Follower):
    way = ".data"


class Spectral(Stateful):
    def build(self):
        parametrizations.spectral_norm(self.into)


class OldSpectral(Stateful):
    def build(self):
        nn.utils.spectral_norm(self.into)


class Quantised(Stateful):
    """Observers resize their empty buffers in the first pass."""

    def build(self):
        self.fake = FakeQuantize(
            observer=MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=1,
        )

    def double(self):
        super().double()
        self.fake.float()  # which is all that torch has it for
        return self

    def between(self, h):
        return h + self.fake(h.float())


class FusedQuantised(Quantised):
    def build(self):
        self.fake = FusedMovingAvgObsFakeQuantize(quant_min=0, quant_max=255)


class Grows(Stateful):
    """A table that grows with its input; its length is a plain number."""

    def build(self):
        self.grow(2)

    def grow(self, n):
        self.n = n
        self.register_buffer("cos", torch.cos(torch.arange(n, dtype=torch.float64)), persistent=False)

    def between(self, h):
        if h.shape[1] > self.n:
            self.grow(h.shape[1])
        return h * self.cos[: h.shape[1]]


class Vanishes(Stateful):
    def build(self):
        self.register_buffer("first", torch.ones(1))

    def between(self, h):
        if hasattr(self, "first"):
            del self.first
            return 2 * h
        return h


KINDS = [
    Queue,
    QueueWithAnInteger,
    Bank,
    Recurrent,
    Codebook,
    ReplacedCodebook,
    Follower,
    FollowerByData,
    FollowerReplaced,
    Spectral,
    OldSpectral,
    Quantised,
    FusedQuantised,
    Grows,
    Vanishes,
]


def made(kind, mode="train"):
    torch.manual_seed(0)
    return getattr(kind().double(), mode)()


def contents(model):
    """All that a model holds, as numbers that can be compared."""
    plain = {
        (name, key): list(value) if isinstance(value, deque) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor | int | deque | type(None)) and not key.startswith("_")
        if not getattr(value, "requires_grad", False)  # a weight that each forward pass computes
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return copy.deepcopy([{name: t.detach() for name, t in tensors}, plain])


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14, allow_subclasses=True)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_tends_to_the_plain_one_as_rho_does_to_zero(kind, m, mode):
    gradients = []
    for rho in (1e-9, 0.0):
        model, batch = made(kind, mode), data(8, 5)
        trained = dict(model.named_parameters())
        for _ in range(2):  # in the first step some have no state yet
            msam.backward(loss_of(model), batch, model, rho=rho, micro_batches=m)
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[1].norm()


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_as_the_clean_passes_leave_it(kind, m):
    model, twin, batch = made(kind), made(kind), data(8, 5)
    for _ in range(2):
        msam.backward(loss_of(model), batch, model, rho=3.0, micro_batches=m)
        for part in msam.split(batch, m):
            loss_of(twin)(part)
    same(contents(model), contents(twin))


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
@pytest.mark.parametrize("raised", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_step_leaves_no_trace(kind, fails_at, raised):
    model, batch, calls = made(kind), data(8, 5), iter(range(9))
    before, objects = contents(model), [*model.parameters(), *model.buffers()]

    def loss_fn(part):
        loss = loss_of(model)(part)
        if next(calls) == fails_at:
            raise raised
        return loss

    with pytest.raises(raised):
        msam.backward(loss_fn, batch, model, rho=3.0, micro_batches=2)
    same(contents(model), before)
    assert all(a is b for a, b in zip([*model.parameters(), *model.buffers()], objects, strict=True))
    model(batch[0])


@pytest.mark.parametrize("kind", KINDS)
def test_in_one_pass_it_is_refused_by_name_or_right(kind):
    model, twin, batch = made(kind), made(kind), data(8, 5)
    before = contents(model)
    try:
        msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=4, vectorized=True)
    except NotImplementedError:
        same(contents(model), before)
        return
    msam.backward(loss_of(twin), batch, twin, rho=0.3, micro_batches=4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    same(contents(model), contents(twin))


def test_modules_outside_the_model_are_named():
    torch.manual_seed(0)
    critic = parametrizations.spectral_norm(nn.Linear(3, 1).double())
    gradients = []
    for rho in (1e-9, 0.0):
        model, judge, batch = made(Stateful), copy.deepcopy(critic), data(8, 5)

        def loss_fn(part, model=model, judge=judge):
            return judge(model(part[0])).square().mean()

        msam.backward(loss_fn, batch, model, rho=rho, micro_batches=4, state=judge)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-6 * gradients[1].norm()


def test_a_graph_through_a_frozen_network_that_stands_still_survives_the_step():
    model, batch = made(Stateful), data(8, 5)
    frozen = nn.Linear(3, 3).double().requires_grad_(False)
    model.add_module("frozen", frozen)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    kept = frozen(x).square().sum()
    msam.backward(lambda part: F.cross_entropy(frozen(model(part[0])), part[1]), batch, model, rho=0.1, micro_batches=2)
    kept.backward()
    assert x.grad.any()


def test_what_stands_still_is_not_copied():
    """A large frozen parameter shares its memory with every snapshot, and keeps its address."""
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(300, 300)).double()
    model[1].requires_grad_(False)
    (w, b), batch = model[1].parameters(), data(8, 5)
    address = torch._C._data_address
    before, version = address(w), b._version
    kept = State([model], model[0].parameters(), lazily=True)
    snapshots = [kept.taken("a"), kept.taken("b")]
    copies = {id(t): v for snapshot in snapshots for t, v in zip(snapshot.tensors, snapshot.values, strict=True)}
    assert address(copies[id(w)]) == before
    del snapshots, copies, kept
    msam.backward(lambda part: F.cross_entropy(model[0](part[0]), part[1]), batch, model, rho=0.1, micro_batches=4)
    assert address(w) == before
    assert b._version == version


def test_copies_of_many_buffers_are_a_few_calls_of_torch():
    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(60)])
    kept = State([model], model.parameters(), lazily=True)
    with torch.profiler.profile() as profile:
        kept.put_back(kept.taken("a"))
    copies = [event.count for event in profile.key_averages() if event.key == "aten::_foreach_copy_"]
    assert copies == [4], "two types, there and back"


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_scripted_and_traced_models():
    for wrap in (
        torch.jit.script,
        lambda module: torch.jit.trace(module, torch.randn(2, 5)),
        lambda module: nn.Sequential(torch.jit.script(module[0]), *list(module)[1:]),
    ):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        model = wrap(copy.deepcopy(plain))
        model.load_state_dict(plain.state_dict())  # tracing has run it
        x, y = data(8, 5)
        for net in (plain, model):
            msam.backward(loss_of(net), (x.float(), y), net, rho=0.3, micro_batches=2)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        for b, c in zip(model.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(b, c)
        with pytest.raises(NotImplementedError, match=r"torch\.jit"):
            msam.backward(loss_of(model), (x.float(), y), model, rho=0.3, micro_batches=2, vectorized=True)
