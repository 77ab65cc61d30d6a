"""Weighting: by examples, or by what loss_fn counts; ready lists of micro-batches."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import msam
from msam import passes
from msam.reference import msam_gradient
from tests.msam.small import data, gradients, loss_of, mlp, pure_loss

IGNORED = -100


def counted_loss(model):
    """Mean over the labels that are not ignored, and their number: NaN and 0 where all are."""
    return lambda part: (
        F.cross_entropy(model(part[0]), part[1], ignore_index=IGNORED),
        (part[1] != IGNORED).sum(),
    )


def reference_over(model, parts, weights, rho):
    kept = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight]
    w = {name: p.detach() for name, p in model.named_parameters()}
    return msam_gradient(pure_loss(model), w, [part for part, _ in kept], [weight for _, weight in kept], rho)


@pytest.mark.parametrize("rho", [0.0, 0.4])
@pytest.mark.parametrize("hidden", [[0, 1, 5], [0], [4, 5, 6, 7], [0, 1, 2, 3], [8, 9]])
def test_counts_valid_labels(hidden, rho):
    """Of 10 examples in 3 micro-batches (4, 3, 3) some are ignored; in some cases a whole micro-batch."""
    model, (x, y) = mlp(), data(10, 5)
    y[hidden] = IGNORED
    parts = msam.split((x, y), 3)
    counts = [int((p[1] != IGNORED).sum()) for p in parts]
    valid = [(p[0][p[1] != IGNORED], p[1][p[1] != IGNORED]) for p in parts]
    expected = reference_over(model, valid, counts, rho)
    step = msam.backward(counted_loss(model), (x, y), model, rho=rho, micro_batches=3)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-11, atol=1e-13)
    whole = F.cross_entropy(model(x), y, ignore_index=IGNORED)
    torch.testing.assert_close(step.loss, whole.detach())


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.just(0.0) | st.floats(1e-3, 1e4), min_size=1, max_size=4), rho=st.sampled_from([0.0, 0.3]))
def test_any_weights(weights, rho):
    model, parts = mlp(), [data(3, 5, seed=i) for i in range(len(weights))]
    weight = iter([w for w in weights for _ in range(2 if rho else 1)])
    msam.backward(
        lambda part: msam.Output(loss_of(model)(part), next(weight)), None, model, rho=rho, micro_batches=parts
    )
    if sum(weights):
        expected = reference_over(model, parts, weights, rho)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)
    else:
        assert all(g is None or not g.any() for g in gradients(model).values())


def test_a_micro_batch_of_weight_0_contributes_nothing_even_if_its_loss_and_gradient_are_nan():
    model, batch = mlp(), data(9, 5)
    parts = msam.split(batch, 3)

    def loss_fn(part):
        loss = loss_of(model)(part)
        return (loss * float("nan"), 0) if part is parts[1] else (loss, 3)

    step = msam.backward(loss_fn, None, model, rho=0.3, micro_batches=parts)
    expected = reference_over(model, parts, [3, 0, 3], 0.3)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-11, atol=1e-13)
    assert torch.isfinite(step.loss)
    assert step.gradient_norms[1] == 0


def test_weights_that_nobody_may_wait_for_are_not_looked_at(monkeypatch):
    """The way of GPUs, where a weight's value would cost a wait, taken on the CPU."""
    taken = passes.unpacked

    def on_a_device(returned):
        loss, _, aux = taken(returned)
        return loss, returned[1].to(loss.dtype), aux

    model, (x, y) = mlp(), data(9, 5)
    y[3:6] = IGNORED
    parts = [part for i, part in enumerate(msam.split((x, y), 3)) if i != 1]
    expected = reference_over(model, parts, [3, 3], 0.3)
    monkeypatch.setattr(passes, "unpacked", on_a_device)
    step = msam.backward(counted_loss(model), (x, y), model, rho=0.3, micro_batches=3)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-11, atol=1e-13)
    assert torch.isfinite(step.loss)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_parameters_outside_the_model_get_the_same_mean(counted, rho):
    """A head that is no part of `model`: at rho = 0 it must see the plain gradient, whatever the weights' unit."""
    model, (x, y) = mlp(), data(10, 5)
    head = torch.nn.Linear(3, 3).double()

    def loss_fn(part):
        loss = F.cross_entropy(head(model(part[0])), part[1])
        return (loss, 7 * len(part[1])) if counted else loss

    step = msam.backward(loss_fn, (x, y), model, rho=rho, micro_batches=4)
    found = head.weight.grad.clone()
    head.zero_grad()
    plain = F.cross_entropy(head(model(x)), y)
    plain.backward()
    if rho:
        assert 0.3 < found.norm() / head.weight.grad.norm() < 3
    else:
        torch.testing.assert_close(found, head.weight.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(step.loss, plain.detach())


@pytest.mark.parametrize("counts", [[0, 4096, 4096], [1, 4096, 4096], [4096, 1, 4096], [4096, 4096, 0]])
def test_counts_in_any_order_stay_in_fp16s_range(counts):
    """No loss is multiplied by more than 1, so what does not overflow in plain training does not here."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    parts = [(x.float(), y) for x, y in (data(4, 5, seed=i) for i in range(3))]
    weight = iter([count for count in counts for _ in range(2)])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)

    def loss_fn(part):
        with torch.autocast("cpu", torch.float16):
            return F.cross_entropy(model(part[0]), part[1]), next(weight)

    msam.backward(loss_fn, None, model, rho=0.05, micro_batches=parts, scaler=scaler)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_nothing_to_count_may_be_a_constant():
    model, parts = mlp(), msam.split(data(6, 5), 2)
    zero = torch.zeros((), dtype=torch.float64)
    msam.backward(
        lambda part: (zero, 0) if part is parts[0] else (loss_of(model)(part), 3),
        None,
        model,
        rho=0.3,
        micro_batches=parts,
    )
    torch.testing.assert_close(gradients(model), reference_over(model, parts[1:], [3], 0.3), rtol=1e-11, atol=1e-13)


def test_weights_accumulate_over_calls_as_separate_means():
    model, batch = mlp(), data(8, 5)
    count = lambda part: msam.Output(loss_of(model)(part), 7.0)  # noqa: E731
    msam.backward(count, batch, model, rho=0.2, micro_batches=2)
    once = {name: g.clone() for name, g in gradients(model).items()}
    msam.backward(count, batch, model, rho=0.2, micro_batches=2)
    torch.testing.assert_close(gradients(model), {name: 2 * g for name, g in once.items()})


def test_a_ready_list_is_weighted_by_its_examples():
    model, batch = mlp(), data(7, 5)
    parts = [(batch[0][:5], batch[1][:5]), (batch[0][5:], batch[1][5:])]
    msam.backward(loss_of(model), None, model, rho=0.3, micro_batches=parts)
    torch.testing.assert_close(gradients(model), reference_over(model, parts, [5, 2], 0.3), rtol=1e-11, atol=1e-13)


def test_a_ready_list_of_anything_with_weights():
    model, batch = mlp(), data(7, 5)
    parts = {"a": (batch[0][:5], batch[1][:5]), "b": (batch[0][5:], batch[1][5:])}
    msam.backward(lambda k: (loss_of(model)(parts[k]), len(k)), None, model, rho=0.3, micro_batches=["a", "b"])
    expected = reference_over(model, list(parts.values()), [1, 1], 0.3)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="let loss_fn return"):
        msam.backward(lambda k: loss_of(model)(parts[k]), None, model, rho=0.3, micro_batches=["a", "b"])


@pytest.mark.parametrize(
    ("batch", "micro_batches", "words"),
    [
        (None, 2, "batch is None"),
        ("some", [data(2, 5)], "must be None"),
        (None, [], "empty list"),
    ],
)
def test_refuses_two_batches_or_none(batch, micro_batches, words):
    model = mlp()
    with pytest.raises(ValueError, match=words):
        msam.backward(loss_of(model), batch, model, rho=0.1, micro_batches=micro_batches)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), torch.tensor(-2.0)])
def test_refuses_weights_that_count_nothing(weight):
    model = mlp()
    with pytest.raises(ValueError, match="and 0 or more"):
        msam.backward(lambda part: msam.Output(loss_of(model)(part), weight), data(4, 5), model, rho=0.1)


def test_refuses_a_weight_for_some_micro_batches_only():
    model, calls = mlp(), iter(range(9))
    with pytest.raises(ValueError, match="for every micro-batch, or for none"):
        msam.backward(
            lambda part: loss_of(model)(part) if next(calls) else (loss_of(model)(part), 2),
            data(4, 5),
            model,
            rho=0.0,
            micro_batches=2,
        )


def test_refuses_a_weight_of_several_numbers():
    model = mlp()
    with pytest.raises(ValueError, match="one number"):
        msam.backward(lambda part: msam.Output(loss_of(model)(part), torch.ones(2)), data(4, 5), model, rho=0.1)
