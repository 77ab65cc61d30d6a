"""A captured step, with a stand-in for the graph: recorded once, replayed at its own addresses, nothing forgotten."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msam
from msam import graph, mean
from tests.msam.small import convnet, data, gradients, loss_of, mlp
from tests.msam.stand_in import StandIn


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True, **options)


def adam(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True, **options)


def captured(model, optimizer, batch, loss_fn=None, **options):
    """A step that is recorded by the stand-in."""
    options = {"rho": 0.2, "micro_batches": 2} | options
    step = msam.capture(loss_fn or loss_of(model), batch, model, optimizer, eager=True, **options)
    graph.check(model, optimizer, None)
    step.record(StandIn(model, optimizer), batch)
    return step


def eager(model, optimizer, batch, **options):
    optimizer.zero_grad()
    step = msam.backward(loss_of(model), batch, model, **{"rho": 0.2, "micro_batches": 2} | options)
    optimizer.step()
    return step


def batches(count, *shape, examples=8):
    return [data(examples, *shape, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("passes", ["loop", "vectorized", "streams"])
def test_replays_train_as_eager_steps_do(make, passes):
    model = convnet()
    twin, all_batches = copy.deepcopy(model), batches(6, 3, 8, 8)
    ours, theirs = make(model), make(twin)
    step = captured(model, ours, all_batches[0], passes=passes)
    for batch in all_batches:
        found, expected = step(batch), eager(twin, theirs, batch, passes=passes)
        for name in ("loss", "perturbed_loss", "gradient_norms"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-6, atol=1e-8)
    assert (step.replays, step.eager) == (6, 0)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-8)


def test_a_compiled_model_is_captured_and_trains_as_it_does_eagerly():
    """By a backend that compiles nothing but traces forward and backward, as the default mode does."""
    model = convnet()
    twin, all_batches = copy.deepcopy(model), batches(3, 3, 8, 8)
    fast, slow = torch.compile(model, backend="aot_eager"), torch.compile(twin, backend="aot_eager")
    ours, theirs = sgd(model), sgd(twin)
    step = captured(fast, ours, all_batches[0])
    for batch in all_batches:
        found, expected = step(batch), eager(slow, theirs, batch)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-7, atol=1e-9)
    assert step.replays == 3
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_nothing_has_moved_when_it_is_captured(steps_before):
    model = convnet()
    optimizer, all_batches = sgd(model), batches(4, 3, 8, 8)
    for batch in all_batches[:steps_before]:
        eager(model, optimizer, batch)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    grads = [p.grad for p in model.parameters()]
    step = captured(model, optimizer, all_batches[-1])
    assert step._graph.warmed == graph.WARM
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    after = optimizer.state_dict()["state"]
    for number, values in after.items():
        held = moments.get(number) or {"momentum_buffer": torch.zeros_like(values["momentum_buffer"])}
        torch.testing.assert_close(values["momentum_buffer"], held["momentum_buffer"], rtol=0, atol=0)


def test_dropout_draws_new_masks_each_step_and_the_same_in_both_passes():
    """The stand-in draws as an eager step does; at rho -> 0 both passes have the same loss."""
    model, batch = mlp(dropout=0.5), data(8, 5)
    step = captured(model, sgd(model), batch, rho=1e-9)
    first, second = step(batch), step(batch)
    torch.testing.assert_close(first.loss, first.perturbed_loss, rtol=1e-6, atol=1e-8)
    assert first.loss != second.loss


def test_results_of_a_step_are_not_overwritten_by_the_next():
    model, (first, second) = mlp(), batches(2, 5)

    def loss_fn(part):
        logits = model(part[0])
        return msam.Output(F.cross_entropy(logits, part[1]), aux={"logits": logits})

    step = captured(model, sgd(model), first, loss_fn)
    results = step(first)
    kept = copy.deepcopy(results)
    step(second)
    torch.testing.assert_close(results.loss, kept.loss, rtol=0, atol=0)
    torch.testing.assert_close(results.aux, kept.aux, rtol=0, atol=0)


def test_a_scheduler_is_followed():
    model = mlp()
    twin, all_batches = copy.deepcopy(model), batches(5, 5)
    ours, theirs = sgd(model), sgd(twin)
    step = captured(model, ours, all_batches[0])
    once = torch.optim.lr_scheduler.OneCycleLR
    schedules = [once(o, 0.3, total_steps=6, cycle_momentum=False) for o in (ours, theirs)]
    rate = ours.param_groups[0]["lr"]
    for batch in all_batches:
        step(batch)
        eager(twin, theirs, batch)
        for schedule in schedules:
            schedule.step()
    assert ours.param_groups[0]["lr"] is rate
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-7)


def test_a_learning_rate_that_is_set_as_a_number_is_followed():
    model, batch = mlp(), data(8, 5)
    optimizer = sgd(model)
    step = captured(model, optimizer, batch)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    step(batch)
    assert rate == 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_gradient_is_clipped():
    model, batch = mlp(), data(8, 5)
    step = captured(model, sgd(model), batch, clip_norm=1e-3)
    step(batch)
    norm = torch.stack([g.norm() for g in gradients(model).values()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-2)


def test_the_last_smaller_batch_is_run_eagerly():
    model = mlp()
    twin, large, small = copy.deepcopy(model), data(8, 5), data(5, 5, seed=3)
    ours, theirs = sgd(model), sgd(twin)
    step = captured(model, ours, large)
    for batch in (large, small, large):
        step(batch)
        eager(twin, theirs, batch)
    assert (step.replays, step.eager) == (2, 1)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-8)


def test_resumes_from_a_checkpoint_bit_for_bit():
    model, all_batches = mlp(dropout=0.3), batches(6, 5)
    optimizer = sgd(model)
    step = captured(model, optimizer, all_batches[0])
    for batch in all_batches[:3]:
        step(batch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    for batch in all_batches[3:]:
        step(batch)
    expected = copy.deepcopy(model.state_dict())

    def rest(model, optimizer, step):
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        torch.set_rng_state(saved[2])
        for batch in all_batches[3:]:
            step(batch)
        torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)

    rest(model, optimizer, step)  # in the same process: what was loaded goes to where the graph works
    fresh = mlp(seed=7, dropout=0.3)
    its = sgd(fresh)
    rest(fresh, its, captured(fresh, its, all_batches[0]))


def test_what_has_changed_since_is_noticed():
    model, batch = mlp(), data(8, 5)
    optimizer = sgd(model)
    step = captured(model, optimizer, batch)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(ValueError, match="weight_decay has changed since the step was captured"):
        step(batch)
    optimizer.param_groups[0]["weight_decay"] = 1e-3
    model[0].weight.data = model[0].weight.data.clone()
    with pytest.raises(ValueError, match="another address"):
        step(batch)


def test_a_count_on_the_host_is_refused(monkeypatch):
    model, batch = mlp(), data(8, 5)
    monkeypatch.setattr(mean, "capturing", lambda loss: True)
    with pytest.raises(NotImplementedError, match="a number on the host"):
        msam.backward(lambda part: (loss_of(model)(part), len(part[1])), batch, model, rho=0.1)
    msam.backward(loss_of(model), batch, model, rho=0.1, micro_batches=2)


def test_what_waits_for_the_gpu_is_refused_with_the_mend():
    model, batch = mlp(), data(8, 5)
    optimizer = sgd(model)

    class Waits(StandIn):
        def record(self, step):
            raise RuntimeError("operation not permitted when stream is capturing")

    step = msam.capture(loss_of(model), batch, model, optimizer, eager=True, rho=0.1)
    with pytest.raises(NotImplementedError, match=r"eager=True.*not permitted"):
        step.record(Waits(model, optimizer), batch)
    assert all(p.grad is None for p in model.parameters())


def hooked(kind):
    model = mlp()
    if kind == "module":
        model[0].register_forward_hook(lambda *_: None)
    else:
        model[0].weight.register_hook(lambda g: g)
    return model, sgd(model)


@pytest.mark.parametrize(("kind", "message"), [("module", "0 has a hook"), ("parameter", "0.weight has a hook")])
def test_hooks_are_refused(kind, message):
    with pytest.raises(NotImplementedError, match=message):
        graph.check(*hooked(kind), None)


def test_spectral_norm_is_not_refused():
    model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(5, 3)))
    graph.check(model, sgd(model), None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "fused=True"),
        (lambda p: torch.optim.Adam(p, lr=0.1), "capturable=True or fused=True"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, fused=True), "take one step before"),
        (lambda p: torch.optim.NAdam(p, lr=0.1, capturable=True), "take one step before"),
    ],
)
def test_optimizers_that_wait_or_do_not_start_from_zeros_are_refused(make, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        graph.check(model, make(model.parameters()), None)


def test_a_scaler_needs_a_fused_optimizer():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, capturable=True)
    with pytest.raises(ValueError, match="GradScaler makes the host wait"):
        graph.check(model, optimizer, torch.amp.GradScaler("cpu"))


def test_a_model_on_the_cpu_needs_eager():
    model, batch = mlp(), data(8, 5)
    with pytest.raises(ValueError, match="pass eager=True"):
        msam.capture(loss_of(model), batch, model, sgd(model), rho=0.1)
    step = msam.capture(loss_of(model), batch, model, torch.optim.SGD(model.parameters(), lr=0.1), eager=True, rho=0.1)
    step(batch)
    assert (step.replays, step.eager) == (0, 1)
