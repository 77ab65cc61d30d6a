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

SWAPS = {"transpose", "transpose_", "swapaxes", "swapdims"}
REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "prod", "std", "var", "norm", "vector_norm", "logsumexp", "any", "all",
    "argmax", "argmin", "median", "nansum", "nanmean",
}  # fmt: skip
ORDER = {
    "flip", "roll", "sort", "argsort", "index_select", "gather", "take", "take_along_dim", "scatter", "scatter_add",
    "flipud", "rot90", "msort", "topk", "unique", "nonzero", "masked_select", "repeat", "tile", "select", "narrow",
    "unbind", "unfold", "as_strided", "cumsum", "index_add", "index_copy", "scatter_reduce", "cdist", "block_diag",
    "kron", "outer", "tensordot", "meshgrid", "vstack", "broadcast_tensors", "broadcast_to",
}  # fmt: skip
"""Functions that may change the order of the examples, or make others of them. Some can be told apart by their dim."""

JOINS = {"cat", "concat", "concatenate", "stack", "chunk", "split", "tensor_split"}
BY_DIM = {"unbind", "select", "narrow", "flip", "roll", "sort", "argsort", "topk", "index_select", "gather", "cumsum"}
BY_DIM |= {"index_add", "index_copy", "scatter", "scatter_add", "unfold", "take_along_dim"}

PLACES = dict.fromkeys(("chunk", "split", "tensor_split", "roll", "take_along_dim"), (2, 0))
PLACES |= {"sort": (1, -1), "argsort": (1, -1), "topk": (2, -1)}
"""Where a function's dim stands among its arguments, and what it is if it is left out; (1, 0) for others."""


@dataclass(frozen=True)
class Examples:
    """Where the examples lie."""

    dim: int | None
    """None if it is not known."""


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
        return isinstance(origin, Examples) and origin.dim == 0 and bool(t.dim()) and len(t) % self._count == 0

    def follow(self, func: Callable[..., Any], values: Mapping[Any, Any], results: Iterable[Tensor]) -> None:
        """Take note of what the results of a function of no parameters come from."""
        inputs = list(tensors_in(values))
        origins = [self.of(t) for t in inputs]
        examples = [(t, o.dim) for t, o in zip(inputs, origins, strict=True) if isinstance(o, Examples)]
        if not examples:
            if all(o == "constant" for o in origins):
                for result in results:
                    self.note(result, "constant")
            return
        for result in results:
            self.note(result, Examples(self._dim(name_of(func), values, examples, result)))

    def _dim(
        self, name: str, values: Mapping[Any, Any], examples: Sequence[tuple[Tensor, int | None]], result: Tensor
    ) -> int | None:
        dims = {dim for _, dim in examples}
        if len(dims) > 1 or None in dims or not result.dim():
            return None
        t, d = examples[0]
        assert d is not None
        moved = _moved(name, values, t, d, result)
        if moved is not _UNMOVED:
            return moved
        if d == 0 and not len(result) % self._count:
            return 0 if _keeps_first(name, values, t, result) else None
        return d if result.shape == t.shape and name not in ORDER | JOINS | {"__getitem__"} else None


_UNMOVED: Any = object()


def _moved(name: str, values: Mapping[Any, Any], t: Tensor, d: int, result: Tensor) -> Any:
    """Where a function that moves dimensions puts the one of the examples; `_UNMOVED` if it moves none."""
    n = t.dim()
    if name in SWAPS:
        a, b = (_number(values, place, f"dim{place - 1}") % n for place in (1, 2))
        return {a: b, b: a}.get(d, d)
    if name in ("T", "mT", "mH", "H", "t", "adjoint"):
        if n < 2:
            return d
        return n - 1 - d if name in ("T", "t") else {n - 1: n - 2, n - 2: n - 1}.get(d, d)
    if name == "permute":
        order = values.get(1, values.get("dims"))
        order = list(order) if isinstance(order, Sequence) else [values[slot] for slot in range(1, n + 1)]
        return [place % n for place in order].index(d)
    if name in ("movedim", "moveaxis"):
        source, target = values.get(1, values.get("source")), values.get(2, values.get("destination"))
        if not isinstance(source, int) or not isinstance(target, int):
            return None
        order = [place for place in range(n) if place != source % n]
        order.insert(target % n, source % n)
        return order.index(d)
    if name == "unsqueeze":
        place = _number(values, 1, "dim") % (n + 1)
        return d + (place <= d)
    if name in ("squeeze", "expand", "expand_as") and d == 0:
        return result.dim() - n if name != "squeeze" and result.dim() > n else 0 if len(result) == len(t) else None
    return _UNMOVED


def _keeps_first(name: str, values: Mapping[Any, Any], t: Tensor, result: Tensor) -> bool:
    """Whether the examples still lie first in a result that has as many rows or a multiple, in their order."""
    if name == "__getitem__":
        index = values.get(1)
        first = index[0] if isinstance(index, tuple) and index else index
        return first is Ellipsis or first == slice(None) if isinstance(first, slice | type(Ellipsis)) else False
    if name in REDUCTIONS:
        dims = values.get(1, values.get("dim", values.get("axis")))
        if name in ("norm", "vector_norm"):
            dims = values.get(2, values.get("dim"))
        dims = [dims] if isinstance(dims, int) else dims
        return isinstance(dims, Sequence) and bool(dims) and all(dim % t.dim() for dim in dims)
    if name in JOINS or name in BY_DIM:
        place, usual = PLACES.get(name, (1, 0))
        dims = values.get("dim", values.get("dims", values.get(place, usual)))
        dims = dims if isinstance(dims, int | tuple | list) else usual
        dims = [dims] if isinstance(dims, int) else dims or [0]
        return all(dim % max(result.dim(), t.dim(), 1) for dim in dims)
    if name in ORDER:
        return False
    if name == "einsum":
        equation = values.get(0)
        if not isinstance(equation, str) or "->" not in equation:
            return False
        terms, output = equation.replace(" ", "").split("->")
        return bool(output) and all(term[:1] == output[0] for term in terms.split(","))
    if name in ("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view"):
        return True
    return len(result) == len(t) and result.dim() >= t.dim()


def _number(values: Mapping[Any, Any], place: int, name: str) -> int:
    value = values.get(place, values.get(name, values.get(f"axis{name[3:]}", 0)))
    return value if isinstance(value, int) else 0


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
