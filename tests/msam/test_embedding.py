"""Tables of which a micro-batch reads a few rows: the same gradient, from those rows alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import msam
from msam.embedding import SMALLEST, tables
from tests.msam.small import gradients, pure_loss, reference

WORDS, WIDTH = 2100, 32
assert WORDS * WIDTH >= SMALLEST


class Tagger(nn.Module):
    """Word and position tables, and a classifier that may be tied to the words'."""

    def __init__(self, tied: bool = False, **options):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, **options)
        self.places = nn.Embedding(6, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS if tied else 3, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(self.mix(x)).mean(1))


def tagger(**options) -> nn.Module:
    torch.manual_seed(0)
    return Tagger(**options).double()


def text(examples: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40, (examples, 6), generator=generator)  # words recur, within and over micro-batches
    return ids, torch.randint(0, 3, (examples,), generator=generator)


def loss_of(model):
    return lambda part: F.cross_entropy(model(part[0]), part[1])


class Counts(TorchDispatchMode):
    """How often an operation runs, by its name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"padding_idx": 3}, {"sparse": True}])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("m", [1, 3])
def test_equals_the_reference(options, adaptive, m):
    model, batch = tagger(**options), text()
    dense = tagger(**{**options, "sparse": False})
    before = copy.deepcopy(model.state_dict())
    expected = reference(dense, batch, m, 0.3, adaptive)
    msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=m, adaptive=adaptive)
    found = {name: g.to_dense() if g.is_sparse else g for name, g in gradients(model).items()}
    torch.testing.assert_close(found, {name: expected[name] for name in found}, rtol=1e-11, atol=1e-13)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("m", [1, 4])
def test_the_whole_table_is_written_once_a_step(m):
    """One dense gradient makes .grad; the ascent gradients, and those added to it, are of single rows."""
    model, batch = tagger(), text()
    with Counts() as counts:
        msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=m)
    words, places = 1, 2 * m  # the table of places is too small to bother
    assert counts.calls["embedding_dense_backward"] == words + places
    assert not model.words.weight.grad.is_sparse
    assert not model.words.sparse


def test_only_the_rows_that_were_read_move_and_the_distance_is_rho():
    model, batch = tagger(), text()
    before = model.words.weight.detach().clone()
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    moved, distance = [], []

    def loss_fn(part):
        moved.append((model.words.weight != before).any(1).nonzero().flatten())
        distance.append((nn.utils.parameters_to_vector(model.parameters()) - start).norm().item())
        return loss_of(model)(part)

    msam.backward(loss_fn, batch, model, rho=0.7)
    assert torch.equal(moved[1], batch[0].unique())
    assert distance == [0, pytest.approx(0.7, rel=1e-12)]


def test_rho_zero_adds_single_rows_too():
    model, twin, batch = tagger(), tagger(), text()
    with Counts() as counts:
        msam.backward(loss_of(model), batch, model, rho=0, micro_batches=4)
    assert counts.calls["embedding_dense_backward"] == 1 + 4
    loss_of(twin)(batch).backward()
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("layer", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_a_layer_that_uses_its_flag_is_left_alone(layer):
    model = tagger()
    assert tables(model) == [model.words]
    assert not tables(tagger(**layer))


def test_a_compiled_model_is_left_alone_and_max_norm_is_refused():
    model = tagger()
    assert not tables(torch.compile(model, backend="eager"))
    model.mix = torch.compile(model.mix, backend="eager")
    assert not tables(model)
    model = tagger(max_norm=1.0)
    with pytest.raises(NotImplementedError, match=r"nn\.Embedding.*leave max_norm out"):
        msam.backward(loss_of(model), text(), model, rho=0.1)


def test_a_hook_sees_whole_gradients():
    model, batch, seen = tagger(), text(), []
    model.words.weight.register_hook(lambda g: seen.append(g.layout))
    msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=2)
    assert seen == [torch.strided] * 4


def test_the_flag_is_put_back_when_loss_fn_raises():
    model, batch = tagger(), text()

    def loss_fn(part):
        assert model.words.sparse
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        msam.backward(loss_fn, batch, model, rho=0.3)
    assert not model.words.sparse


def test_the_reference_of_this_file_sees_the_table():
    """Else the equalities above would hold of nothing."""
    model, batch = tagger(), text()
    gradient = torch.autograd.grad(pure_loss(model)(dict(model.named_parameters()), batch), model.words.weight)[0]
    assert gradient.any(1).sum() == len(batch[0].unique())
