"""What the tensors of a forward pass come from: examples, constants, or parameters. Lengths do not tell.

For what comes from examples, the dimension along which they lie is followed through the functions that move it. Where
it lies first, each example has the same number of rows there, in the batch's order. Where a function may have mixed
examples or changed their order, it is unknown, and nothing that meets a parameter there is done by micro-batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor

from msam.vectorized.places import place


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


class Origins:
    """What is known of the tensors of one pass.

    Args:
        examples: How many there are.
        batch: Tensors of the batch.
        constants: Tensors that are the same for every batch: buffers.
    """

    def __init__(self, examples: int, batch: Iterable[Tensor], constants: Iterable[Tensor]) -> None:
        self._count = examples
        self._known: dict[int, tuple[ref[Tensor], Any]] = {}
        self._start = [(t, Examples(0)) for t in batch] + [(t, "constant") for t in constants]
        self.begin()

    def begin(self) -> None:
        """Forget the pass before."""
        self._known = {id(t): (ref(t), origin) for t, origin in self._start}

    def of(self, t: Any) -> Any:
        """`Examples`, `Derived`, "constant", or None where it is not known."""
        known = self._known.get(id(t))
        return known[1] if known is not None and known[0]() is t else None

    def note(self, t: Tensor, origin: Any) -> None:
        """Take note of a result."""
        self._known[id(t)] = ref(t), origin

    def lies_first(self, t: Any) -> bool:
        """Whether a tensor comes from examples, which lie along its first dimension."""
        origin = self.of(t)
        return isinstance(origin, Examples) and origin.dim == 0 and origin.outer == 1 and len(t) % self._count == 0

    def follow(self, func: Callable[..., Any], values: Mapping[Any, Any], results: Iterable[Tensor]) -> None:
        """Take note of what the results of a function of no parameters come from."""
        inputs = list(tensors_in(values))
        origins = [self.of(t) for t in inputs]
        places = [(t, o) for t, o in zip(inputs, origins, strict=True) if isinstance(o, Examples)]
        if not places:
            if all(o == "constant" for o in origins):
                for result in results:
                    self.note(result, "constant")
            return
        for result in results:
            self.note(result, self._examples(func, values, places, result))

    def _examples(
        self,
        func: Callable[..., Any],
        values: Mapping[Any, Any],
        inputs: Sequence[tuple[Tensor, Examples]],
        result: Tensor,
    ) -> Examples:
        known = [(t, (origin.dim, origin.outer)) for t, origin in inputs if origin.dim is not None]
        found = place(name_of(func), values, known, result, self._count) if len(known) == len(inputs) else None
        return UNKNOWN if found is None else Examples(*found)


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
