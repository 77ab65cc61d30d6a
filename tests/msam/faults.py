"""Faults put into a step: at an operation of torch, or as a signal or an error at a line of the package."""

import copy
import linecache
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
    """Acts as the line of this number of the package is reached, once; notes them all.

    Lines on which nothing happens that could go wrong do not count: `try:`, `pass`, and a `with` as its block is left.
    """

    def __init__(self, number: int | None, act) -> None:
        self.number, self.act, self.lines, self.done = number, act, [], False
        self.entered = {}

    def numbers(self):
        """Those of the first, second and last time that each line was reached: loops repeat the rest."""
        at = {}
        for number, line in enumerate(self.lines):
            at.setdefault(line, []).append(number)
        return sorted({number for numbers in at.values() for number in (*numbers[:2], numbers[-1])})

    def _trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not self._idle(frame):
            self.lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(self.lines) - 1 == self.number and not self.done:
                self.done = True
                self.act()
        return self._trace

    def _idle(self, frame):
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if not text.startswith("with "):
            return text in ("try:", "pass", "finally:", "else:")
        entered = self.entered.setdefault(frame, set())
        entered ^= {frame.f_lineno}
        return frame.f_lineno not in entered

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
