"""Faults put into a step: at an operation of torch, or as a signal or an error at a line of the package."""

import copy
import signal
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import msam

PACKAGE = str(Path(msam.__file__).parent)


class Injected(Exception):
    """The fault."""


class FaultAt(TorchDispatchMode):
    """Raises instead of the operation of this number; counts them all."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 == self.number:
            raise Injected(str(function))
        return function(*args, **(kwargs or {}))


class AtLine:
    """Acts as the line of this number of the package is reached, once; counts them all."""

    def __init__(self, number: int | None, act) -> None:
        self.number, self.act, self.count, self.done = number, act, 0, False

    def _trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            if self.count - 1 == self.number and not self.done:
                self.done = True
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                self.act()
        return self._trace

    def __enter__(self):
        self.usual = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.usual)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def fail():
    raise Injected("at a line")


class Watched:
    """A model, and all that a step may change of it."""

    def __init__(self, model):
        self.model = model
        self.grads = [p.grad for p in model.parameters()]
        self.before = self._seen()

    def _seen(self):
        grads = [p.grad for p in self.model.parameters()]
        flags = [getattr(module, "sparse", None) for module in self.model.modules()]
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(([t.detach() for t in tensors], [g if g is None else g.detach() for g in grads], flags))

    def unchanged(self):
        """Whether everything is as it was, and `.grad` the very tensors."""
        same = all(p.grad is g for p, g in zip(self.model.parameters(), self.grads, strict=True))
        return same and self._equal(self._seen(), self.before)

    def committed(self, other):
        """Whether everything is as it is in a twin that has taken the step."""
        same = all(g is None or p.grad is g for p, g in zip(self.model.parameters(), self.grads, strict=True))
        return same and self._equal(self._seen(), Watched(other).before)

    @staticmethod
    def _equal(a, b):
        pairs = zip(a[0] + a[1], b[0] + b[1], strict=True)
        alike = all(t is None if s is None else t is not None and torch.equal(s, t) for s, t in pairs)
        return alike and a[2] == b[2]
