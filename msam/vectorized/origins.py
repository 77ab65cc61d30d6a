"""What the tensors of a forward pass come from: examples, constants, or parameters. Lengths do not tell.

For what comes from examples, the dimension along which they lie is followed through the functions that move it. Where
it lies first, each example has the same number of rows there, in the batch's order. Where a function may have mixed
examples or changed their order, it is unknown, and nothing that meets a parameter there is done by micro-batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._C import DisableTorchFunction

from msam.vectorized.places import EXPANDS, MOVES, RESHAPES, SWAPS, indexed, place


@dataclass(frozen=True)
class Examples:
    """Where the examples lie.

    Attributes:
        dim: The dimension; None if it is not known.
        outer: How many times over they lie there, one after the other: of a dimension of `outer` * B * k rows, row r
            belongs to example (r // k) % B.
    """

    dim: int | None
    outer: int = 1


UNKNOWN = Examples(None)


class Derived:
    """A function of parameters and constants, to be worked out at other weights.

    Args:
        func: The function.
        values: Its arguments by place or name. Parameters and what derives from them are in there by their ids.
        inputs: What these ids stand for.
        index: Which of several results.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        values: Mapping[Any, Any],
        inputs: Mapping[int, "Tensor | Derived"],
        index: int | None,
    ) -> None:
        self._func, self._values, self._inputs, self._index = func, dict(values), dict(inputs), index
        self.roots: dict[int, Tensor] = {}
        for number, value in inputs.items():
            self.roots |= value.roots if isinstance(value, Derived) else {number: value}

    def at(self, weights: Mapping[int, Tensor]) -> Tensor:
        """Its value at these weights, by the parameters' ids."""
        known: dict[int, Tensor] = {}

        def worked_out(value: Any) -> Any:
            number = id(value)
            if number not in self._inputs:
                return type(value)(map(worked_out, value)) if type(value) in (list, tuple) else value
            if number not in known:
                made = self._inputs[number]
                known[number] = made.at(weights) if isinstance(made, Derived) else weights[number]
            return known[number]

        result = call(self._func, {slot: worked_out(value) for slot, value in self._values.items()})
        return result if self._index is None else result[self._index]


@dataclass(frozen=True)
class Numbers:
    """Constants: along this dimension lie the numbers of the examples, 0 to B - 1, as `torch.arange(B)` makes them."""

    dim: int
    outer: int = 1


class Origins:
    """What is known of the tensors of one pass: `Examples`, `Derived`, `Numbers`, "constant", or nothing.

    Args:
        examples: How many there are.
        batch: Tensors of the batch.
        constants: Tensors that are the same for every batch: buffers.
    """

    def __init__(self, examples: int, batch: Iterable[Tensor], constants: Iterable[Tensor]) -> None:
        self._count = examples
        self._known: dict[int, tuple[ref[Tensor], Any, int]] = {}
        self._start = [(t, Examples(0)) for t in batch] + [(t, "constant") for t in constants]
        self._written: dict[int, tuple[int, Any]] = {}
        """When memory was last written to by a function that may have changed what it comes from, and the memory."""
        self._now = 0
        self.begin()

    def begin(self) -> None:
        """Forget the pass before."""
        self._now = 0
        self._written.clear()
        self._known = {id(t): (ref(t), origin, 0) for t, origin in self._start}

    def of(self, t: Any) -> Any:
        """`Examples`, `Derived`, `Numbers`, "constant", or None where it is not known."""
        known = self._known.get(id(t))
        if not isinstance(t, Tensor) or known is None or known[0]() is not t:
            return None
        if self._written and _has_memory(t):
            written, _ = self._written.get(t.untyped_storage()._cdata, (0, None))
            if written > known[2]:
                return UNKNOWN if isinstance(known[1], Examples) else None
        return known[1]

    def note(self, t: Tensor, origin: Any) -> None:
        """Take note of a result."""
        self._known[id(t)] = ref(t), origin, self._now

    def lies_first(self, t: Any) -> bool:
        """Whether a tensor comes from examples, which lie along its first dimension."""
        return self.of(t) == Examples(0) and len(t) % self._count == 0

    def follow(self, func: Callable[..., Any], values: Mapping[Any, Any], results: Iterable[Tensor]) -> None:
        """Take note of what the results of a function of no parameters come from."""
        name, inputs = name_of(func), list(tensors_in(values))
        origins = [self.of(t) for t in inputs]
        places = [(t, o) for t, o in zip(inputs, origins, strict=True) if isinstance(o, Examples)]
        numbers = [(t, (o.dim, o.outer)) for t, o in zip(inputs, origins, strict=True) if isinstance(o, Numbers)]
        for result in results:
            if name.startswith("new_"):
                self.note(result, "constant")
            elif places:
                self.note(result, self._examples(name, values, places, numbers, result))
            elif all(is_constant(o) for o in origins):
                self.note(result, self._numbers(name, values, numbers, result))

    def write(self, func: Callable[..., Any], values: Mapping[Any, Any], written: Sequence[Tensor]) -> None:
        """Take note of a function of no parameters that has written to tensors, and to all that shares their memory."""
        origins = [self.of(t) for t in tensors_in(values)]
        before = [self.of(t) for t in written]
        if all(is_constant(o) for o in origins):
            after: list[Any] = ["constant" for _ in written]
        elif name_of(func) == "__setitem__":
            after = [self._set(values)]
        else:
            self.follow(func, values, written)
            after = [self.of(t) for t in written]
        if before == after and None not in after and UNKNOWN not in after:
            return
        self._now += 1
        for t, origin in zip(written, after, strict=True):
            if _has_memory(t):
                self._written[t.untyped_storage()._cdata] = self._now, t.untyped_storage()
            self.note(t, origin if origin is not None else UNKNOWN)

    def _examples(
        self,
        name: str,
        values: Mapping[Any, Any],
        inputs: Sequence[tuple[Tensor, Examples]],
        numbers: Sequence[tuple[Tensor, tuple[int, int]]],
        result: Tensor,
    ) -> Examples:
        known = [(t, (origin.dim, origin.outer)) for t, origin in inputs if origin.dim is not None]
        at = place(name, values, known, result, self._count, numbers) if len(known) == len(inputs) else None
        return UNKNOWN if at is None else Examples(*at)

    def _numbers(
        self, name: str, values: Mapping[Any, Any], inputs: Sequence[tuple[Tensor, tuple[int, int]]], result: Tensor
    ) -> Any:
        """Of a function of constants: the numbers of the examples, if it makes them or leaves them as they are."""
        if name == "arange":
            start = values.get("start", values.get(0)) if 1 in values or "end" in values else 0
            steps = values.get("step", values.get(2, 1))
            made = result.dim() == 1 and len(result) == self._count and (start or 0) == 0 and steps == 1
            return Numbers(0) if made else "constant"
        if len(inputs) != 1 or name.strip("_") not in LEFT_AS_THEY_ARE:
            return "constant"
        at = place(name, values, inputs, result, self._count)
        return "constant" if at is None else Numbers(*at)

    def _set(self, values: Mapping[Any, Any]) -> Examples:
        """Of `t[index] = value`: examples where those of the value went, if none or the same were there before."""
        t, index, value = values[0], values[1], values.get(2)
        origin, before = self.of(value), self.of(t)
        if not isinstance(origin, Examples):  # numbers or constants, into examples
            same = is_constant(origin) or not isinstance(value, Tensor)
            known = isinstance(before, Examples) and before.dim is not None
            whole = known and indexed(index, t.dim(), before.dim) is not None
            return before if same and whole else UNKNOWN
        if not isinstance(value, Tensor) or isinstance(index, Tensor) or origin.dim is None or origin.outer != 1:
            return UNKNOWN
        with DisableTorchFunction():
            target = t[index]
        at = target.dim() - value.dim() + origin.dim
        dims = [d for d in range(t.dim()) if indexed(index, t.dim(), d) == at]
        if len(dims) != 1 or t.shape[dims[0]] != value.shape[origin.dim]:
            return UNKNOWN
        after = Examples(dims[0])
        return after if before == after or is_constant(before) else UNKNOWN


LEFT_AS_THEY_ARE = MOVES.keys() | SWAPS | RESHAPES | EXPANDS | {
    "getitem", "to", "long", "int", "clone", "contiguous", "detach", "squeeze"
}  # fmt: skip
"""Functions that move elements, or copy them, and no more."""


def is_constant(origin: Any) -> bool:
    """Whether a tensor of this origin is the same for every example and at every weight."""
    return isinstance(origin, Numbers) or origin == "constant"


def _has_memory(t: Tensor) -> bool:
    return t.layout is torch.strided


def tensors_in(values: Mapping[Any, Any]) -> Iterable[Tensor]:
    """The tensors among a function's arguments, and in its lists."""
    for value in values.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (t for t in value if isinstance(t, Tensor))


def call(func: Callable[..., Any], values: Mapping[Any, Any]) -> Any:
    """A function of arguments by place or name."""
    named = {slot: value for slot, value in values.items() if isinstance(slot, str)}
    return func(*(values[slot] for slot in sorted(values.keys() - named)), **named)


def name_of(func: Callable[..., Any]) -> str:
    """A function's name; of what reads an attribute of a tensor, the attribute's."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name
