"""All or nothing: what `backward` leaves behind when something goes wrong, or when Ctrl-C is pressed."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold SIGINT back until the block has ended; a second one does not wait.

    Where Python gets no signals (outside the main thread) or SIGINT is not Python's to handle, nothing is held.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    waiting = []

    def hold(number: int, frame: object) -> None:
        waiting.append((number, frame))
        if len(waiting) > 1:
            waiting.clear()
            usual(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if waiting:
            usual(*waiting[0])


class Gradients:
    """The parameters' `.grad`: what was there is set aside, and added to only when all went well."""

    def __init__(self, params: Sequence[Tensor], shared: bool) -> None:
        """Take note of what is there; nothing is changed yet.

        Args:
            params: The parameters that receive gradients.
            shared: Whether a reducer may write to the tensors in `.grad`, as DistributedDataParallel does
                when its buckets are the gradients: then a copy is kept too.
        """
        self._params = params
        self._before = [p.grad for p in params]
        self._copies = [g.detach().clone() if shared and g is not None else None for g in self._before]
        self._joined = False

    def set_aside(self) -> None:
        """Begin with no gradients, so that this call's are its own."""
        for p in self._params:
            p.grad = None

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
            if values is not None:
                before.copy_(values)
            p.grad = before
