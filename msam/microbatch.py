"""Splitting a mini-batch into disjoint micro-batches."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def split(batch: Any, micro_batches: int) -> list[Any]:
    """Split a mini-batch into near-equal, disjoint micro-batches, in order.

    Sizes differ by one at most: 10 examples in 4 micro-batches make 3, 3, 2, 2 (`torch.chunk` would make
    3, 3, 3, 1, and for some sizes fewer than asked).

    Args:
        batch: A tensor, or dicts, lists, tuples (named ones too) and dataclasses of tensors, nested as you
            like. All tensors share their first dimension, the examples; anything else in it (a string, None,
            a number) is given to every micro-batch.
        micro_batches: m >= 1. A batch of fewer examples than m is split into single examples.

    Returns:
        The micro-batches, each of the batch's own structure. Tensors are views, not copies.

    Raises:
        ValueError: if m is below 1, or the batch has no example or no tensor, or its tensors disagree about
            the number of examples.

    >>> import torch
    >>> [part.tolist() for part in split(torch.arange(5), 2)]
    [[0, 1, 2], [3, 4]]
    """
    check_micro_batches(micro_batches)
    parts = min(micro_batches, examples(batch))
    return [_part(batch, index, parts) for index in range(parts)]


def examples(batch: Any) -> int:
    """How many examples a batch holds: the first dimension that its tensors share.

    Raises:
        ValueError: as `split` does.
    """
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in _tensors(batch)}
    if not sizes:
        raise ValueError(f"The batch ({type(batch).__name__}) holds no tensor, so it cannot be split by example.")
    if len(sizes) > 1 or None in sizes:
        found = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(batch))
        raise ValueError(
            f"The batch's tensors must share their first dimension, the examples; their shapes are {found}."
        )
    (size,) = sizes
    if not size:
        raise ValueError("The batch holds no example: skip empty batches.")
    return size


def fresh(batch: Any) -> Any:
    """The same tensors in containers of its own, so that a `loss_fn` may pop from them."""
    children = _children(batch)
    if children is None:
        return batch
    pieces = [fresh(child) for child in children]
    if any(a is not b for a, b in zip(children, pieces, strict=True)):
        return _rebuilt(batch, pieces)
    return copy.copy(batch) if isinstance(batch, list | Mapping) else batch


def check_micro_batches(micro_batches: object) -> None:
    """Refuse anything but an integer m >= 1.

    Raises:
        ValueError: with what was given.
    """
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int) or micro_batches < 1:
        raise ValueError(
            f"micro_batches is {micro_batches!r}, but must be a whole number of micro-batches, 1 (SAM) or more."
        )


def _children(batch: Any) -> list[Any] | None:
    """The values one level down, or None for a leaf."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, list | tuple):
        return list(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return None


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    for child in _children(batch) or ():
        yield from _tensors(child)


def _part(batch: Any, index: int, parts: int) -> Any:
    """Micro-batch `index` of `parts`, in the structure of `batch`."""
    if isinstance(batch, Tensor):
        return batch.tensor_split(parts)[index]
    children = _children(batch)
    if children is None:
        return batch
    return _rebuilt(batch, [_part(child, index, parts) for child in children])


def _rebuilt(batch: Any, pieces: list[Any]) -> Any:
    """A container of the batch's type with other values."""
    kind = type(batch)
    if isinstance(batch, Mapping):
        pairs = dict(zip(batch, pieces, strict=True))
        return pairs if kind is dict else kind(pairs)
    if isinstance(batch, list | tuple):
        return kind(*pieces) if hasattr(batch, "_fields") else kind(pieces)
    names = [field.name for field in dataclasses.fields(batch)]
    return dataclasses.replace(batch, **dict(zip(names, pieces, strict=True)))
