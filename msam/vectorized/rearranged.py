"""Calls that are done by micro-batch as other calls: with the examples first, or with parameters made one for each.

`Caller` is what answers a call of torch, `msam.vectorized.passes.Vectorized` in one pass.
"""

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msam.vectorized.origins import Examples, Origins, name_of
from msam.vectorized.places import BROADCASTS
from msam.vectorized.plans import ARITHMETIC, JOINS, MATRICES, argument

Caller = Callable[[Callable[..., Any], dict[Any, Any]], Any]

_ATTENTION = F.multi_head_attention_forward
ATTENTION = FunctionType(
    _ATTENTION.__code__,
    {**_ATTENTION.__globals__, "has_torch_function": lambda _: False},
    _ATTENTION.__name__,
    _ATTENTION.__defaults__,
)
"""torch's own function, as the calls that it makes: it no longer asks whether somebody stands in for it as a whole."""

SEVERAL = {F.scaled_dot_product_attention} | JOINS


def examples_first(func: Callable[..., Any], values: dict[Any, Any], origins: Origins, call: Caller) -> Any:
    """A function of the last dimensions, where the examples lie along one of the others, or several times over.

    Returns:
        Its result, with the examples where they were; NotImplemented if it is nothing of the kind.
    """
    slots = [slot for slot, t in values.items() if isinstance(t, Tensor) and isinstance(origins.of(t), Examples)]
    if len(slots) != 1:
        return NotImplemented
    x, trailing = values[slots[0]], _trailing(func, values, slots[0])
    d, outer = origins.of(x).dim, origins.of(x).outer
    if trailing is None or d is None or (d, outer) == (0, 1) or d >= x.dim() - trailing:
        return NotImplemented
    first = x.unflatten(d, (outer, -1)).movedim(d + 1, 0)
    origins.note(first, Examples(0))
    y = call(func, values | {slots[0]: first})
    if not origins.lies_first(y):
        return NotImplemented
    back = y.movedim(0, d + 1).flatten(d, d + 1).contiguous()
    origins.note(back, Examples(d, outer))
    return back


def _trailing(func: Callable[..., Any], values: Mapping[Any, Any], slot: Any) -> int | None:
    """How many of the last dimensions a function acts along; None if that is not known."""
    if func in ARITHMETIC:
        other = values.get(1 - slot) if slot in (0, 1) else None
        return other.dim() if isinstance(other, Tensor) else None
    if slot != 0:
        return None
    if func in (F.layer_norm, F.rms_norm):
        return len(argument(values, 1, "normalized_shape"))
    if func in MATRICES:
        return 1 if values[1].dim() == 2 else None
    return {F.linear: 1, F.embedding: 0}.get(func)


def one_for_each(
    func: Callable[..., Any],
    values: dict[Any, Any],
    origins: Origins,
    is_parameter: Callable[[Tensor], bool],
    call: Caller,
) -> Any:
    """A function of several tensors of examples and of parameters, which are first made one for each example.

    Returns:
        Its result; NotImplemented if it is nothing of the kind.
    """
    if func not in SEVERAL and name_of(func).strip("_") not in BROADCASTS:
        return NotImplemented
    tensors = [t for t in _flat(values) if isinstance(t, Tensor)]
    params = [t for t in tensors if is_parameter(t)]
    examples = [t for t in tensors if isinstance(origins.of(t), Examples)]
    x = max(examples, key=Tensor.dim, default=None)
    if x is None or not all(origins.lies_first(t) for t in examples):
        return NotImplemented
    aligned = func in SEVERAL or all(t.dim() == x.dim() for t in examples)
    if not aligned or not all(p.dim() < x.dim() or (p.dim() == x.dim() and len(p) in (1, len(x))) for p in params):
        return NotImplemented
    zeros = x.new_zeros((len(x),) + (1,) * (x.dim() - 1), dtype=params[0].dtype)
    origins.note(zeros, Examples(0))
    made = {id(p): call(torch.add, {0: zeros, 1: p}) for p in params}

    def replaced(value: Any) -> Any:
        return type(value)(map(replaced, value)) if type(value) in (list, tuple) else made.get(id(value), value)

    return call(func, {slot: replaced(value) for slot, value in values.items()})


def _flat(values: Mapping[Any, Any]) -> Sequence[Any]:
    return [t for value in values.values() for t in (value if isinstance(value, list | tuple) else [value])]
