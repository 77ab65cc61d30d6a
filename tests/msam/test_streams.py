"""Micro-batches at copies of the weights give what the loop gives; on a GPU they run on streams."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msam
from msam import streams
from msam.mean import Total
from msam.perturbation import Weights
from tests.msam.small import convnet, data, gradients, loss_of, mlp, reference


class Tied(nn.Module):
    """An embedding that is the output layer too, dropout, attention, and a layer called twice."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.out.weight = self.table.weight
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)

    def forward(self, ids):
        return self.out(self.layer(self.layer(self.table(ids)))).mean(1)


class Odd(nn.Module):
    """BatchNorm called twice, InstanceNorm's statistics, a layer that is not used, a frozen one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.unused = nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.out = nn.Linear(4, 3)
        self.out.bias.requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.second(self.norm(self.first(x)).relu())).relu()
        return self.out(self.instance(x).mean((2, 3)))


def tied():
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (10, 5), generator=torch.Generator().manual_seed(1))
    return Tied().double(), (ids, torch.arange(10) % 9)


def odd():
    torch.manual_seed(0)
    return Odd().double(), data(10, 3, 6, 6)


CASES = {
    "linear": lambda: (mlp(dropout=0.4), data(10, 5)),
    "convolutions": lambda: (convnet(), data(10, 3, 8, 8)),
    "tied": tied,
    "odd": odd,
}


def both(model, batch, loss_of=loss_of, **options):
    """Two models of the same weights after two steps, one in a loop and one on streams, and what the calls returned."""
    models, steps = (model, copy.deepcopy(model)), []
    for net, way in zip(models, ("loop", "streams"), strict=True):
        for seed in range(2):
            torch.manual_seed(seed)
            steps.append(msam.backward(loss_of(net), batch, net, passes=way, **options))
        steps.append(torch.get_rng_state())
    return models, steps


def assert_same(models, steps):
    loop, streamed = models
    torch.testing.assert_close(gradients(streamed), gradients(loop), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dict(streamed.named_buffers()), dict(loop.named_buffers()), rtol=1e-9, atol=1e-12)
    for p, q in zip(loop.parameters(), streamed.parameters(), strict=True):
        assert torch.equal(p, q)
    for a, b in zip(steps[:2], steps[3:5], strict=True):
        for name in ("loss", "perturbed_loss", "gradient_norms"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-12)
    assert torch.equal(steps[2], steps[5])


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("m", [2, 3, 10])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(case, m, adaptive):
    model, batch = CASES[case]()
    if m == 10 and case in ("convolutions", "odd"):
        m = 5  # BatchNorm asks for two examples
    assert_same(*both(model, batch, rho=0.3, micro_batches=m, adaptive=adaptive))


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_micro_batches_take_turns_on_few_streams(monkeypatch, at_once):
    """As on a GPU, with streams that are none."""
    model, batch = convnet(), data(12, 3, 8, 8)
    params = list(model.parameters())
    made = streams.Streams(model, params, Weights(params, rho=0.2, adaptive=False), 6)
    made._streams, made._sums = [None] * at_once, [Total(len(params)) for _ in range(at_once)]
    monkeypatch.setattr("msam.gradient.Streams", lambda *_: made)
    msam.backward(loss_of(model), batch, model, rho=0.2, micro_batches=6, passes="streams")
    torch.testing.assert_close(gradients(model), reference(convnet(), batch, 6, 0.2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("counts", ["numbers", "tensors", "one is nothing"])
def test_weights_that_loss_fn_returns(counts):
    model, batch = mlp(), data(9, 5)

    def weighted(net):
        def loss_fn(part):
            x, y = part
            y = torch.where(x[:, 0] > 0, y, -100)
            if counts == "one is nothing" and torch.equal(x[0], batch[0][0]):
                y = torch.full_like(y, -100)
            count = (y != -100).sum()
            return F.cross_entropy(net(x), y), count if counts == "tensors" else int(count)

        return loss_fn

    assert_same(*both(model, batch, weighted, rho=0.3, micro_batches=3))


def test_parameters_that_are_not_perturbed_get_their_gradient():
    model, batch = mlp(), data(8, 5)
    assert_same(*both(model, batch, rho=0.3, micro_batches=4, perturb=lambda name: name.endswith("weight")))


def test_ready_micro_batches():
    model, batch = mlp(), data(8, 5)
    parts = [tuple(t[:3] for t in batch), tuple(t[3:] for t in batch)]
    assert_same(*both(model, None, rho=0.3, micro_batches=parts))


@pytest.mark.parametrize("options", [{"micro_batches": 1}, {"micro_batches": 4, "rho": 0.0}])
def test_nothing_to_gain_is_the_loop(options):
    model, batch = mlp(), data(8, 5)
    models, _ = both(model, batch, **{"rho": 0.3} | options)
    torch.testing.assert_close(gradients(models[1]), gradients(models[0]), rtol=0, atol=0)


def test_a_norm_that_overflows_leaves_a_gradient_that_is_not_finite():
    model, (x, y) = nn.Linear(5, 3).double(), data(8, 5)
    batch = (1e200 * x, y)
    before = copy.deepcopy(model.state_dict())
    msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=2, passes="streams")
    assert not all(g.isfinite().all() for g in gradients(model).values())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Counter(nn.Module):
    """A layer that moves a buffer."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how, self.seen = nn.Linear(5, 3), how, 0
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        y = self.layer(x)
        if self.how == "buffer":
            self.total += y.detach().sum(0).float()
        elif self.how == "data":
            self.total.data = self.total + 1
        else:
            self.seen += 1
        return y


class Kept(nn.Module):
    """A layer whose weights are held by something else than itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.held = [self.layer.weight]

    def forward(self, x):
        return F.linear(x, self.held[0], self.layer.bias)


def refused(kind):
    """A model, a loss function of it, and what the refusal says."""
    extra = torch.ones(3, dtype=torch.float64, requires_grad=True)
    models = {
        "buffer": (Counter("buffer"), "moves total"),
        "data": (Counter("data"), "moves total"),
        "attribute": (Counter("attribute"), "moves seen"),
        "kept": (Kept(), "keeps its weights elsewhere"),
        "lstm": (nn.LSTM(5, 3), "LSTM, which keeps its weights elsewhere"),
        "outside": (mlp(), "depends on tensors outside the model"),
        "hook": (mlp(), "has a hook"),
        "momentum": (nn.Sequential(nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 3)), "momentum=None"),
        "half": (nn.Sequential(nn.Linear(5, 3)), "a Parameter of torch.bfloat16"),
        "jit": (nn.Sequential(nn.Linear(5, 3)), "torch.jit"),
        "compile": (nn.Sequential(nn.Linear(5, 3)), "torch.compile"),
    }
    model, message = models[kind]
    model = model.double()
    if kind == "hook":
        model[0].weight.register_hook(lambda g: g)
    if kind == "half":
        model[0].bfloat16()
    if kind == "jit":
        model = torch.jit.script(model)
    if kind == "compile":
        model = torch.compile(model, backend="eager")

    def loss_fn(part):
        x = part[0].bfloat16() if kind == "half" else part[0]
        y = model(x[None])[0][0] if kind == "lstm" else model(x)
        return F.cross_entropy(y + extra if kind == "outside" else y, part[1])

    return model, loss_fn, message


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    "kind",
    ["buffer", "data", "attribute", "kept", "lstm", "outside", "hook", "momentum", "half", "jit", "compile"],
)
def test_what_it_cannot_do_is_refused_and_nothing_has_changed(kind):
    model, loss_fn, message = refused(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match=message + r'.*: use passes="loop"'):
        msam.backward(loss_fn, data(8, 5), model, rho=0.3, micro_batches=2, passes="streams")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_what_does_not_go_together():
    model, batch = mlp(), data(8, 5)
    for options, message in (
        ({"passes": "streams", "vectorized": True}, "leave one out"),
        ({"passes": "streams", "shared": True}, "choose one"),
        ({"passes": "vectorized", "shared": True}, "choose one"),
        ({"passes": "fast"}, "must be one of 'loop', 'vectorized', 'streams'"),
    ):
        with pytest.raises(ValueError, match=message):
            msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=2, **options)


def test_vectorized_is_a_word_for_one_of_the_ways():
    models = mlp(), mlp()
    for model, options in zip(models, ({"vectorized": True}, {"passes": "vectorized"}), strict=True):
        msam.backward(loss_of(model), data(8, 5), model, rho=0.3, micro_batches=4, **options)
    torch.testing.assert_close(gradients(models[0]), gradients(models[1]), rtol=0, atol=0)
