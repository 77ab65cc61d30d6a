"""What a batch is built of: its containers, and what counts as a tensor or a list of examples."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree

_SIMPLE = {str, int, float, bool, bytes, type(None)}


def is_tensor(leaf: Any) -> bool:
    """A tensor, or what is indexed like one: a TensorDict, say."""
    return isinstance(leaf, Tensor) or is_tensor_like(leaf)


def is_tensor_like(leaf: Any) -> bool:
    """What has a batch size and is indexed by it: a TensorDict, say."""
    size = getattr(leaf, "batch_size", None)
    return isinstance(size, torch.Size) and len(size) > 0 and hasattr(type(leaf), "__getitem__")


def is_array(leaf: Any) -> bool:
    """A NumPy array with a first dimension, or a table of pandas."""
    return type(leaf).__module__.partition(".")[0] in ("numpy", "pandas") and bool(getattr(leaf, "shape", ()))


def is_plain_sequence(leaf: Any) -> bool:
    """A sequence that holds neither tensors nor arrays; not text."""
    if not isinstance(leaf, Sequence) or isinstance(leaf, str | bytes | bytearray) or hasattr(leaf, "_fields"):
        return False
    return not isinstance(leaf, torch.Size) and not holds_tensors(leaf)


def is_leaf(leaf: Any) -> bool:
    """What is split as a whole."""
    return is_tensor(leaf) or is_array(leaf) or is_plain_sequence(leaf)


def holds_tensors(value: Any) -> bool:
    """Whether a value is or holds tensors or arrays."""
    return next(found(value, (Tensor,), arrays=True), None) is not None


def found(value: Any, kinds: tuple[type, ...], arrays: bool = False, depth: int = 0) -> Iterator[Any]:
    """What a value is or holds of some kinds, in containers or in attributes of objects."""
    if isinstance(value, kinds) or (arrays and is_array(value)):
        yield value
        return
    if depth > 5 or isinstance(value, type | torch.nn.Module | str | bytes | range) or is_array(value):
        return
    children = children_of(value)
    if children is None and isinstance(value, Sequence | Set):
        children = list(value)
    if children is None:
        children = [] if callable(value) else list(getattr(value, "__dict__", {}).values())
        depth += 2
    if set(map(type, children)) <= _SIMPLE:
        return
    for child in children:
        yield from found(child, kinds, arrays, depth + 1)


def is_registered(batch: Any) -> bool:
    """Whether torch knows how to take the class apart, as its author has registered it."""
    kind = type(batch)
    return kind in _pytree.SUPPORTED_NODES and kind.__module__ not in ("builtins", "collections") and not named(batch)


def named(batch: Any) -> bool:
    """Whether it is a named tuple."""
    return isinstance(batch, tuple) and hasattr(batch, "_fields")


def children_of(batch: Any) -> list[Any] | None:
    """The values one level down, or None for a leaf."""
    if isinstance(batch, Tensor) or is_tensor_like(batch):
        return None
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, list | tuple) and not isinstance(batch, torch.Size | PackedSequence):
        return list(batch)
    if is_registered(batch):
        return list(_pytree.SUPPORTED_NODES[type(batch)].flatten_fn(batch)[0])
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return None


def rebuilt(batch: Any, pieces: list[Any]) -> Any:
    """A container of the batch's type with other values."""
    kind = type(batch)
    if isinstance(batch, Mapping):
        pairs = dict(zip(batch, pieces, strict=True))
        if kind is dict:
            return pairs
        clone = copy.copy(batch)
        if not hasattr(clone, "__setitem__"):
            return kind(pairs)
        for key, piece in pairs.items():
            clone[key] = piece
        return clone
    if isinstance(batch, list | tuple):
        return kind(*pieces) if named(batch) else kind(pieces)
    if is_registered(batch):
        node = _pytree.SUPPORTED_NODES[kind]
        return node.unflatten_fn(pieces, node.flatten_fn(batch)[1])
    clone = copy.copy(batch)
    for field, piece in zip(dataclasses.fields(batch), pieces, strict=True):
        object.__setattr__(clone, field.name, piece)
    return clone


def signature(batch: Any) -> Any:
    """What a batch is built of: types and lengths."""
    children = children_of(batch)
    if children is None:
        return type(batch).__name__
    keys = tuple(map(str, batch)) if isinstance(batch, Mapping) else None
    return type(batch).__name__, keys, tuple(signature(child) for child in children)
