"""What a forward pass reads and moves besides the weights that are trained.

That is buffers (BatchNorm's statistics, queues, codebooks, vectors of spectral norm), parameters that are frozen (the
encoder that follows another), and plain attributes of a user's own modules as far as they are tensors without a graph,
numbers, strings, or lists, dicts, sets and deques of these.

The policy: both passes over a micro-batch start from the same state, so they differ in the weights alone, and the
state ends as the clean passes leave it. BatchNorm's statistics therefore move once for each micro-batch, m small
updates a step, and are afterwards those of the weights w at micro-batches of the trained size.

Version counters would say what has moved, but batch_norm and what writes through `.data` go past them. So everything is
copied: what is small by one call of torch for each device and type, what is large by torch's lazy clones, which share
memory until one of the two is written to.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from msam.atomic import expanded

LARGE = 2**16
"""Elements from which on a tensor is cloned lazily. Parameters always are: they rarely move."""

LONGEST = 4096
"""Entries of a list, dict, set or deque up to which it counts as state."""

_BASE = frozenset(vars(nn.Module()))
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CONTAINERS = (list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict)
_MISSING: Any = object()


@dataclass
class _Copied:
    """One value: the object it is, and what it holds."""

    value: Any
    contents: Any = None
    """Of a container, its entries, each copied alike."""


@dataclass(frozen=True)
class _Record:
    """The plain attributes of one module: the names of all, and those that are state."""

    keys: tuple[str, ...]
    copies: dict[str, _Copied]


@dataclass
class Snapshot:
    """The state at one instant. Restored by `State.put_back`, any number of times."""

    tables: list[dict[str, Any]]
    """The modules' dicts of parameters and buffers, copied."""
    objects: list[Any]
    """What is in them, one after the other."""
    attributes: list[_Record]
    """Of each module whose class is not torch's."""
    tensors: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    """Copies of what the tensors hold."""


class State:
    """The state of some modules.

    Args:
        modules: The model, and any other modules whose state the forward pass moves.
        trained: The parameters that are the weights.
        lazily: Whether large tensors may be cloned lazily. Not where compiled code holds their addresses.
    """

    def __init__(self, modules: Iterable[nn.Module], trained: Iterable[Tensor], lazily: bool) -> None:
        self._trained = {id(p) for p in trained}
        self._lazily = lazily
        self._scripted: list[Tensor] = []
        self._live: list[dict[str, Any]] = []
        self._owners: list[_Attributes] = []
        for module in dict.fromkeys(chain.from_iterable(root.modules() for root in modules)):
            if isinstance(module, torch.jit.ScriptModule):  # whose dicts are views of what C++ holds
                self._scripted += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
                continue
            self._live += [module._parameters, module._buffers]
            if not type(module).__module__.startswith("torch.nn.") or module._forward_pre_hooks:  # as of spectral_norm
                self._owners.append(_Attributes(vars(module)))
        self._tables: list[dict[str, Any]] = []
        self._objects: list[Any] = []
        self._held: list[Tensor] = []
        self._memory: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self._clones: dict[int, Tensor] = {}

    def taken(self, name: str) -> Snapshot:
        """The state as it is now.

        Args:
            name: Snapshots of one name share their memory: the earlier one is worth nothing any more.
        """
        self._look()
        tensors = list(self._held)
        attributes = [owner.taken(tensors) for owner in self._owners]
        return Snapshot(self._tables, self._objects, attributes, tensors, self._values(name, tensors))

    @torch.no_grad()
    def put_back(self, then: Snapshot) -> None:
        """Everything is the object that it was, and holds what it held. What fails is passed over, then raised."""
        failures: list[Exception] = []
        self._attempt(failures, self._put_tables_back, then)
        for owner, attributes in zip(self._owners, then.attributes, strict=True):
            self._attempt(failures, owner.put_back, attributes)
        whole = []
        for t, v in zip(then.tensors, then.values, strict=True):
            if not _alike(t, v):
                self._attempt(failures, _reshaped, t, v)
            elif not _shared(t, v):
                whole.append((t, v))
        for tensors, values in _grouped(whole):
            try:
                torch._foreach_copy_(tensors, values)
            except Exception:
                for t, v in zip(tensors, values, strict=True):
                    self._attempt(failures, t.copy_, v)
        if failures:
            raise failures[0]

    def changed(self, then: Snapshot, known: set[int]) -> str | None:
        """The name of something that is not as it was, if there is any. On other devices than the CPU values may pass.

        Args:
            then: The state before.
            known: Ids of tensors that may have changed.
        """
        for live, table in zip(self._live, then.tables, strict=True):
            for name in live.keys() | table.keys():
                if live.get(name, _MISSING) is not table.get(name, _MISSING):
                    return name
        for owner, record in zip(self._owners, then.attributes, strict=True):
            if (attribute := owner.changed(record)) is not None:
                return attribute
        for t, v in zip(then.tensors, then.values, strict=True):
            if id(t) not in known and t.device.type == "cpu" and not _equal(t, v):
                return next((n for table in then.tables for n, held in table.items() if held is t), "a tensor")
        return None

    @contextmanager
    def rewound(self, before: Snapshot) -> Iterator[None]:
        """In the block the state starts as it was before; afterwards it is as it was when the block began."""
        after = self.taken("after")
        try:
            self.put_back(before)
            yield
        finally:
            self.put_back(after)

    def _look(self) -> None:
        """Take note of the modules' parameters and buffers, anew only where one is another object than before."""
        objects = list(chain.from_iterable(table.values() for table in self._live))
        if self._tables and len(objects) == len(self._objects) and all(map(is_, objects, self._objects)):
            return
        self._objects, self._tables = objects, [dict(table) for table in self._live]
        held = [t for t in (*objects, *self._scripted) if isinstance(t, Tensor) and id(t) not in self._trained]
        self._held = [t for t in {id(t): t for t in held}.values() if _can_move(t)]

    def _put_tables_back(self, then: Snapshot) -> None:
        objects = list(chain.from_iterable(table.values() for table in self._live))
        if len(objects) == len(then.objects) and all(map(is_, objects, then.objects)):
            return
        for live, table in zip(self._live, then.tables, strict=True):
            live.clear()
            live.update(table)

    def _values(self, name: str, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of what tensors hold, in the memory that the earlier snapshot of this name had."""
        known, memory = self._memory.get(name, ([], []))
        fits = len(known) == len(tensors) and all(map(is_, known, tensors)) and all(map(_alike, tensors, memory))
        values: list[Any] = list(memory) if fits else [None] * len(tensors)
        small = []
        for number, t in enumerate(tensors):
            large = isinstance(t, nn.Parameter) or t.numel() >= LARGE
            if self._lazily and large and (clone := self._cloned(t)) is not None:
                values[number] = clone
                continue
            if not fits or values[number] is self._clones.get(id(t)):
                values[number] = torch.empty_like(t, requires_grad=False)
            small.append((values[number], t))
        with torch.no_grad():
            for copies, originals in _grouped(small):
                torch._foreach_copy_(copies, originals)
        self._memory[name] = tensors, values
        return values

    def _cloned(self, t: Tensor) -> Tensor | None:
        """A lazy clone, the earlier one if it still holds what the tensor does."""
        clone = self._clones.get(id(t))
        if clone is None or not (_alike(t, clone) and _shared(t, clone)):
            clone = _lazy(t)
            if clone is not None:
                self._clones[id(t)] = clone
        return clone

    @staticmethod
    def _attempt(failures: list[Exception], action: Callable[..., object], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:
            failures.append(error)


class _Attributes:
    """The plain attributes of one module."""

    def __init__(self, own: dict[str, Any]) -> None:
        self._own = own
        self._count = -1
        self._ids: list[int] = []
        self._constant = False
        """Whether none of them can change without being another object."""
        self._record = _Record((), {})

    def taken(self, tensors: list[Tensor]) -> "_Record":
        """A copy of those that are state. Their tensors join the list."""
        if self._constant and self._same():
            return self._record
        keys = tuple(self._own.keys() - _BASE)
        values = [self._own[key] for key in keys]
        known = len(tensors)
        copies = [_copied(value, tensors) for value in values]
        self._record = _Record(keys, {key: copy for key, copy in zip(keys, copies, strict=True) if copy is not None})
        self._count, self._ids = len(self._own), list(map(id, values))
        free = any(isinstance(value, (Tensor, *_CONTAINERS)) for value in values)
        self._constant = len(tensors) == known and not free
        return self._record

    def put_back(self, record: "_Record") -> None:
        """They are what they were; those that have appeared since are gone."""
        if record is self._record and self._constant and self._same():
            return
        for key, copy in record.copies.items():
            _refill(copy)
            if self._own.get(key, _MISSING) is not copy.value:
                self._own[key] = copy.value
        for key in self._own.keys() - record.keys - _BASE:
            if _copied(self._own[key], []) is not None:
                del self._own[key]

    def changed(self, record: "_Record") -> str | None:
        """The name of an attribute that is not what it was, or was none."""
        for key in self._own.keys() - _BASE:
            copy = record.copies.get(key)
            if copy is None and (key in record.keys or _copied(self._own[key], []) is None):
                continue  # no state
            if copy is None or not _still(copy, self._own[key]):
                return key
        return next(iter(record.copies.keys() - self._own.keys()), None)

    def _same(self) -> bool:
        """Whether every attribute is the object that it was. What is no state is held by its id alone."""
        if self._count != len(self._own):
            return False
        try:
            return all(map(eq, map(id, map(self._own.__getitem__, self._record.keys)), self._ids))
        except KeyError:
            return False


def _can_move(t: Tensor) -> bool:
    return not (t.is_inference() or t.is_meta or expanded(t) or nn.parameter.is_lazy(t))


def _alike(t: Tensor, values: Tensor) -> bool:
    return t.shape == values.shape and t.dtype == values.dtype and t.device == values.device


def _shared(t: Tensor, clone: Tensor) -> bool:
    """Whether a tensor still shares memory with its lazy clone, so that neither has been written to."""
    address = torch._C._data_address  # type: ignore[attr-defined]
    return bool(address(t) == address(clone))


def _lazy(t: Tensor) -> Tensor | None:
    """A clone that shares memory until one of the two is written to; None where torch has none for it.

    Frozen parameters of a class of their own (quantised weights) hold a pointer that their kernels read.
    """
    if type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided:
        return None
    if t.device.type not in ("cpu", "cuda") or (t.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    try:
        return t.detach()._lazy_clone()
    except RuntimeError:  # memory that another library owns
        return None


def _grouped(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Pairs of one device and type together, as lists."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for a, b in pairs:
        firsts, seconds = groups.setdefault((a.device, a.dtype), ([], []))
        firsts.append(a)
        seconds.append(b)
    yield from groups.values()


def _reshaped(t: Tensor, values: Tensor) -> None:
    """The same object with the shape, type and values that it had."""
    if t.dtype == values.dtype and t.device == values.device and t.layout is torch.strided:
        t.resize_(values.shape)
        t.copy_(values)
    else:
        t.data = values.clone()
        increment_version(t)


def _copied(value: Any, tensors: list[Tensor], depth: int = 0) -> _Copied | None:
    """A plain value, and its tensors with those that are to be copied; None for anything else, which is left alone.

    A tensor with a graph is no state, and to hold on to it would hold on to the activations of a pass.
    """
    if isinstance(value, _PLAIN):
        return _Copied(value)
    if isinstance(value, Tensor):
        if value.requires_grad or isinstance(value, nn.Parameter):
            return None
        if _can_move(value):
            tensors.append(value)
        return _Copied(value)
    if depth > 2:
        return None
    if type(value) is tuple or type(value) is torch.Size:
        entries = [_copied(entry, tensors, depth + 1) for entry in value]
        return None if None in entries else _Copied(value)
    if type(value) not in _CONTAINERS or len(value) > LONGEST:
        return None
    entries = [_copied(entry, tensors, depth + 1) for entry in (value.values() if isinstance(value, dict) else value)]
    if None in entries:
        return None
    return _Copied(value, dict(zip(value, entries, strict=True)) if isinstance(value, dict) else entries)


def _equal(t: Tensor, values: Tensor) -> bool:
    """Whether a tensor holds these values, NaN for NaN."""
    if not _alike(t, values):
        return False
    return _shared(t, values) or torch.equal(t, values) or bool(((t == values) | ((t != t) & (values != values))).all())


def _still(copy: _Copied, value: Any) -> bool:
    """Whether a value is what it was when it was copied; the values of tensors are not looked at."""
    if copy.contents is None:
        return value is copy.value or (
            isinstance(value, _PLAIN) and type(value) is type(copy.value) and value == copy.value
        )
    if value is not copy.value or len(value) != len(copy.contents):
        return False
    if isinstance(value, dict):
        return all(key in value and _still(entry, value[key]) for key, entry in copy.contents.items())
    if isinstance(value, set):
        return value == {entry.value for entry in copy.contents}
    return all(map(_still, copy.contents, value))


def _refill(copy: _Copied) -> None:
    """A container holds what it held."""
    container, contents = copy.value, copy.contents
    if contents is None:
        return
    entries: Sequence[_Copied] = list(contents.values()) if isinstance(contents, dict) else contents
    for entry in entries:
        _refill(entry)
    if isinstance(contents, dict):
        values = [entry.value for entry in entries]
        if list(container) != list(contents) or not all(map(is_, container.values(), values)):
            container.clear()
            container.update(zip(contents, values, strict=True))
        return
    values = [entry.value for entry in entries]
    if len(container) != len(values) or not all(map(is_, container, values)):
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(values)
