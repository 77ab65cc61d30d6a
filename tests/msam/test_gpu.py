"""Ways of running micro-batches and captured steps on a GPU. Skipped where there is none."""

import copy

import pytest
import torch
import torch.nn.functional as F

import msam
from tests.msam.small import convnet, data, gradients, loss_of, mlp, reference

pytestmark = pytest.mark.needs("gpu")

WAYS = ("loop", "vectorized", "streams")


def on_gpu(batch):
    return tuple(t.cuda() for t in batch)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)


def trained(model, batches, capture, **options):
    """The model after a step for each batch, and what the steps returned."""
    optimizer, steps = sgd(model), []
    step = msam.capture(loss_of(model), batches[0], model, optimizer, eager=not capture, **options)
    for batch in batches:
        steps.append(step(batch))
    assert (step.replays, step.eager) == ((len(batches), 0) if capture else (0, len(batches)))
    return steps


@pytest.mark.parametrize("passes", WAYS)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_each_way_equals_the_reference(passes, adaptive):
    model, batch = convnet(), data(12, 3, 8, 8)
    expected = reference(convnet(), batch, 4, 0.3, adaptive)
    model.cuda()
    options = {"rho": 0.3, "micro_batches": 4, "adaptive": adaptive, "passes": passes}
    step = msam.backward(loss_of(model), on_gpu(batch), model, **options)
    assert step.passes == passes
    found = {name: g.cpu() for name, g in gradients(model).items()}
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("passes", WAYS)
def test_captured_training_equals_eager_training(passes):
    batches = [on_gpu(data(12, 3, 8, 8, seed=seed)) for seed in range(20)] * 10
    captured, eager = convnet().cuda(), convnet().cuda()
    options = {"rho": 0.1, "micro_batches": 4, "passes": passes}
    ours, theirs = trained(captured, batches, True, **options), trained(eager, batches, False, **options)
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), rtol=1e-6, atol=1e-8)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=1e-8)


def test_captured_training_equals_eager_training_in_float32():
    batches = [tuple(t.float() if t.is_floating_point() else t for t in on_gpu(data(12, 3, 8, 8)))] * 5
    captured, eager = convnet().float().cuda(), convnet().float().cuda()
    trained(captured, batches, True, rho=0.1, micro_batches=4)
    trained(eager, batches, False, rho=0.1, micro_batches=4)
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-4)


def test_both_passes_of_a_replay_have_the_same_masks_and_each_replay_has_others():
    model, batch = mlp(dropout=0.5).cuda(), on_gpu(data(32, 5))
    step = msam.capture(loss_of(model), batch, model, sgd(model), rho=1e-9, micro_batches=4)
    losses = []
    for _ in range(4):
        torch.rand(7, device="cuda")  # others draw in between
        result = step(batch)
        torch.testing.assert_close(result.loss, result.perturbed_loss, rtol=1e-6, atol=1e-8)
        losses.append(result.loss.item())
    assert len(set(losses)) == 4


def test_resumes_bit_for_bit():
    batches = [on_gpu(data(32, 5, seed=seed)) for seed in range(6)]
    model = mlp(dropout=0.3).cuda()
    optimizer = sgd(model)
    torch.manual_seed(0)
    step = msam.capture(loss_of(model), batches[0], model, optimizer, rho=0.1, micro_batches=4)
    for batch in batches[:3]:
        step(batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.cuda.get_rng_state()))
    for batch in batches[3:]:
        step(batch)
    fresh = mlp(seed=5, dropout=0.3).cuda()
    its = sgd(fresh)
    again = msam.capture(loss_of(fresh), batches[0], fresh, its, rho=0.1, micro_batches=4)
    fresh.load_state_dict(saved[0])
    its.load_state_dict(saved[1])
    torch.cuda.set_rng_state(saved[2])
    for batch in batches[3:]:
        again(batch)
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_counts_on_the_gpu_are_captured_and_counts_on_the_host_refused():
    model, (x, y) = mlp().cuda(), on_gpu(data(16, 5))
    y[::3] = -100

    def loss_fn(part, count):
        return F.cross_entropy(model(part[0]), part[1]), count((part[1] != -100).sum())

    options = {"rho": 0.1, "micro_batches": 4}
    step = msam.capture(lambda part: loss_fn(part, lambda n: n), (x, y), model, sgd(model), **options)
    step((x, y))
    with pytest.raises(NotImplementedError):
        msam.capture(lambda part: loss_fn(part, lambda n: 3), (x, y), model, sgd(model), **options)


@pytest.mark.parametrize("passes", WAYS)
def test_autocast_under_capture(passes):
    model, batch = convnet().float().cuda(), on_gpu(data(12, 3, 8, 8))
    batch = batch[0].float(), batch[1]

    def loss_fn(part):
        with torch.autocast("cuda", torch.bfloat16):
            return F.cross_entropy(model(part[0]), part[1])

    step = msam.capture(loss_fn, batch, model, sgd(model), rho=0.1, micro_batches=4, passes=passes)
    losses = [step(batch).loss.item() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_a_scaler_under_capture():
    model, batch = mlp().float().cuda(), on_gpu(data(16, 5))
    batch, scaler = (batch[0].float(), batch[1]), torch.amp.GradScaler("cuda")

    def loss_fn(part):
        with torch.autocast("cuda", torch.float16):
            return F.cross_entropy(model(part[0]), part[1])

    options = {"rho": 0.1, "micro_batches": 4, "scaler": scaler, "clip_norm": 1.0}
    step = msam.capture(loss_fn, batch, model, sgd(model), **options)
    losses = [step(batch).loss.item() for _ in range(20)]
    assert losses[-1] < losses[0]


def test_auto_measures_and_reports():
    model, batch = convnet().cuda(), on_gpu(data(16, 3, 8, 8))
    step = msam.backward(loss_of(model), batch, model, rho=0.1, micro_batches=8, passes="auto")
    (found,) = msam.ways.measured(model)
    assert found.fastest == step.passes
    assert set(found.seconds) == set(WAYS)
