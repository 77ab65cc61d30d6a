"""All or nothing: what `backward` leaves behind when something goes wrong, or when a signal arrives.

A `transaction` surrounds a step. Whatever is changed in it can be undone until the very end, when `.grad` takes on the
sum. Signals that Python handles are taken over for the length of the transaction: they are delivered where the weights
are w, in `Signals.heard`, and wait everywhere else. Once one has raised an exception, none is delivered until all is
put back. So Ctrl-C finds a step undone or finished, at whichever line it arrives.
"""

import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGHUP", "SIGXCPU", "SIGQUIT")
_HELD = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
"""Ctrl-C, the signals whose handlers write checkpoints where jobs are preempted, and those of timers and limits."""

_in_use: set[int] = set()
"""Ids of the parameters that a step works on now."""


class Signals:
    """The signals of a step. Nothing is taken over outside the main thread, where Python gets no signals."""

    def __init__(self) -> None:
        self._usual: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._waiting: list[tuple[int, FrameType | None]] = []
        self._heard = False
        self._second_is_heard = False

    def take_over(self) -> None:
        """Install a handler that knows when to wait: Ctrl-C first, after which nothing can interrupt."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _HELD:
            handler = signal.getsignal(number)
            if callable(handler):
                self._usual[number] = handler
                signal.signal(number, self._arrived)

    def give_back(self) -> None:
        """Put the usual handlers back, Ctrl-C's last, and deliver what has waited."""
        try:
            for number in reversed(self._usual):
                if signal.getsignal(number) == self._arrived:  # else loss_fn has installed one
                    signal.signal(number, self._usual[number])
        finally:
            self._deliver_all()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """In the block signals are delivered as they arrive, those that have waited at once."""
        self._heard = True
        try:
            self._deliver()
            yield
        finally:
            self._heard = False

    def deliver_waiting(self) -> None:
        """Deliver the signals that have waited."""
        with self.heard():
            pass

    @contextmanager
    def heard_twice(self) -> Iterator[None]:
        """In the block a second Ctrl-C does not wait."""
        self._second_is_heard = True
        try:
            yield
        finally:
            self._second_is_heard = False

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT and any(number == earlier for earlier, _ in self._waiting)
        self._waiting.append((number, frame))
        if self._heard or (again and self._second_is_heard):
            self._deliver()

    def _deliver(self) -> None:
        """Call the usual handlers. Should one raise, nothing more is heard."""
        heard, self._heard = self._heard, False
        twice, self._second_is_heard = self._second_is_heard, False
        while self._waiting:
            number, frame = self._waiting.pop(0)
            if number == signal.SIGINT:
                self._waiting[:] = [other for other in self._waiting if other[0] != number]
            self._usual[number](number, frame)
        self._heard, self._second_is_heard = heard, twice

    def _deliver_all(self) -> None:
        try:
            self._deliver()
        finally:
            if self._waiting:
                self._deliver_all()


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
        self._sum: list[Tensor | None] = []
        self._into: list[tuple[Tensor, int]] = []

    @property
    def added(self) -> bool:
        """Whether the sum is written, so that nothing is left but to finish."""
        return any(before._version != version for before, version in self._into[:1])

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

    def noted(self) -> list[tuple[Tensor | None, int]]:
        """What is in `.grad` now."""
        return [(g, 0 if g is None else g._version) for g in [p.grad for p in self._params]]

    def versions(self) -> list[int]:
        """How often each parameter has been written to."""
        return [0 if p.is_inference() else p._version for p in self._params]

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
        """All went well: the tensors that were there hold the sum.

        The sum is written by one call of torch, which is done or not. A tensor that cannot be written to, or not by
        what is added, is replaced.
        """
        into, added = [], []
        for p, before in zip(self._params, self._before, strict=True):
            g = p.grad
            if before is None or g is before or g is None:
                self._sum.append(g if before is None else before)
            elif _takes(before, g):
                self._sum.append(before)
                into.append(before)
                added.append(g)
            else:
                self._sum.append(g if self._joined else _dense_first(before, g))
        if into:
            write = torch._foreach_copy_ if self._joined else torch._foreach_add_
            self._into = [(before, before._version) for before in into[:1]]
            write(into, added)
        self.finish()

    def finish(self) -> None:
        """What is to be done once the sum is written."""
        for p, g in zip(self._params, self._sum, strict=True):
            p.grad = g

    @torch.no_grad()
    def roll_back(self) -> None:
        """Something went wrong: `.grad` is what it was."""
        for p, before, values in zip(self._params, self._before, self._copies, strict=True):
            if before is not None and values is not None:
                before.copy_(values)
            p.grad = before


def _takes(before: Tensor, g: Tensor) -> bool:
    """Whether torch adds g in place: not to inference tensors, nor where elements share memory."""
    if before.is_inference():
        return False
    return not expanded(before) if before.layout is torch.strided else before.layout == g.layout


def _dense_first(a: Tensor, b: Tensor) -> Tensor:
    return a + b if a.layout is torch.strided else b + a


def expanded(t: Tensor) -> bool:
    """Whether several elements share one place, so that torch writes to none of them."""
    return t.layout is torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)
    )


@contextmanager
def transaction(
    params: Sequence[Tensor], gradients: Gradients, undo: Sequence[Callable[[], object]]
) -> Iterator[Signals]:
    """The block changes all or nothing.

    Args:
        params: The parameters that it works on. No other transaction may work on them meanwhile.
        gradients: Their `.grad`, which is committed when the block has ended.
        undo: What puts everything else back, in this order. Each is called if anything goes wrong, and must then do
            nothing where nothing has changed.

    Yields:
        The signals.

    Raises:
        RuntimeError: if another transaction works on one of the parameters.
    """
    numbers = {id(p) for p in params}
    if not _in_use.isdisjoint(numbers):
        raise RuntimeError(
            "msam.backward is called for a model while another call works on it: call it outside of loss_fn, "
            "and from one thread at a time."
        )
    signals = Signals()
    try:
        yield from _alone(numbers, signals, gradients, undo)
    finally:  # once more, should an error have arisen there
        _in_use.difference_update(numbers)
        signals.give_back()


def _alone(
    numbers: set[int], signals: Signals, gradients: Gradients, undo: Sequence[Callable[[], object]]
) -> Generator[Signals, None, None]:
    try:
        signals.take_over()
        _in_use.update(numbers)
        yield from _all_or_nothing(signals, gradients, undo)
    finally:
        _in_use.difference_update(numbers)
        signals.give_back()


def _all_or_nothing(
    signals: Signals, gradients: Gradients, undo: Sequence[Callable[[], object]]
) -> Generator[Signals, None, None]:
    """What is undone if anything goes wrong before the sum is written."""
    try:
        gradients.set_aside()
        yield signals
        signals.deliver_waiting()
        gradients.commit()
    except BaseException as error:
        if gradients.added:
            gradients.finish()
            raise
        for action in (*undo, gradients.roll_back):
            try:
                action()
            except Exception as another:
                error.add_note(f"While msam.backward put everything back: {type(another).__name__}: {another}")
        raise
