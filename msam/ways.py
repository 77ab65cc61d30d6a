"""Which way of running micro-batches is the fastest for a model: measured once, with the caller's own mini-batch."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from msam.noise import Noise
from msam.parallel import compiled
from msam.state import State

Way = Literal["loop", "vectorized", "streams"]
WAYS: tuple[Way, ...] = get_args(Way)
"""How micro-batches run, in the order in which they are tried."""

WARM, TIMED = 1, 3
"""Steps of each way that are not timed, and that are."""

WORTH = 0.97
"""Another way than the loop must take less than this share of its time."""

MEMORY = 0.9
"""Share of a GPU's memory that a way may take at most."""


class NoWholeBatch(ValueError):
    """A way needs the mini-batch itself, and the caller has given its parts."""


@dataclass(frozen=True)
class Measured:
    """What a measurement found.

    Attributes:
        fastest: The way to take.
        seconds: Median time of a step for each way that can be taken.
        refused: Why the others cannot.
    """

    fastest: Way
    seconds: dict[Way, float]
    refused: dict[Way, str]


_measured: WeakKeyDictionary[nn.Module, dict[Any, Measured]] = WeakKeyDictionary()


def measured(model: nn.Module) -> list[Measured]:
    """What `passes="auto"` has found for a model so far, for each m and kind of perturbation it was called with."""
    return list(_measured.get(model, {}).values())


class Rehearsal:
    """Steps that leave nothing behind: gradients, state and random numbers are put back.

    Args:
        model: The network.
        params: Its trained parameters.
        state: Further modules whose state a step moves.
        generators: Further generators that it draws from.
    """

    def __init__(
        self, model: nn.Module, params: Sequence[Tensor], state: Sequence[nn.Module], generators: Sequence[Any]
    ) -> None:
        self.model, self.params = model, params
        self._state, self._generators = state, generators

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Whatever steps in the block leave behind is undone."""
        grads = [p.grad for p in self.params]
        kept = State([self.model, *self._state], self.params, lazily=not compiled(self.model))
        before, noise = kept.taken("rehearsal"), Noise(self.model, self.params, self._generators).draws()
        try:
            yield
        finally:
            kept.put_back(before)
            noise.rewind()
            for p, g in zip(self.params, grads, strict=True):
                p.grad = g


def fastest(step: Callable[..., Any], rehearsal: Rehearsal, key: Any) -> Way:
    """The fastest way, measured at the first call for a model and a key.

    Args:
        step: Takes a step, in the way that it is given as `passes`.
        rehearsal: Of the model.
        key: What the time depends on, besides the mode (train or eval).
    """
    known = _measured.setdefault(rehearsal.model, {})
    key = key, rehearsal.model.training
    if key not in known:
        with rehearsal.undone():
            known[key] = _measure(step, rehearsal.params)
    return known[key].fastest


def _measure(step: Callable[..., Any], params: Sequence[Tensor]) -> Measured:
    device = params[0].device
    seconds: dict[Way, float] = {}
    refused: dict[Way, str] = {}
    for way in WAYS:
        if way == "streams" and device.type != "cuda":
            refused[way] = f"a {device.type} has no streams"
            continue
        try:
            seconds[way] = _seconds(step, way, params)
        except (NotImplementedError, NoWholeBatch) as error:
            refused[way] = str(error)
        except torch.OutOfMemoryError:
            if way == "loop":
                raise
            refused[way] = "out of memory"
    best = min(seconds, key=lambda way: seconds[way] if way == "loop" else seconds[way] / WORTH)
    return Measured(best, seconds, refused)


def _seconds(step: Callable[..., Any], way: Way, params: Sequence[Tensor]) -> float:
    """The median time of a step."""
    device, times = params[0].device, []
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(WARM + TIMED):
        for p in params:
            p.grad = None
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step(passes=way)
        if on_gpu:
            torch.cuda.synchronize(device)
        if number >= WARM:
            times.append(time.perf_counter() - start)
    if on_gpu and way != "loop":
        total = torch.cuda.get_device_properties(device).total_memory
        if torch.cuda.max_memory_allocated(device) > MEMORY * total:
            raise torch.OutOfMemoryError
    return median(times)
