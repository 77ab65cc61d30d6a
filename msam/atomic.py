"""All or nothing: what `backward` leaves behind when something goes wrong, or when a signal arrives."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGXCPU", "SIGQUIT")
_HELD = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
"""Ctrl-C, the signals whose handlers write checkpoints where jobs are preempted, and those of timers and limits."""


@contextmanager
def signals_held(to_the_end: bool = False) -> Iterator[None]:
    """Hold back signals that Python handles until the block has ended; then their handlers are called.

    Nothing is held outside the main thread, where Python gets no signals.

    Args:
        to_the_end: Hold a second Ctrl-C too. Otherwise it does not wait.
    """
    found = {number: signal.getsignal(number) for number in _HELD}
    usual = {number: handler for number, handler in found.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread() or not usual:
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and any(number == earlier for earlier, _ in waiting)
        waiting.append((number, frame))
        if again and not to_the_end:
            waiting.clear()
            usual[number](number, frame)

    for number in usual:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
        for number, frame in waiting:
            usual[number](number, frame)


class Gradients:
    """The parameters' `.grad`: what was there is set aside, and added to only when all went well."""

    def __init__(self, params: Sequence[Tensor], overwritten: bool) -> None:
        """Take note of what is there; nothing is changed yet.

        Args:
            params: The parameters that receive gradients.
            overwritten: Whether the tensors in `.grad` are written to before all has gone well, as
                DistributedDataParallel does whose buckets they are: then copies are kept too.
        """
        self._params = list(params)
        self._before = [p.grad for p in params]
        self._copies = [g.detach().clone() if overwritten and g is not None else None for g in self._before]
        self._joined = False

    def set_aside(self) -> None:
        """Begin with no gradients, so that this call's are its own."""
        for p in self._params:
            p.grad = None

    def include(self, leaf: Tensor) -> None:
        """Count in a leaf that turned up later, before anything was accumulated in it."""
        if not any(leaf is p for p in self._params):
            self._params.append(leaf)
            self._before.append(leaf.grad)
            self._copies.append(None)
            leaf.grad = None

    @torch.no_grad()
    def scale(self, factor: float | Tensor) -> None:
        """Multiply what this call has accumulated so far."""
        for p in self._params:
            if p.grad is not None:
                p.grad.mul_(factor.to(p.grad.device) if isinstance(factor, Tensor) else factor)

    @torch.no_grad()
    def join(self) -> None:
        """Add what was there now, so that the reduction that follows averages it too, as it would in plain training."""
        self._joined = True
        for p, before in zip(self._params, self._before, strict=True):
            if before is not None:
                p.grad = before.detach().clone() if p.grad is None else p.grad.add_(before)

    @torch.no_grad()
    def commit(self) -> None:
        """All went well: the tensors that were there hold the sum."""
        for p, before in zip(self._params, self._before, strict=True):
            if before is None or p.grad is before:
                continue
            if p.grad is not None:
                before.copy_(p.grad) if self._joined else before.add_(p.grad)
            p.grad = before

    @torch.no_grad()
    def roll_back(self) -> None:
        """Something went wrong: `.grad` is what it was."""
        for p, before, values in zip(self._params, self._before, self._copies, strict=True):
            if before is not None and values is not None:
                before.copy_(values)
            p.grad = before
