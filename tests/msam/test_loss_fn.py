"""What `loss_fn` may return, and what it must not do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msam
from tests.msam.small import convnet, data, gradients, loss_of, mlp, reference


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": 0.3}, {"rho": 0.3, "shared": True}], ids=str)
def test_aux_of_the_clean_passes_comes_back_detached(options):
    model, (x, y) = mlp(), data(10, 5)
    expected = [model(part).detach() for part in x.tensor_split(4)]

    def loss_fn(part):
        logits = model(part[0])
        return msam.Output(F.cross_entropy(logits, part[1]), aux={"logits": logits, "n": len(logits)})

    step = msam.backward(loss_fn, (x, y), model, micro_batches=4, **options)
    assert [aux["n"] for aux in step.aux] == [3, 3, 2, 2]
    for aux, logits in zip(step.aux, expected, strict=True):
        assert not aux["logits"].requires_grad
        assert torch.equal(aux["logits"], logits)


def test_aux_of_one_pass_over_all():
    model, (x, y) = mlp(), data(8, 5)

    def loss_fn(part):
        logits = model(part[0])
        return msam.Output(F.cross_entropy(logits, part[1]), aux=logits)

    expected = model(x).detach()
    (logits,) = msam.backward(loss_fn, (x, y), model, rho=0.3, micro_batches=4, vectorized=True).aux
    torch.testing.assert_close(logits, expected)


def test_a_metric_that_a_layer_counts_is_counted_once_a_micro_batch():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.total, self.passes = 0, torch.zeros(()), []

        def forward(self, logits):
            self.seen += len(logits)
            self.total = self.total + logits.detach().sum()
            self.passes.append(len(logits))
            return logits

    model = nn.Sequential(*mlp(), Counts())
    msam.backward(loss_of(model), data(10, 5), model, rho=0.3, micro_batches=4)
    assert model[-1].seen == 10
    assert model[-1].passes == [3, 3, 2, 2]


def test_weights_of_any_kind_go_through_output():
    model, batch = mlp(), data(7, 5)
    parts = msam.split(batch, 2)
    weights = iter([0.75, 0.75, 0.25, 0.25])
    step = msam.backward(
        lambda part: msam.Output(loss_of(model)(part), weight=next(weights)), batch, model, rho=0.3, micro_batches=2
    )
    losses = [loss_of(mlp())(part).detach() for part in parts]
    torch.testing.assert_close(step.loss, 0.75 * losses[0] + 0.25 * losses[1])


def output_of_transformers(**fields):
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(**fields)


LOSS = torch.zeros((), dtype=torch.float64)
NOT_A_COUNT = {
    "accuracy": lambda logits, y: (logits.argmax(1) == y).double().mean(),
    "a number with a point": lambda logits, y: 0.5,
    "a flag": lambda logits, y: True,
    "a tensor of flags": lambda logits, y: (y == 0).any(),
    "logits": lambda logits, y: logits,
    "a dict": lambda logits, y: {"accuracy": 1.0},
    "an output": lambda logits, y: output_of_transformers(logits=logits),
    "a string": lambda logits, y: "train",
    "nothing": lambda logits, y: None,
    "counts": lambda logits, y: y,
}


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(name, marks=pytest.mark.needs("transformers")) if name == "an output" else name
        for name in NOT_A_COUNT
    ],
)
def test_a_tuples_second_is_a_count_or_refused_with_the_mend(second):
    model, batch = convnet(), data(8, 3, 8, 8)
    before = [b.clone() for b in model.buffers()]

    def loss_fn(part):
        logits = model(part[0])
        return F.cross_entropy(logits, part[1]), NOT_A_COUNT[second](logits, part[1])

    with pytest.raises(ValueError, match=r"msam\.Output\(loss, aux=\.\.\.\)"):
        msam.backward(loss_fn, batch, model, rho=0.3, micro_batches=2)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))


@pytest.mark.parametrize(
    "returned",
    [
        lambda out: {"loss": out.mean()},
        lambda out: [out.mean(), 3],
        pytest.param(
            lambda out: output_of_transformers(loss=out.mean()), marks=pytest.mark.needs("transformers"), id="an output"
        ),
    ],
)
def test_what_holds_a_loss_is_not_a_loss(returned):
    model = mlp()
    with pytest.raises(ValueError, match=r"msam\.Output\(loss, aux=\.\.\.\)"):
        msam.backward(lambda part: returned(model(part[0])), data(4, 5), model, rho=0.1)


def test_counts_of_every_integer_type():
    numpy = pytest.importorskip("numpy")
    expected = None
    for count in (int, numpy.int32, lambda n: torch.tensor(n), lambda n: torch.tensor([n], dtype=torch.int32)):
        model, batch = mlp(), data(9, 5)
        msam.backward(
            lambda part, model=model, count=count: (loss_of(model)(part), count(len(part[1]))),
            batch,
            model,
            rho=0.3,
            micro_batches=2,
        )
        expected = expected or reference(mlp(), batch, 2, 0.3)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("call", ["backward", "zero_grad"])
@pytest.mark.parametrize("in_pass", [0, 1, 3])
def test_it_runs_the_forward_pass_only(call, in_pass, vectorized):
    model, batch, calls = mlp(), data(8, 5), iter(range(9))
    if vectorized and in_pass == 3:
        pytest.skip("two passes")
    if call == "zero_grad" and (in_pass < 3):
        pytest.skip("there is nothing yet")

    def loss_fn(part):
        loss = loss_of(model)(part)
        if next(calls) == in_pass:
            loss.backward(retain_graph=True) if call == "backward" else model.zero_grad()
        return loss

    model[0].bias.grad = torch.ones(7, dtype=torch.float64)
    with pytest.raises((ValueError, NotImplementedError), match=r"forward pass only|a gradient within loss_fn"):
        msam.backward(loss_fn, batch, model, rho=0.1, micro_batches=2, vectorized=vectorized)
    assert torch.equal(model[0].bias.grad, torch.ones(7, dtype=torch.float64))
    assert model[0].weight.grad is None


def test_a_call_within_a_call_is_refused_for_one_model_and_right_for_two():
    model, batch = mlp(), data(8, 5)

    def nested(part):
        msam.backward(loss_of(model), part, model, rho=0.1)
        return loss_of(model)(part)

    with pytest.raises(RuntimeError, match="outside of loss_fn"):
        msam.backward(nested, batch, model, rho=0.1, micro_batches=2)
    assert all(p.grad is None for p in model.parameters())

    outer, inner = mlp(1), mlp(2)

    def trains_another(part):
        inner.zero_grad()
        msam.backward(loss_of(inner), part, inner, rho=0.2)
        return loss_of(outer)(part)

    msam.backward(trains_another, batch, outer, rho=0.1, micro_batches=2)
    torch.testing.assert_close(gradients(outer), reference(mlp(1), batch, 2, 0.1), rtol=1e-10, atol=1e-13)
    last = msam.split(batch, 2)[-1]
    torch.testing.assert_close(gradients(inner), reference(mlp(2), last, 1, 0.2), rtol=1e-10, atol=1e-13)
    msam.backward(loss_of(model), batch, model, rho=0.1)  # nothing is left of the refused call


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("in_pass", [0, 1])
def test_it_must_not_write_to_the_batch(in_pass, vectorized):
    model, (x, y), calls = mlp(), data(8, 5), iter(range(9))

    def loss_fn(part):
        if next(calls) == in_pass:
            part[0].mul_(2)
        return loss_of(model)(part)

    with pytest.raises(ValueError, match="wrote to a tensor of the batch"):
        msam.backward(loss_fn, (x, y), model, rho=0.1, micro_batches=2, vectorized=vectorized)
    assert all(p.grad is None for p in model.parameters())


def test_numbers_of_any_type():
    numpy = pytest.importorskip("numpy")
    batch = data(8, 5)
    expected = reference(mlp(), batch, 2, 0.25)
    for rho, m in (
        (numpy.float32(0.25), numpy.int64(2)),
        (torch.tensor(0.25), torch.tensor(2)),
        (numpy.float64(0.25), torch.tensor(2, dtype=torch.int32)),
    ):
        model = mlp()
        msam.backward(loss_of(model), batch, model, rho=rho, micro_batches=m)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-13)
    for m in (torch.tensor(2.0), torch.tensor([2]), numpy.float64(2), numpy.bool_(True)):
        with pytest.raises(ValueError, match="micro_batches"):
            msam.backward(loss_of(mlp()), batch, mlp(), rho=0.1, micro_batches=m)
    for rho in (torch.tensor([0.1]), torch.tensor(float("nan")), numpy.float32("inf"), torch.tensor(True)):
        with pytest.raises(ValueError, match="rho"):
            msam.backward(loss_of(mlp()), batch, mlp(), rho=rho)


def test_a_lazy_layer_is_refused_before_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="one forward pass"):
        msam.backward(loss_of(model), data(4, 5), model, rho=0.1)


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": 0.3}, {"rho": 0.3, "shared": True}], ids=str)
def test_a_loss_fn_that_writes_to_a_parameter_is_refused(options):
    """`F.embedding(max_norm=...)` scales the rows that it looks up, in place."""
    model, (x, y) = mlp(), data(8, 5)
    table = nn.Parameter(torch.randn(4, 5, dtype=x.dtype))
    model.register_parameter("table", table)

    def loss_fn(part):
        rows = F.embedding((part[0][:, 0] > 0).long(), table, max_norm=0.1)
        return F.cross_entropy(model(part[0] + rows), part[1])

    with pytest.raises(ValueError, match=r"wrote to a trained parameter .*after the optimizer"):
        msam.backward(loss_fn, (x, y), model, micro_batches=4, **options)
    assert all(p.grad is None for p in model.parameters())
