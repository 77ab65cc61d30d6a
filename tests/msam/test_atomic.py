"""Whatever happens, weights, buffers and `.grad` are bit for bit what they were."""

import copy
import os
import signal
import threading
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msam
from msam import perturbation
from msam.atomic import Gradients
from tests.msam.faults import AtLine, FaultAt, Injected, Watched, fail, interrupt
from tests.msam.small import convnet, data, gradients, loss_of


@pytest.fixture(autouse=True)
def usual_handler():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor], grads: dict[str, torch.Tensor | None]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, g in gradients(model).items():
        assert (g is None and grads[name] is None) or torch.equal(g, grads[name]), name


def with_gradients() -> tuple[nn.Module, tuple, dict, dict]:
    model, batch = convnet(), data(8, 3, 8, 8)
    msam.backward(loss_of(model), batch, model, rho=0.1)
    return model, batch, state(model), {name: g.clone() for name, g in gradients(model).items()}


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("out of memory, say")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_an_exception_in_any_pass(fails_at, where):
    model, batch, before, grads = with_gradients()
    calls = iter(range(100))

    def loss_fn(part):
        loss = loss_of(model)(part)
        if next(calls) != fails_at:
            return loss
        if where == "forward":
            raise RuntimeError("out of memory, say")
        return Fails.apply(loss)

    with pytest.raises(RuntimeError, match="out of memory"):
        msam.backward(loss_fn, batch, model, rho=3.0, micro_batches=2)
    assert_unchanged(model, before, grads)


def test_an_exception_while_the_weights_are_half_moved(monkeypatch):
    model, batch, before, grads = with_gradients()
    add, calls = torch.addcmul, iter(range(100))

    def fails(*arguments, **options):
        if next(calls) == 3:
            raise RuntimeError("out of memory, say")
        return add(*arguments, **options)

    monkeypatch.setattr(torch, "addcmul", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        msam.backward(loss_of(model), batch, model, rho=3.0)
    assert next(calls) == 4
    assert_unchanged(model, before, grads)


def test_an_exception_while_the_weights_are_half_moved_in_their_place(monkeypatch):
    model, batch, before, grads = with_gradients()
    monkeypatch.setattr(perturbation, "SWAPPED_ON", ())
    add = torch._foreach_add_

    def half(w, steps):
        add(w[:3], steps[:3])
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(torch, "_foreach_add_", half)
    with pytest.raises(RuntimeError, match="out of memory"):
        msam.backward(loss_of(model), batch, model, rho=3.0)
    assert_unchanged(model, before, grads)


@pytest.mark.parametrize("press_at", [0, 1, 2, 3])
def test_ctrl_c_waits_until_the_weights_are_back(press_at):
    model, batch, before, grads = with_gradients()
    calls, finished = iter(range(100)), []

    def loss_fn(part):
        call = next(calls)
        if call == press_at:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100):  # the interpreter looks for signals here
                pass
        finished.append(call)
        return loss_of(model)(part)

    with pytest.raises(KeyboardInterrupt):
        msam.backward(loss_fn, batch, model, rho=3.0, micro_batches=2)
    perturbed = press_at % 2 == 1
    assert finished == list(range(press_at + perturbed)), "at w it is heard at once, at w + e after the pass"
    assert_unchanged(model, before, grads)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait():
    model, batch, before, grads = with_gradients()
    calls, reached = iter(range(100)), []

    def loss_fn(part):
        if next(calls) == 1:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(100):
                    pass
            reached.append(True)
        return loss_of(model)(part)

    with pytest.raises(KeyboardInterrupt):
        msam.backward(loss_fn, batch, model, rho=3.0)
    assert not reached
    assert_unchanged(model, before, grads)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_callers_own_is_called_with_its_signal_and_put_back():
    model, batch = convnet(), data(8, 3, 8, 8)
    heard, calls = [], iter(range(100))

    def handler(number, frame):
        heard.append((number, frame is not None))

    def loss_fn(part):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return loss_of(model)(part)

    usual = signal.signal(signal.SIGINT, handler)
    try:
        msam.backward(loss_fn, batch, model, rho=0.1)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, usual)
    assert heard == [(signal.SIGINT, True)]
    assert all(p.grad is not None for p in model.parameters())


def test_works_outside_the_main_thread():
    model, twin, batch = convnet(), convnet(), data(8, 3, 8, 8)
    thread = threading.Thread(target=lambda: msam.backward(loss_of(model), batch, model, rho=0.1, micro_batches=2))
    thread.start()
    thread.join()
    msam.backward(loss_of(twin), batch, twin, rho=0.1, micro_batches=2)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=0)


@pytest.mark.parametrize("swapped_on", [("cpu",), ()], ids=["swapped", "in place"])
def test_a_second_ctrl_c_while_the_weights_are_put_back_waits(monkeypatch, swapped_on):
    model, batch, before, grads = with_gradients()
    monkeypatch.setattr(perturbation, "SWAPPED_ON", swapped_on)
    owner, name = (perturbation, "increment_version") if swapped_on else (torch, "_foreach_copy_")
    put_back = getattr(owner, name)

    def pressed(*tensors):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100):
                pass
        put_back(*tensors)

    monkeypatch.setattr(owner, name, pressed)
    with pytest.raises(KeyboardInterrupt):
        msam.backward(loss_of(model), batch, model, rho=3.0)
    assert_unchanged(model, before, grads)


def test_ctrl_c_at_the_end_finds_the_call_finished(monkeypatch):
    model, batch, _, _ = with_gradients()
    twin = copy.deepcopy(model)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    msam.backward(loss_of(twin), batch, twin, rho=3.0)
    commit = Gradients.commit

    def pressed(self):
        commit(self)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            pass

    monkeypatch.setattr(Gradients, "commit", pressed)
    with pytest.raises(KeyboardInterrupt):
        msam.backward(loss_of(model), batch, model, rho=3.0)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=0, atol=0)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_handler_that_saves_a_checkpoint_never_sees_perturbed_weights(number):
    model, batch, before, _ = with_gradients()
    saved, calls = [], iter(range(100))
    usual = signal.signal(number, lambda *_: saved.append(copy.deepcopy(dict(model.named_parameters()))))

    def loss_fn(part):
        if next(calls) == 1:
            os.kill(os.getpid(), number)
            for _ in range(100):
                pass
        return loss_of(model)(part)

    try:
        msam.backward(loss_fn, batch, model, rho=3.0)
    finally:
        signal.signal(number, usual)
    (weights,) = saved
    assert all(torch.equal(p, before[name]) for name, p in weights.items())


class Looks(nn.Module):
    """A table that is moved by its rows, a layer with statistics, and dropout."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9000, 8)
        self.norm, self.drop, self.out = nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, ids):
        return self.out(self.drop(self.norm(self.table(ids).mean(1))))


MODES = {
    "loop": {},
    "in place": {},
    "adaptive": {"adaptive": True},
    "shared": {"shared": True},
    "vectorized": {"vectorized": True},
    "streams": {"passes": "streams"},
    "rho = 0": {"rho": 0.0},
}
SELDOM = ("adaptive", "in place", "rho = 0")
"""Modes that only make test-rare tries."""


@pytest.fixture(params=[pytest.param(mode, marks=pytest.mark.rare if mode in SELDOM else ()) for mode in MODES])
def step(request, monkeypatch):
    """A function that takes a step of a model, and how to make one with gradients from before."""
    if request.param == "in place":
        monkeypatch.setattr(perturbation, "SWAPPED_ON", ())
    options = {"rho": 0.3} | MODES[request.param]
    x, y = torch.randint(0, 9000, (6, 2), generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3

    def make():
        torch.manual_seed(0)
        model = Looks().double()
        for p in [model.norm.weight, model.out.weight]:
            p.grad = torch.full_like(p, 100.0)
        return model

    def take(model):
        torch.manual_seed(3)
        msam.backward(lambda part: F.cross_entropy(model(part[0]), part[1]), (x, y), model, micro_batches=2, **options)

    return make, take


def taken(make, take):
    model = make()
    take(model)
    return model


def test_a_fault_at_any_operation_leaves_everything_as_it_was(step):
    make, take = step
    with FaultAt(None) as counting:
        taken(make, take)
    for number in range(counting.count):
        model = make()
        watched = Watched(model)
        with suppress(Injected), FaultAt(number) as fault:
            take(model)
            fault.number = None
        assert fault.number is None or watched.unchanged(), f"operation {number}"


@pytest.mark.rare
@pytest.mark.parametrize("act", [interrupt, fail])
def test_ctrl_c_or_an_error_at_any_line_finds_the_step_undone_or_finished(step, act):
    make, take = step
    expected = taken(make, take)
    with AtLine(None, act) as watching:
        taken(make, take)
    wrong = []
    for number in watching.numbers():
        model = make()
        watched = Watched(model)
        with suppress(KeyboardInterrupt, Injected), AtLine(number, act):
            take(model)
        if not (watched.unchanged() or watched.committed(expected)):
            wrong.append(f"{watching.lines[number]}: half a step")
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            wrong.append(f"{watching.lines[number]}: handlers")
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            take(model)  # nothing is left of the step before
        except Exception as error:
            wrong.append(f"{watching.lines[number]}: {error}")
    assert not wrong


@pytest.mark.parametrize("kind", ["expanded", "inference", "sparse", "dense of a sparse layer"])
def test_gradients_that_cannot_be_written_to_are_replaced_by_the_sum(kind):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=kind.startswith("dense")), nn.Flatten(), nn.Linear(8, 3)).double()
    twin, batch = copy.deepcopy(model), (torch.randint(0, 10, (6, 2)), torch.arange(6) % 3)
    w = model[0].weight
    before = torch.ones(10, 4, dtype=torch.float64)
    if kind == "expanded":
        w.grad = torch.ones(1, 1, dtype=torch.float64).expand(10, 4)
    elif kind == "inference":
        with torch.inference_mode():
            w.grad = before.clone()
    elif kind == "sparse":
        w.grad = before.to_sparse(1)
    else:
        w.grad = before.clone()
    for net in (model, twin):
        msam.backward(loss_of(net), batch, net, rho=0.3, micro_batches=2)
    dense = [net[0].weight.grad.to_dense() for net in (model, twin)]
    torch.testing.assert_close(dense[0], dense[1] + 1)


def test_putting_back_goes_on_past_a_parameter_that_fails(monkeypatch):
    model, batch, before, grads = with_gradients()
    put_back, calls = perturbation.increment_version, iter(range(1000))
    first_back = len(list(model.parameters()))  # after as many have moved

    def fails(p):
        if next(calls) == first_back:
            raise RuntimeError("a hook, say")
        put_back(p)

    monkeypatch.setattr(perturbation, "increment_version", fails)
    with pytest.raises(RuntimeError, match="a hook"):
        msam.backward(loss_of(model), batch, model, rho=3.0)
    assert_unchanged(model, before, grads)


def test_the_users_own_error_comes_out_when_putting_back_fails_too():
    model, batch, _, _ = with_gradients()

    class Own(Exception):
        pass

    def loss_fn(part):
        model[1].running_mean = torch.zeros(4, dtype=torch.float64)
        model[1]._buffers["running_var"].resize_(7)
        raise Own

    with pytest.raises(Own):
        msam.backward(loss_fn, batch, model, rho=3.0)
    assert model[1].running_var.shape == (4,)


def test_a_signal_that_waits_behind_another_is_delivered_too():
    model, batch, before, grads = with_gradients()
    heard, calls = [], iter(range(100))
    usual = signal.signal(signal.SIGUSR1, lambda *_: heard.append("usr1"))

    def loss_fn(part):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
            for _ in range(100):
                pass
        return loss_of(model)(part)

    try:
        with pytest.raises(KeyboardInterrupt):
            msam.backward(loss_fn, batch, model, rho=3.0)
    finally:
        signal.signal(signal.SIGUSR1, usual)
    assert heard == ["usr1"]
    assert_unchanged(model, before, grads)
