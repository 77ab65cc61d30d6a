"""Splitting a mini-batch into disjoint micro-batches.

What is split: tensors and NumPy arrays along their first dimension, and lists, tuples and other sequences with one
entry an example. What holds them is kept: dicts, tuples and lists of tensors, named tuples, dataclasses, and classes
that are registered with `torch.utils._pytree`. What is not by example (a string, None, a number, a list of another
length) is given to every micro-batch. What could be read in two ways is refused.
"""

import copy
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from msam.structure import (
    children_of,
    found,
    holds_tensors,
    is_array,
    is_leaf,
    is_plain_sequence,
    is_registered,
    is_tensor,
    is_tensor_like,
    named,
    rebuilt,
    signature,
)

READY = "give ready micro-batches instead: batch=None, micro_batches=[...], with loss_fn returning msam.Output"

Cut = tuple[int, int]
"""Where a micro-batch begins and ends."""


def split(batch: Any, micro_batches: int) -> list[Any]:
    """Split a mini-batch into near-equal, disjoint micro-batches, in order.

    Sizes differ by one at most: 10 examples in 4 micro-batches make 3, 3, 2, 2 (`torch.chunk` would make
    3, 3, 3, 1, and for some sizes fewer than asked).

    Args:
        batch: A tensor, or dicts, lists, tuples (named ones too), dataclasses and registered classes of tensors,
            nested as you like. All tensors share their first dimension, the examples. Lists, tuples and arrays
            without tensors are split like a tensor if they have an entry for each example. Lists of tensors of
            different shapes (images and their boxes, say) are split by entry, if all of them have one for each
            example. Anything else is given to every micro-batch.
        micro_batches: m >= 1. A batch of fewer examples than m is split into single examples. One micro-batch is
            the batch itself, whatever that is.

    Returns:
        The micro-batches, each of the batch's own structure. Tensors are views, not copies.

    Raises:
        ValueError: if m is below 1, or the batch has no example or no tensor, or its tensors disagree about
            the number of examples, or it holds anything that cannot be split or could be split in two ways.

    >>> import torch
    >>> [part.tolist() for part in split(torch.arange(5), 2)]
    [[0, 1, 2], [3, 4]]
    >>> split({"x": torch.zeros(2, 3), "text": ["one", "two"]}, 2)[1]["text"]
    ['two']
    """
    return split_with_sizes(batch, micro_batches)[0]


def split_with_sizes(batch: Any, micro_batches: Any) -> tuple[list[Any], list[int] | None]:
    """The micro-batches and how many examples each holds; None if the one there is cannot be counted."""
    m = whole_number(micro_batches)
    if m == 1:
        try:
            return [batch], [examples(batch)]
        except Uncountable:
            return [batch], None
    size, rows = _counted(batch)
    parts = min(m, size)
    each, more = divmod(size, parts)
    ends = list(itertools.accumulate(each + (number < more) for number in range(parts)))
    cuts = list(zip([0, *ends], ends, strict=False))
    return [_part(batch, cut, size, rows) for cut in cuts], [end - start for start, end in cuts]


def ready_sizes(parts: Sequence[Any]) -> list[int] | None:
    """How many examples each of some ready micro-batches holds; None if they cannot be counted alike.

    Lists of tensors of different lengths hold one entry an example.
    """
    ways: list[Callable[[Any], int]] = [_size_by_tensors, partial(_size_by_entries, ready=True)]
    if len({signature(part) for part in parts}) > 1:
        ways.reverse()
    for way in ways:
        try:
            return [_not_empty(way(part)) for part in parts]
        except Uncountable:
            continue
    return None


def examples(batch: Any) -> int:
    """How many examples a batch holds: the first dimension that its tensors share.

    Raises:
        ValueError: as `split` does.
    """
    return _counted(batch)[0]


def tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, those within objects that are not split too."""
    yield from found(batch, (Tensor,))


def versions(batch: Any) -> list[tuple[Tensor, int]]:
    """The tensors of a batch and their versions, which torch raises with each write."""
    return [(t, t._version) for t in tensors(batch) if not t.is_inference()]


def fresh(batch: Any) -> Any:
    """The same tensors in containers of its own, so that a `loss_fn` may pop from them."""
    children = children_of(batch)
    if children is None:
        return batch
    pieces = [fresh(child) for child in children]
    if is_registered(batch) or any(a is not b for a, b in zip(children, pieces, strict=True)):
        return rebuilt(batch, pieces)
    return copy.copy(batch) if isinstance(batch, list | Mapping) else batch


def whole_number(micro_batches: Any) -> int:
    """m, from a whole number of any type: of Python, of NumPy, or a tensor without dimensions.

    Raises:
        ValueError: for anything but an integer m >= 1, with what was given.
    """
    number = micro_batches
    if (
        isinstance(number, Tensor)
        and not number.dim()
        and not (number.is_floating_point() or number.dtype is torch.bool)
    ):
        number = number.item()
    if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
        raise ValueError(
            f"micro_batches is {micro_batches!r}, but must be a whole number of micro-batches, 1 (SAM) or more."
        )
    return operator.index(number)


class Uncountable(ValueError):
    """It is not known how many examples a batch holds."""


def _counted(batch: Any) -> tuple[int, bool]:
    """The number of examples, and whether lists of tensors hold an entry for each of them.

    Raises:
        ValueError: if there is none, or no one number.
    """
    try:
        return _not_empty(_size_by_tensors(batch)), False
    except Uncountable as error:
        try:
            return _not_empty(_size_by_entries(batch)), True
        except Uncountable:
            raise error from None


def _not_empty(size: int) -> int:
    if not size:
        raise ValueError("The batch holds no example: skip empty batches.")
    return size


def _size_by_tensors(batch: Any) -> int:
    """The first dimension that all tensors share; without tensors, the length that all arrays share, then all lists."""
    _check_kinds(batch)
    for leaves in (_sized(batch, is_tensor), _sized(batch, is_array), _sized(batch, is_plain_sequence)):
        sizes = {size for size, _ in leaves}
        if len(sizes) > 1 or None in sizes:
            shapes = ", ".join(str(shape) for _, shape in leaves)
            raise Uncountable(
                f"The batch's tensors must share their first dimension, the examples; their shapes are {shapes}."
            )
        if sizes:
            return sizes.pop()
    raise Uncountable(f"The batch ({type(batch).__name__}) holds no tensor, so it cannot be split by example.")


def _size_by_entries(batch: Any, ready: bool = False) -> int:
    """The length that a batch's lists share, or that a list of examples has, each of tensors that disagree.

    Args:
        batch: The batch.
        ready: Whether a list of tensors is a list of examples, which other micro-batches have shown.
    """
    _check_kinds(batch)
    if (
        isinstance(batch, list)
        and batch
        and (
            _only_tensors(batch)
            if ready
            else len({signature(entry) for entry in batch}) == 1 and not any(map(_agrees, batch))
        )
    ):
        return len(batch)
    columns = list(children_of(batch) or ())
    sizes: set[Any] = {_entries(column) for column in columns} - {0}
    if len(sizes) != 1 or None in sizes:
        raise Uncountable("The batch's lists have different lengths.")
    if sizes == {len(columns)} and len(columns) > 1 and len({signature(column) for column in columns}) == 1:
        raise Uncountable("The batch could be a list of examples, or of their parts.")
    return sizes.pop()


def _entries(column: Any) -> int | None:
    """How many examples a part of the batch has an entry for; None if it holds tensors and its entries differ in kind.

    0 of what holds no tensors and has no entries.
    """
    if isinstance(column, list | tuple) and not named(column):
        kinds = {(signature(entry), getattr(entry, "ndim", None)) for entry in column}
        return len(column) if len(kinds) <= 1 or not holds_tensors(column) else None
    if is_tensor(column) or is_array(column):
        return next(iter(_shape(column)), None)
    return None if holds_tensors(column) else 0


def _only_tensors(batch: Sequence[Any]) -> bool:
    return all(isinstance(entry, Tensor) for entry in batch)


def _agrees(entry: Any) -> bool:
    """Whether an entry is by itself a batch, or holds nothing to be counted."""
    try:
        _size_by_tensors(entry)
        return True
    except Uncountable:
        return not holds_tensors(entry)


def _sized(batch: Any, wanted: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
    """Size and shape of each leaf of a kind."""
    if wanted(batch):
        shape = _shape(batch)
        return [(shape[0] if shape else None, shape)]
    return [found for child in children_of(batch) or () for found in _sized(child, wanted)]


def _shape(leaf: Any) -> tuple[int, ...]:
    """A leaf's dimensions, of which the first counts the examples."""
    if is_tensor_like(leaf):
        return tuple(leaf.batch_size)
    return tuple(leaf.shape) if hasattr(leaf, "shape") else (len(leaf),)


def _check_kinds(batch: Any) -> None:
    """Refuse what cannot be split.

    Raises:
        ValueError: by its type.
    """
    if isinstance(batch, Tensor) and batch.is_nested:
        raise Uncountable(f"A nested tensor cannot be split by example: {READY}.")
    if isinstance(batch, PackedSequence):
        raise Uncountable(f"A PackedSequence cannot be split by example: pack within loss_fn, or {READY}.")
    if isinstance(batch, Iterator):
        raise ValueError(
            f"The batch holds an iterator ({type(batch).__name__}), which the first pass over a micro-batch would use "
            "up: make a list of it."
        )
    children = children_of(batch)
    if children is None and not is_leaf(batch) and next(found(batch, (Tensor,), arrays=True), None) is not None:
        raise Uncountable(
            f"A {type(batch).__name__} holds tensors and cannot be split by example: register its class with "
            f"torch.utils._pytree.register_pytree_node, or {READY}."
        )
    for child in children or ():
        _check_kinds(child)


def _part(batch: Any, cut: Cut, size: int, rows: bool) -> Any:
    """What lies within a cut, in the structure of the batch.

    Args:
        batch: The batch, or a part of it.
        cut: Where the micro-batch begins and ends.
        size: How many examples the batch holds.
        rows: Whether lists of tensors hold an entry for each example.
    """
    start, end = cut
    if isinstance(batch, Tensor):
        return batch[start:end]
    if is_tensor_like(batch):
        return batch[start:end]
    if is_array(batch):
        if batch.shape[0] != size:
            return batch
        return batch.iloc[start:end] if hasattr(batch, "iloc") else batch[start:end]
    if isinstance(batch, Set) and len(batch) == size:
        raise ValueError(f"A set of {size} entries beside {size} examples has no order to split it by: make it a list.")
    if rows and isinstance(batch, list | tuple) and not named(batch) and len(batch) == size:
        return _cut(batch, cut)
    if is_plain_sequence(batch):
        return _sequence_part(batch, cut, size)
    if isinstance(batch, list) and len(batch) == size and not rows and _entries_are_arrays(batch, size):
        return _cut(batch, cut)
    children = children_of(batch)
    if children is None:
        return batch
    return rebuilt(batch, [_part(child, cut, size, rows) for child in children])


def _entries_are_arrays(batch: list[Any], size: int) -> bool:
    """Whether a list of arrays has one for each example, and not one array over all of them."""
    if not all(is_array(entry) for entry in batch):
        return False
    if all(entry.shape[0] == size for entry in batch):
        raise ValueError(
            f"A list of {size} arrays of {size} entries each could be split by either: stack the arrays, or {READY}."
        )
    return True


def _sequence_part(batch: Any, cut: Cut, size: int) -> Any:
    """Of a sequence without tensors."""
    columns = [entry for entry in batch if is_plain_sequence(entry)] if not isinstance(batch, range) else []
    by_columns = bool(columns) and len(columns) == len(batch) and all(len(entry) == size for entry in columns)
    if len(batch) == size:
        if by_columns and size > 1:
            raise ValueError(
                f"A list of {size} lists of {size} entries each could be split by either: make the outer one a dict, "
                f"or {READY}."
            )
        return _cut(batch, cut)
    children = children_of(batch)
    if children is None or not columns:
        return batch
    return rebuilt(batch, [_part(child, cut, size, False) for child in children])


def _cut(batch: Any, cut: Cut) -> Any:
    try:
        return batch[slice(*cut)]
    except TypeError:  # a deque
        return type(batch)(itertools.islice(batch, *cut))
