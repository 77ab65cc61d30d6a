"""Whatever happens, weights, buffers and `.grad` are bit for bit what they were."""

import copy
import os
import signal
import threading

import pytest
import torch
from torch import nn

import msam
from msam import perturbation
from msam.atomic import Gradients
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
