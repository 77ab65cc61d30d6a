"""The mSAM gradient as a loss, for training loops that others own: Trainer, Lightning, accelerate.

Such a loop takes a loss, scales it (by a GradScaler, by 1 / the number of accumulated batches), calls `.backward()`,
reduces over ranks and clips. `msam.loss` runs all passes at once and returns a loss that holds the gradient ready. Its
`.backward()` multiplies that by whatever comes in and hands it to the parameters, as any other loss would.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Required, TypedDict, Unpack
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from msam.gradient import Returned, Step, backward, check_rho
from msam.mean import unpacked
from msam.microbatch import fresh, ready_sizes
from msam.parallel import compiled, expect_backward, unwrapped
from msam.passes import leaves
from msam.ways import Way


class Options(TypedDict, total=False):
    """The options of `msam.loss`: those of `msam.backward`, which describes them. There is no `shared="ranks"`."""

    rho: Required[float | Tensor]
    micro_batches: int | Tensor | list[Any] | tuple[Any, ...]
    adaptive: bool
    perturb: Callable[[str], bool] | None
    shared: bool
    same_noise: bool
    generators: Sequence[Any]
    state: nn.Module | Sequence[nn.Module]
    passes: Way | Literal["auto"]
    vectorized: bool
    scaler: torch.amp.GradScaler | None


class Loss(Tensor):
    """What `msam.loss` returns: a scalar tensor. What is computed from it is a plain tensor.

    Attributes:
        step: The record of the passes, as `msam.backward` returns it.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    step: Step


def loss(loss_fn: Callable[[Any], Returned], batch: Any, model: nn.Module, **options: Unpack[Options]) -> Loss:
    """The mean loss of a mini-batch, whose `.backward()` delivers the mSAM gradient: for loops that others own.

    `msam.loss(...).backward()` adds to `.grad` what `msam.backward(...)` adds. In between a loop may treat the loss as
    any other: scale it, divide it for gradient accumulation, add other losses to it. All passes run within this call,
    which leaves `.grad` as it is; `.backward()` only multiplies the gradient by what comes in. Until then the gradient
    takes the memory of one gradient more.

    The gradient is that of this process: its own micro-batches, weighted among themselves. DistributedDataParallel
    reduces it during `.backward()`, once, as a mean over ranks, and not within `no_sync()`. The same holds where the
    call is made inside the wrapper's forward pass, as in Lightning; `model` is then the module inside.

    Tensor and post-accumulate hooks of the model's parameters see the delivered gradient alone, as in plain training.

    Where gradients are off (under `torch.no_grad()`, as in validation) it is `loss_fn(batch)`, one plain pass. Eval
    mode changes nothing: with gradients on, a model in eval mode gets the mSAM gradient.

    Args:
        loss_fn: As of `msam.backward`.
        batch: The mini-batch; None if `micro_batches` is a list.
        model: The module whose parameters are perturbed, as of `msam.backward`.
        **options: rho, micro_batches and the others of `msam.backward`. With fp16, `scaler` is the GradScaler that will
            scale this loss: the passes need its factor too, which is taken out again, so the loop goes on as usual.

    Returns:
        The mean loss at the weights w, shape (); `.step` is the record of the passes.

    Raises:
        ValueError: as `msam.backward`; for `shared="ranks"`; for a surrounding fp16 autocast without a scaler.
        NotImplementedError: as `msam.backward`.
        RuntimeError: by `.backward()`, if it is called a second time, or after the weights have changed.

    >>> import torch, msam
    >>> model, x = torch.nn.Linear(3, 1), torch.ones(8, 3)
    >>> loss = msam.loss(lambda part: model(part).square().mean(), x, model, rho=0.1, micro_batches=4)
    >>> (loss / 2).backward()
    >>> bool(loss.step.sharpness > 0)
    True
    """
    check_rho(options.get("rho"))
    if options.get("shared") not in (None, False, True):
        raise ValueError(
            f"shared is {options.get('shared')!r}, but what msam.loss computes is this process's own, and the loop "
            "reduces it: use shared=True, or msam.backward."
        )
    if not torch.is_grad_enabled():
        return _made(_plain(loss_fn, batch, options.get("micro_batches")), None)
    network, ddp = unwrapped(model)
    _check_scaler(network, options.get("scaler"))
    sync = ddp is not None and ddp.require_backward_grad_sync
    inside = _inside(model, ddp)
    params = [p for p in network.parameters() if p.requires_grad]
    waiting = [other for other in _waiting if other.current()]
    with _own_gradients(params) as others, ddp.no_sync() if ddp is not None else nullcontext():
        step = backward(others.seen(loss_fn), batch, inside, **options)
        found = [(p, p.grad) for p in [*params, *others.leaves]]
    ready = _Ready([(p, g) for p, g in found if g is not None], ddp if sync else None)
    if scaler := options.get("scaler"):
        ready.factor = 1 / scaler.scale(torch.ones_like(step.loss))
    for other in waiting:  # whose weights have moved, and are back
        other.note_versions()
    return _made(step, ready)


class _Ready:
    """A gradient that waits to be delivered.

    Args:
        gradient: The tensors that get one, and what they get.
        ddp: What reduces it, if anything.
    """

    factor: Tensor | float = 1.0
    """What the gradient is to be multiplied by besides what comes in."""

    def __init__(self, gradient: list[tuple[Tensor, Tensor]], ddp: DistributedDataParallel | None) -> None:
        self.tensors = [p for p, _ in gradient]
        self._gradient: list[Tensor] | None = [g for _, g in gradient]
        self._ddp = ddp
        self.note_versions()
        _waiting.add(self)

    def note_versions(self) -> None:
        """The weights are as they should be."""
        self._versions = self._now()

    def current(self) -> bool:
        """Whether the weights are those of the gradient."""
        return self._now() == self._versions

    def delivered(self, incoming: Tensor) -> list[Tensor]:
        """The gradient times what comes in; it is here no longer.

        Raises:
            RuntimeError: if it has been delivered, or is another point's.
        """
        gradient, self._gradient = self._gradient, None
        if gradient is None:
            raise RuntimeError(
                "backward() was called a second time on a loss of msam.loss, whose gradient is handed over once: "
                "call msam.loss again, or add the losses up first."
            )
        if not self.current():
            raise RuntimeError(
                "The weights have changed between msam.loss and backward(), and the gradient is that at the old ones: "
                "call backward() before the optimizer's step."
            )
        if self._ddp is not None:
            expect_backward(self._ddp, self.tensors)
        return _scaled(gradient, incoming * self.factor)

    def _now(self) -> list[int]:
        return [0 if p.is_inference() else p._version for p in self.tensors]


class _Deliver(torch.autograd.Function):
    """The node of autograd's graph between the loss and the parameters."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ready: _Ready, *tensors: Tensor) -> Tensor:
        ctx.ready = ready
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.ready.delivered(incoming)


_waiting: WeakSet[_Ready] = WeakSet()
"""Gradients that may not have been delivered yet."""


@dataclass
class _Others:
    """Leaves outside the model that the loss depends on, and the `.grad` that they had."""

    known: set[int]
    leaves: list[Tensor]
    before: list[Tensor | None]

    def seen(self, loss_fn: Callable[[Any], Returned]) -> Callable[[Any], Returned]:
        """`loss_fn`, after each call of which the leaves of its graph are known, and begin with no gradient."""

        def watched(part: Any) -> Returned:
            returned = loss_fn(part)
            value = returned[0] if isinstance(returned, tuple) else getattr(returned, "loss", returned)
            if isinstance(value, Tensor):
                with torch._C.DisableTorchFunction():  # what follows is not the model's
                    self._note(value)
            return returned

        return watched

    def _note(self, value: Tensor) -> None:
        for leaf in leaves(value):
            if id(leaf) not in self.known:
                self.known.add(id(leaf))
                self.leaves.append(leaf)
                self.before.append(leaf.grad)
                leaf.grad = None


@contextmanager
def _own_gradients(params: Sequence[Tensor]) -> Iterator[_Others]:
    """In the block the parameters have no `.grad` and no hooks; afterwards those that they had."""
    before = [p.grad for p in params]
    hooks = [table for p in params for table in (p._backward_hooks, p._post_accumulate_grad_hooks) if table]
    kept = [dict(table) for table in hooks]
    others = _Others({id(p) for p in params}, [], [])
    try:
        for table in hooks:
            table.clear()
        for p in params:
            p.grad = None
        yield others
    finally:
        for table, entries in zip(hooks, kept, strict=True):
            table.update(entries)
        for p, g in zip([*params, *others.leaves], [*before, *others.before], strict=True):
            p.grad = g


def _inside(model: nn.Module, ddp: DistributedDataParallel | None) -> nn.Module:
    """The model without the wrapper that reduces; still seen as compiled, if what is around that wrapper is."""
    if ddp is None:
        return model
    inside: nn.Module = ddp.module
    if not compiled(model) or compiled(inside):
        return inside
    holder = nn.Module()
    holder._orig_mod = inside  # as torch.compile calls what it wraps
    return holder


def _check_scaler(network: nn.Module, scaler: Any) -> None:
    """Refuse passes that would underflow.

    Raises:
        ValueError: under fp16 autocast without a scaler.
    """
    device = next(network.parameters()).device.type
    if scaler is None and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16:
        raise ValueError(
            "Under float16 autocast msam.loss needs the GradScaler that will scale its loss, or the gradients of its "
            "passes underflow: pass scaler=scaler (GradScaler(enabled=False) if there is none)."
        )


@torch.no_grad()
def _scaled(gradient: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Each times a number, in its place: dense ones of a device and type by one call of torch."""
    groups: dict[Any, list[Tensor]] = {}
    for g in gradient:
        groups.setdefault((g.device, g.dtype, g.layout), []).append(g)
    for (device, _, layout), tensors in groups.items():
        if layout is torch.strided:
            torch._foreach_mul_(tensors, factor.to(device))
        else:
            for g in tensors:
                g.mul_(factor.to(device))
    return gradient


def _plain(loss_fn: Callable[[Any], Returned], batch: Any, micro_batches: Any) -> Step:
    """The loss without a gradient: of the mini-batch in one pass, or of the micro-batches that were given instead."""
    parts = list(micro_batches) if batch is None and isinstance(micro_batches, list | tuple) else [batch]
    found = [unpacked(loss_fn(fresh(part))) for part in parts]
    weights = [weight for _, weight, _ in found]
    if len(parts) > 1 and None in weights:
        weights = list(ready_sizes(parts) or weights)
    losses = torch.stack([value.detach() for value, _, _ in found])
    shares = [torch.as_tensor(1 if w is None else w, dtype=losses.dtype, device=losses.device) for w in weights]
    value = (losses * torch.stack(shares)).sum() / torch.stack(shares).sum() if len(parts) > 1 else losses[0]
    return Step(value, value, None, tuple(aux for _, _, aux in found))


def _made(step: Step, ready: _Ready | None) -> Loss:
    """The loss of a step, with the gradient behind it."""
    value = step.loss.clone() if ready is None else _Deliver.apply(step.loss, ready, *ready.tensors)
    made = value.as_subclass(Loss)
    made.step = step
    return made
