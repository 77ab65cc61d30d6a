"""Micro-batches side by side: each at weights of its own, on streams of the device.

A GPU that one small micro-batch does not fill works on several at once. The passes over one micro-batch follow each
other on one stream, with w + e_i as a copy of the weights; what they give is added up for each stream, and over the
streams at the end. The result is that of the loop, up to rounding, for up to `AT_MOST` copies of the weights and as
many gradients. On the CPU, which has no streams, it is computed one micro-batch after the other.

What this asks of a model: parameters are reached through the modules that hold them, and no state moves but running
statistics of normalisation layers. Each micro-batch moves its own copy of these; they end as if one micro-batch had
moved them after the other. Whatever else is refused, by name.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from msam.mean import HALF, Total
from msam.parallel import compiled
from msam.passes import leaves
from msam.perturbation import Weights, radius
from msam.state import Snapshot, State

AT_MOST = 8
"""Streams, and copies of the weights. Micro-batches beyond as many take turns."""

_streams: dict[torch.device, list[Any]] = {}


class Streams:
    """The weights and statistics that take the places of the model's while a micro-batch runs.

    Args:
        model: The model.
        params: The parameters that are trained.
        weights: Those that are perturbed, and how.
        count: How many micro-batches there are.

    Raises:
        NotImplementedError: for a model that cannot be run at copies of its weights, by what prevents it.
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter], weights: Weights, count: int) -> None:
        _check(model, params)
        self._params, self._weights = params, weights
        device = params[0].device
        self._streams = _of(device, min(count, AT_MOST)) if device.type == "cuda" else [None]
        self._device = device
        self._sums = [Total(len(params)) for _ in self._streams]
        self._number = 0
        trained = {id(p) for p in params}
        tables = [module._parameters for module in model.modules()]
        self._places = [(table, name, p) for table in tables for name, p in table.items() if id(p) in trained]
        self._statistics = _Statistics(model)
        self._fixed = [(name, b, b._version) for name, b in model.named_buffers() if not self._statistics.holds(b)]
        self._copies: list[Tensor] = []

    @contextmanager
    def joined(self) -> Iterator[None]:
        """The streams begin when what was asked of the device before is done; afterwards it waits for them."""
        used = [stream for stream in self._streams if stream is not None]
        main: Any = torch.cuda.current_stream(self._device) if used else None
        for stream in used:
            stream.wait_stream(main)
        try:
            yield
        finally:
            for stream in used:
                main.wait_stream(stream)

    @contextmanager
    def next(self) -> Iterator[None]:
        """The next micro-batch runs in the block: what is asked of the device goes to its stream."""
        self._number = (self._number + 1) % len(self._streams)
        stream = self._streams[self._number]
        on: AbstractContextManager[Any] = torch.cuda.stream(stream) if stream is not None else nullcontext()
        with on:
            torch.clear_autocast_cache()  # casts of the weights are not for another stream
            try:
                yield
            finally:
                torch.clear_autocast_cache()

    def at_w(self) -> AbstractContextManager[None]:
        """The pass in the block is at w, and moves statistics of its own."""
        return self._statistics.own()

    @contextmanager
    def moved(self, gradient: list[Tensor | None]) -> Iterator[Tensor]:
        """The pass in the block is at w + e.

        Args:
            gradient: The ascent gradient of each perturbed parameter, None where it has none. The list is emptied.

        Yields:
            ||T g||, shape (). Where it is not finite so are some weights in the block.
        """
        norm = self._copy(gradient)
        own = {id(p): copy for p, copy in zip(self._params, self._copies, strict=True)}
        torch.clear_autocast_cache()
        with self._statistics.scratch():
            try:
                for table, name, p in self._places:
                    table[name] = own[id(p)]  # type: ignore[assignment]
                yield norm
            finally:
                for table, name, p in self._places:
                    table[name] = p

    def accumulate(self, loss: Tensor, weight: float | Tensor) -> None:
        """The backward pass of a loss at w + e, whose gradient is added to the stream's, times the weight.

        Raises:
            NotImplementedError: if the loss depends on a trained tensor that is none of the copies.
        """
        copies, self._copies = self._copies, []
        if isinstance(weight, float | int) and not weight:
            return
        known = {id(copy) for copy in copies}
        if any(id(leaf) not in known for leaf in leaves(loss)):
            refuse("a loss that depends on tensors outside the model, or a layer that keeps its weights elsewhere too")
        self._sums[self._number].add(list(torch.autograd.grad(loss, copies, allow_unused=True)), weight)

    @torch.no_grad()
    def finish(self) -> None:
        """The weighted mean over all micro-batches goes to `.grad`, and the statistics to the model."""
        first, *others = self._sums
        for other in others:
            first.join(other)
        for p, g in zip(self._params, first.mean(self._params, None), strict=True):
            p.grad = g
        self._statistics.combine()

    def check_state(self, state: State, before: Snapshot) -> None:
        """Refuse what has moved other state, which every micro-batch would have to start from.

        Raises:
            NotImplementedError: by its name.
        """
        moved = next((name for name, b, version in self._fixed if b._version != version), None)
        if (moved := moved or state.changed(before, set())) is not None:
            refuse(f"a forward pass that moves {moved}")

    @torch.no_grad()
    def _copy(self, gradient: list[Tensor | None]) -> Tensor:
        """Copies of all parameters, those with an ascent gradient at w + e; and its norm."""
        pairs = [(p, g) for p, g in zip(self._weights.params, gradient, strict=True) if g is not None]
        gradient.clear()
        w, g = [p.detach() for p, _ in pairs], [g for _, g in pairs]
        if any(t.is_sparse for t in g):
            refuse("sparse gradients")
        scaled = torch._foreach_mul(g, w) if self._weights.adaptive else g
        norm, scale = radius(list(scaled), self._weights.rho)
        along = torch._foreach_mul(scaled, [t.conj() for t in w]) if self._weights.adaptive else g
        moved = torch._foreach_mul(along, scale)
        torch._foreach_add_(moved, w)
        at = {id(p): t for (p, _), t in zip(pairs, moved, strict=True)}
        self._copies = [nn.Parameter(at.get(id(p), p.detach())) for p in self._params]
        return norm


class _Statistics:
    """Running statistics of normalisation layers in train mode, of which each micro-batch has its own."""

    def __init__(self, network: nn.Module) -> None:
        self._layers = [m for m in network.modules() if isinstance(m, _NormBase) and _moves(m)]
        if any(layer.momentum is None for layer in self._layers):
            refuse("BatchNorm with momentum=None")
        names = ("running_mean", "running_var", "num_batches_tracked")
        entries = [(layer, name) for layer in self._layers for name in names]
        self._entries = [(layer, name) for layer, name in entries if layer._buffers.get(name) is not None]
        self._start: list[Tensor] = [layer._buffers[name] for layer, name in self._entries]  # type: ignore[misc]
        self._ids = {id(b) for b in self._start}
        self._ends: list[list[Tensor]] = []
        self._calls: list[list[int]] = []

    def holds(self, buffer: Tensor) -> bool:
        """Whether a buffer is one of them."""
        return id(buffer) in self._ids

    @contextmanager
    def own(self) -> Iterator[None]:
        """The pass in the block moves copies, which are kept, and its calls of each layer are counted."""
        calls = dict.fromkeys(self._layers, 0)

        def count(layer: Any, *_: Any) -> None:
            calls[layer] += 1

        handles = [layer.register_forward_pre_hook(count) for layer in self._layers]
        try:
            with self.scratch() as copies:
                yield
        finally:
            for handle in handles:
                handle.remove()
        self._ends.append(copies)
        self._calls.append([calls[layer] for layer, _ in self._entries])

    @contextmanager
    def scratch(self) -> Iterator[list[Tensor]]:
        """The pass in the block moves copies."""
        copies = _cloned(self._start)
        try:
            for (layer, name), copy in zip(self._entries, copies, strict=True):
                layer._buffers[name] = copy
            yield copies
        finally:
            for (layer, name), original in zip(self._entries, self._start, strict=True):
                layer._buffers[name] = original

    def combine(self) -> None:
        """The model's own move as if one micro-batch had moved them after the other.

        A pass takes r to d r + c, d = (1 - momentum)^calls; c is what its copy shows.
        """
        if not self._entries:
            return
        start = _cloned(self._start)
        for ends, calls in zip(self._ends, self._calls, strict=True):
            decay = [
                1.0 if name == "num_batches_tracked" else (1.0 - float(layer.momentum or 0.0)) ** times
                for (layer, name), times in zip(self._entries, calls, strict=True)
            ]
            for whole in (False, True):
                at = [place for place, r in enumerate(start) if r.is_floating_point() is not whole]
                if not at:
                    continue
                r, r0, r_i = ([tensors[place] for place in at] for tensors in (self._start, start, ends))
                d: list[Any] = [int(decay[place]) if whole else decay[place] for place in at]
                torch._foreach_mul_(r, d)
                torch._foreach_add_(r, r_i)
                torch._foreach_sub_(r, torch._foreach_mul(r0, d))


def _check(network: nn.Module, params: Sequence[nn.Parameter]) -> None:
    """Refuse what cannot be run at copies of its weights."""
    if isinstance(network, DistributedDataParallel):
        refuse("DistributedDataParallel")
    if compiled(network):
        refuse("torch.compile")
    for module in network.modules():
        if isinstance(module, torch.jit.ScriptModule):
            refuse("torch.jit")
        if isinstance(module, nn.RNNBase):
            refuse(f"nn.{type(module).__name__}, which keeps its weights elsewhere too")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            refuse("sparse gradients")
    names = {id(p): name for name, p in network.named_parameters()}
    for p in params:
        if type(p) is not nn.Parameter or p.dtype in HALF:
            refuse(f"the parameter {names[id(p)]}, a {type(p).__name__} of {p.dtype}")
        if p.device != params[0].device:
            refuse("parameters on several devices")
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            refuse(f"the parameter {names[id(p)]}, which has a hook")


def _moves(layer: Any) -> bool:
    return bool(layer.training and layer.track_running_stats and layer.running_mean is not None)


def _cloned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, in a call of torch for each type."""
    copies = [torch.empty_like(t) for t in tensors]
    kinds: Mapping[torch.dtype, list[int]] = {t.dtype: [] for t in tensors}
    for place, t in enumerate(tensors):
        kinds[t.dtype].append(place)
    for places in kinds.values():
        torch._foreach_copy_([copies[place] for place in places], [tensors[place] for place in places])
    return copies


def _of(device: torch.device, count: int) -> list[Any]:
    """The first streams of a device, the same ones each time."""
    known = _streams.setdefault(device, [])
    known += [torch.cuda.Stream(device) for _ in range(len(known), count)]
    return known[:count]


def refuse(what: str) -> NoReturn:
    """Refuse, with what to do instead.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(f'msam.backward(passes="streams") cannot do {what}: use passes="loop".')
