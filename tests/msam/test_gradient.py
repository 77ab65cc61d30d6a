"""`msam.backward` against the algorithm as printed, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import msam
from msam import perturbation
from msam.reference import msam_gradient
from tests.msam.small import convnet, data, gradients, loss_of, mlp, pure_loss, reference


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("examples", "m"), [(12, 1), (12, 4), (11, 4), (3, 8), (1, 1)])
@pytest.mark.parametrize("make", [mlp, convnet])
def test_equals_the_reference(make, examples, m, adaptive):
    if make is convnet and examples == 3:
        examples = 9  # BatchNorm over one example of one position would be another test
    model = make()
    batch = data(examples, *((5,) if make is mlp else (3, 8, 8)))
    expected = reference(model, batch, m, 0.3, adaptive)
    msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=m, adaptive=adaptive)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-12, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    examples=st.integers(1, 12),
    m=st.integers(1, 12),
    rho=st.floats(1e-4, 3.0),
    seed=st.integers(0, 5),
)
def test_equals_the_reference_for_any_shape(examples, m, rho, seed):
    model, batch = mlp(seed), data(examples, 5, seed=seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = reference(model, batch, m, rho)
    msam.backward(loss_of(model), batch, model, rho=rho, micro_batches=m)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("make", [mlp, convnet])
def test_rho_zero_is_the_plain_gradient_bit_for_bit(make):
    model = make()
    batch = data(12, *((5,) if make is mlp else (3, 8, 8)))
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(batch[0]), batch[1]).backward()
    msam.backward(loss_of(model), batch, model, rho=0.0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for b, c in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, c)


def test_unequal_micro_batches_are_weighted_by_their_examples():
    model, batch = mlp(), data(10, 5)
    msam.backward(loss_of(model), batch, model, rho=0, micro_batches=4)  # 3, 3, 2, 2
    over_micro_batches = gradients(model)
    plain = mlp()
    loss_of(plain)(batch).backward()
    torch.testing.assert_close(over_micro_batches, gradients(plain), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("m", [1, 3])
def test_each_micro_batch_is_seen_once_at_w_and_once_at_distance_rho(m):
    model, batch = mlp(), data(6, 5)
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    distances = []

    def loss_fn(part):
        distances.append((nn.utils.parameters_to_vector(model.parameters()) - start).norm().item())
        return loss_of(model)(part)

    msam.backward(loss_fn, batch, model, rho=0.7, micro_batches=m)
    assert distances[0::2] == [0.0] * m
    assert distances[1::2] == pytest.approx([0.7] * m, rel=1e-12)


def test_splitting_differently_changes_the_gradient_but_order_within_a_micro_batch_does_not():
    model, (x, y) = mlp(), data(8, 5)

    def gradient(order: list[int], m: int) -> torch.Tensor:
        model.zero_grad()
        msam.backward(loss_of(model), (x[order], y[order]), model, rho=0.5, micro_batches=m)
        return nn.utils.parameters_to_vector([p.grad for p in model.parameters()])

    usual = gradient([0, 1, 2, 3, 4, 5, 6, 7], 2)
    within = gradient([3, 1, 0, 2, 7, 6, 5, 4], 2)
    across = gradient([0, 4, 1, 5, 2, 6, 3, 7], 2)
    torch.testing.assert_close(within, usual, rtol=1e-12, atol=1e-14)
    assert (across - usual).norm() > 1e-3 * usual.norm()


def test_adds_to_gradients_already_there_in_place():
    model, batch = mlp(), data(8, 5)
    msam.backward(loss_of(model), batch, model, rho=0.2, micro_batches=2)
    once = {name: g.clone() for name, g in gradients(model).items()}
    tensors = gradients(model)
    msam.backward(loss_of(model), batch, model, rho=0.2, micro_batches=2)
    for name, g in gradients(model).items():
        assert g is tensors[name]
        torch.testing.assert_close(g, 2 * once[name])


def test_running_statistics_move_once_for_each_micro_batch_at_the_clean_weights():
    model, (x, y) = convnet(), data(8, 3, 8, 8)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for part in x.tensor_split(4):
            twin(part)
    msam.backward(loss_of(model), (x, y), model, rho=5.0, micro_batches=4)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(twin.named_buffers())[name]), name
    assert model[1].num_batches_tracked == 4


def test_batchnorm_in_eval_mode_stays_untouched():
    model, batch = convnet().eval(), data(8, 3, 8, 8)
    before = copy.deepcopy(dict(model.named_buffers()))
    msam.backward(loss_of(model), batch, model, rho=5.0, micro_batches=4)
    torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


def test_a_layer_with_a_buffer_of_its_own_is_kept_too():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1  # replaces the buffer's tensor
            return x

    model = nn.Sequential(Counting(), *mlp())
    msam.backward(loss_of(model), data(8, 5), model, rho=0.1, micro_batches=4)
    assert model[0].calls == 4


def test_both_passes_see_the_same_dropout_masks_and_the_stream_moves_as_for_one_pass():
    model, (x, y) = mlp(dropout=0.5), data(8, 5)
    torch.manual_seed(3)
    clean = [F.cross_entropy(model(a), b).item() for a, b in zip(x.tensor_split(2), y.tensor_split(2), strict=True)]
    after_clean = torch.get_rng_state()
    torch.manual_seed(3)
    losses = []

    def loss_fn(part):
        loss = loss_of(model)(part)
        losses.append(loss.item())
        return loss

    msam.backward(loss_fn, (x, y), model, rho=1e-9, micro_batches=2)
    assert losses[0::2] == clean
    assert losses[1::2] == pytest.approx(clean, abs=1e-7)
    assert torch.equal(torch.get_rng_state(), after_clean)


def test_a_zero_gradient_perturbs_nothing():
    model, batch = mlp(), data(4, 5)
    step = msam.backward(lambda part: loss_of(model)(part) * 0, batch, model, rho=0.1)
    assert step.sharpness == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_frozen_and_unused_parameters():
    model, batch = mlp(), data(6, 5)
    model[0].weight.requires_grad_(False)
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    used = {n: p for n, p in model.named_parameters() if p.requires_grad and n != "spare"}
    frozen = model[0].weight.detach()
    expected = msam_gradient(
        lambda w, part: F.cross_entropy(functional_call(model, {**w, "0.weight": frozen}, part[0]), part[1]),
        {n: p.detach() for n, p in used.items()},
        msam.split(batch, 2),
        [3, 3],
        0.4,
    )
    msam.backward(loss_of(model), batch, model, rho=0.4, micro_batches=2)
    torch.testing.assert_close({n: p.grad for n, p in used.items()}, expected, rtol=1e-12, atol=1e-14)
    assert model[0].weight.grad is None
    assert model.spare.grad is None
    assert torch.equal(model.spare, torch.ones(2, dtype=torch.float64))


def test_a_parameter_used_in_the_first_pass_only_is_put_back():
    model, batch = mlp(), data(6, 5)
    before = copy.deepcopy(model.state_dict())
    calls = iter(range(100))

    def loss_fn(part):
        x = model[0](part[0])
        return F.cross_entropy(model[3](torch.tanh(x if next(calls) % 2 == 0 else x.detach())), part[1])

    msam.backward(loss_fn, batch, model, rho=0.5, micro_batches=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_parameter_that_is_used_no_more_stays_where_it_is():
    """It was perturbed in the first call; calls without a gradient for it must not move it back again."""
    model, batch = mlp(), data(6, 5)
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.register_parameter("extra", extra)
    before = copy.deepcopy(model.state_dict())
    for used in (True, False, False, False):
        model.zero_grad()
        msam.backward(
            lambda part, used=used: F.cross_entropy(model(part[0]) + (extra if used else 0), part[1]),
            batch,
            model,
            rho=0.5,
            micro_batches=2,
        )
        assert (extra.grad is not None) == used
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name


def test_loss_fn_may_take_a_batch_apart():
    """As Hugging Face's compute_loss does, which pops the labels: both passes get containers of their own."""
    model, (x, y) = mlp(), data(6, 5)
    expected = reference(model, (x, y), 2, 0.4)

    def loss_fn(part):
        labels = part["all"].pop("y")
        return F.cross_entropy(model(part["all"].pop("x")), labels)

    batch = {"all": {"x": x, "y": y}}
    msam.backward(loss_fn, batch, model, rho=0.4, micro_batches=2)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-12, atol=1e-14)
    assert set(batch["all"]) == {"x", "y"}


def test_buffers_that_nothing_can_write_to():
    model, batch = mlp(), data(6, 5)
    model.register_buffer("mask", torch.zeros(1).expand(5))
    model.register_buffer("nothing", None)
    msam.backward(loss_of(model), batch, model, rho=0.4, micro_batches=2)
    torch.testing.assert_close(gradients(model), reference(mlp(), batch, 2, 0.4), rtol=1e-12, atol=1e-14)


def test_parameters_keep_their_storage():
    model, batch = mlp(), data(6, 5)
    pointers = [p.data_ptr() for p in model.parameters()]
    msam.backward(loss_of(model), batch, model, rho=0.5, micro_batches=2)
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("make", [mlp, convnet])
def test_moved_in_their_place_as_on_a_gpu_the_weights_give_the_same(monkeypatch, make, adaptive):
    batch = data(8, 5) if make is mlp else data(8, 3, 8, 8)
    swapped, in_place = make(), make()
    seen = {}

    def step(model, swapped_on):
        monkeypatch.setattr(perturbation, "SWAPPED_ON", swapped_on)
        addresses = [p.data_ptr() for p in model.parameters()]
        calls = []

        def loss_fn(part):
            calls.append([p.data_ptr() for p in model.parameters()] == addresses)
            return loss_of(model)(part)

        msam.backward(loss_fn, batch, model, rho=0.5, micro_batches=2, adaptive=adaptive)
        seen[model] = calls

    step(swapped, ("cpu",))
    step(in_place, ())
    assert seen[swapped] == [True, False, True, False]
    assert seen[in_place] == [True] * 4
    torch.testing.assert_close(gradients(swapped), gradients(in_place), rtol=1e-12, atol=1e-14)
    assert all(torch.equal(p, q) for p, q in zip(swapped.parameters(), in_place.parameters(), strict=True))


@pytest.mark.parametrize("cached", ["before", "in the clean pass"])
def test_a_view_that_a_layer_keeps_is_perturbed_too(cached):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = nn.Parameter(torch.randn(15, dtype=torch.float64))
            self.w = self.flat.view(5, 3) if cached == "before" else None

        def forward(self, x):
            if self.w is None:
                self.w = self.flat.view(5, 3)
            return x @ self.w

    torch.manual_seed(0)
    model, x = Flat(), data(4, 5)[0]
    start = model.flat.detach().clone()
    step = msam.backward(lambda part: model(part).square().mean(), x, model, rho=0.5)

    def loss(flat):
        return (x @ flat.view(5, 3)).square().mean()

    w = start.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(w), w)
    moved = (start + 0.5 * g / g.norm()).requires_grad_()
    (expected,) = torch.autograd.grad(loss(moved), moved)
    torch.testing.assert_close(model.flat.grad, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(step.perturbed_loss, loss(moved).detach())
    assert torch.equal(model.flat.detach(), start)


@pytest.mark.parametrize("used_in", [1, None], ids=["the perturbed pass", "later"])
@pytest.mark.parametrize("kept_from", [0, 1], ids=["clean", "perturbed"])
def test_a_kept_graph_does_not_read_other_weights(kept_from, used_in):
    if kept_from == used_in:
        pytest.skip("its own pass")
    model, batch = mlp(), data(4, 5)
    kept, calls = {}, iter(range(2))

    def loss_fn(part):
        call = next(calls)
        if call == used_in:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(kept[kept_from], list(model.parameters()), allow_unused=True)
        kept[call] = model(part[0]).square().mean()  # a graph of its own, which no backward pass has used up
        return loss_of(model)(part)

    msam.backward(loss_fn, batch, model, rho=0.5)
    if used_in is None:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept[kept_from].backward()


def test_the_losses_of_a_step_may_be_views_of_a_parameter():
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    step = msam.backward(lambda part: model.w[int(part)], torch.tensor([0, 1]), model, rho=0.5, micro_batches=2)
    assert (step.loss.item(), step.perturbed_loss.item()) == (1.5, 2.0)


def test_complex_parameters_take_asams_perturbation():
    torch.manual_seed(0)
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    start, x = model.w.detach().clone(), torch.randn(2, 3, dtype=torch.complex128)
    seen = []

    def loss_fn(part):
        seen.append(model.w.detach().clone())
        return (part @ model.w).abs().square().mean()

    msam.backward(loss_fn, x, model, rho=0.5, adaptive=True)
    w = start.clone().requires_grad_()
    (g,) = torch.autograd.grad((x @ w).abs().square().mean(), w)
    expected = start + 0.5 * start.abs().square() * g / (start.abs() * g).norm()
    torch.testing.assert_close(seen[1], expected)


def test_the_record_of_a_step():
    model, batch = mlp(), data(10, 5)
    step = msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=4)
    plain = loss_of(model)(batch)
    assert step.loss.item() == pytest.approx(plain.item(), rel=1e-12)
    assert step.sharpness.item() == pytest.approx((step.perturbed_loss - step.loss).item())
    assert step.sharpness > 0
    norms = []
    for part in msam.split(batch, 4):
        g = torch.autograd.grad(loss_of(model)(part), list(model.parameters()))
        norms.append(torch.cat([t.flatten() for t in g]).norm())
    torch.testing.assert_close(step.gradient_norms, torch.stack(norms))
    assert not any(t.requires_grad for t in (step.loss, step.perturbed_loss, step.gradient_norms))


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), "0.1", True])
def test_refuses_an_unusable_rho(rho):
    model = mlp()
    with pytest.raises(ValueError, match="rho"):
        msam.backward(loss_of(model), data(4, 5), model, rho=rho)


@pytest.mark.parametrize("m", [0, -1, 1.5, True])
def test_refuses_an_unusable_m(m):
    model = mlp()
    with pytest.raises(ValueError, match="micro_batches"):
        msam.backward(loss_of(model), data(4, 5), model, rho=0.1, micro_batches=m)


def test_refuses_what_is_no_mean_loss():
    model = mlp()
    with pytest.raises(ValueError, match="scalar tensor"):
        msam.backward(lambda part: model(part[0]), data(4, 5), model, rho=0.1)
    with pytest.raises(ValueError, match="scalar tensor"):
        msam.backward(lambda part: 0.3, data(4, 5), model, rho=0.1)


def test_refuses_a_model_that_the_loss_does_not_reach():
    model, other = mlp(), mlp()
    with pytest.raises(ValueError, match="no perturbed parameter"):
        msam.backward(loss_of(other), data(4, 5), model, rho=0.1)


def test_sgd_with_momentum_takes_the_reference_steps():
    """Ten steps of the whole method: perturbation, average, base optimizer, restored weights."""
    model, batch = mlp(), data(12, 5)
    w = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in w.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    parts = msam.split(batch, 3)
    for _ in range(10):
        optimizer.zero_grad()
        msam.backward(loss_of(model), batch, model, rho=0.2, micro_batches=3)
        optimizer.step()
        g = msam_gradient(pure_loss(model), w, parts, [4, 4, 4], 0.2)
        for name in w:
            velocity[name] = 0.9 * velocity[name] + g[name] + 0.01 * w[name]
            w[name] = w[name] - 0.1 * velocity[name]
    torch.testing.assert_close({n: p.detach() for n, p in model.named_parameters()}, w, rtol=1e-10, atol=1e-12)
