"""Moving the weights to w + e, and back to the same bits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from warnings import warn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.weak import WeakTensorKeyDictionary

from msam.atomic import signals_held

_HALF = (torch.float16, torch.bfloat16)

LENT_ON = ("cpu",)
"""Types of devices whose parameters are lent other memory instead of being moved in their place."""

_warned = WeakTensorKeyDictionary()
"""Its keys: a parameter of each model that was warned about, for as long as it lives."""


@dataclass(eq=False)
class _Reached:
    """A parameter that the loss depends on, or the rows of it that were looked up."""

    parameter: Tensor
    rows: Tensor | None
    """Indices of the rows; None for all of the parameter."""
    w: Tensor
    """The values to come back to: a copy, or the parameter's own memory if it is lent other memory."""
    g: Tensor | None
    """The ascent gradient, of w's shape; None once the weights have moved."""
    lent: Tensor | None = None
    """Memory that stands in for the parameter's own while it is perturbed."""


class Weights:
    """The perturbed parameters. Memory is taken once, at the first move, and serves all micro-batches of a step.

    On the CPU w + e is written to other memory, which the parameter points to for the length of a perturbed pass: what
    was not touched needs neither a copy nor a way back, and at m = 16 that is half of what the method takes beside its
    passes. On a GPU, where memory is fast and compiled graphs hold addresses, weights are moved in their place.
    """

    def __init__(self, params: Sequence[Tensor], rho: float, adaptive: bool) -> None:
        self._params, self._rho, self._adaptive = params, rho, adaptive
        self._memory: dict[Tensor, Tensor] = {}

    @contextmanager
    def moved(self, gradient: list[Tensor | None]) -> Iterator[Tensor]:
        """Move by e = rho * T^2 g / ||T g||, T = 1 (ASAM: |w|, elementwise), for the length of the block.

        Args:
            gradient: g of each parameter, None where it has none. The list is emptied, to free it before the
                second pass.

        Yields:
            ||T g||, shape (), in float32 or better. Where it is not finite so are some weights in the block.
        """
        reached = [self._reach(p, g) for p, g in zip(self._params, gradient, strict=True) if g is not None]
        gradient.clear()
        try:
            norm = self._move(reached)
            for part in reached:
                part.g = None
            torch.clear_autocast_cache()  # else a surrounding autocast reuses its casts of the weights at w
            yield norm
        finally:
            with signals_held(to_the_end=True):
                self._put_back(reached)
            torch.clear_autocast_cache()

    @torch.no_grad()
    def _reach(self, p: Tensor, g: Tensor) -> _Reached:
        if g.is_sparse:
            g = g.coalesce()
            rows = g.indices()[0]
            return _Reached(p, rows, p.detach().index_select(0, rows), g.values())
        if p.device.type in LENT_ON and p.dtype not in _HALF:
            if p not in self._memory:
                self._memory[p] = torch.empty_like(p, memory_format=torch.preserve_format, requires_grad=False)
            return _Reached(p, None, p.detach(), g, self._memory[p])
        if p not in self._memory:
            self._memory[p] = p.detach().clone()
        return _Reached(p, None, self._memory[p], g)

    @torch.no_grad()
    def _move(self, reached: Sequence[_Reached]) -> Tensor:
        lent = [part for part in reached if part.lent is not None]
        others = [part for part in reached if part.rows is not None or part.w.dtype in _HALF]
        whole = [part for part in reached if part.lent is None and part.rows is None and part.w.dtype not in _HALF]
        p, w, g = ([getattr(part, name) for part in whole] for name in ("parameter", "w", "g"))
        if self._adaptive:  # w g, in the place where w + e will be: no further copy of the parameters
            for part in lent:
                torch.mul(part.w, part.g, out=part.lent)
            if whole:
                torch._foreach_mul_(p, g)
        scaled = [
            *(part.lent if self._adaptive else part.g for part in lent),
            *(p if self._adaptive else g),
            *(t.g * t.w.abs() if self._adaptive else t.g for t in others),
        ]
        dtype = reduce(torch.promote_types, (t.dtype for t in scaled), torch.float32)
        norms = torch._foreach_norm(scaled, 2, dtype=dtype)
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        scale = self._rho / norm.clamp_min(1e-12)
        scales = {device: scale.to(device) for device in {part.w.device for part in reached}}

        for part in lent:
            along = part.lent.mul_(part.w) if self._adaptive else part.g
            torch.addcmul(part.w, along, scales[part.w.device].to(part.w.dtype), out=part.lent)
            part.parameter.data = part.lent
        factors = [scales[t.device].to(t.dtype) for t in w]
        if self._adaptive and whole:
            torch._foreach_mul_(p, w)
            for t, factor in zip(p, factors, strict=True):
                t.mul_(factor)
            torch._foreach_add_(p, w)
        elif whole:
            torch._foreach_addcmul_(p, g, factors)
        for part in others:
            self._move_one(part, scales[part.w.device])
        self._warn_of_rounding(reached)
        return norm

    def _move_one(self, part: _Reached, scale: Tensor) -> None:
        """Rows, or a parameter of half precision, in float32 or better."""
        w, g = (part.w.float(), part.g.float()) if part.w.dtype in _HALF else (part.w, part.g)
        moved = (w + g * scale.to(g.dtype) * (w.square() if self._adaptive else 1)).to(part.w.dtype)
        if part.rows is None:
            part.parameter.copy_(moved)
        else:
            part.parameter.index_copy_(0, part.rows, moved)

    @torch.no_grad()
    def _put_back(self, reached: Sequence[_Reached]) -> None:
        for part in reached:
            if part.lent is not None:
                part.parameter.data = part.w
                increment_version(part.parameter)  # a graph that is kept from the pass must not read w for w + e
        whole = [part for part in reached if part.rows is None and part.lent is None]
        if whole:
            torch._foreach_copy_([part.parameter for part in whole], [part.w for part in whole])
        for part in reached:
            if part.rows is not None:
                part.parameter.index_copy_(0, part.rows, part.w)

    def _warn_of_rounding(self, reached: Sequence[_Reached]) -> None:
        """Say once for each model how much of the perturbation weights of half precision take on."""
        if not any(part.w.dtype in _HALF for part in reached) or reached[0].parameter in _warned:
            return
        _warned[reached[0].parameter] = True
        steps = [
            torch.linalg.vector_norm((p if rows is None else p.index_select(0, rows)).double() - w.double())
            for p, rows, w in ((part.parameter, part.rows, part.w) for part in reached)
        ]
        moved = torch.linalg.vector_norm(torch.stack([s.to(steps[0].device) for s in steps])).item()
        told = "is rounded" if self._adaptive else f"moves them by {moved / self._rho:.0%} of rho"  # ASAM's is not rho
        warn(
            f"Weights of {next(part.w.dtype for part in reached if part.w.dtype in _HALF)} lose the perturbation to "
            f"rounding: it {told}. Keep the weights in float32 and run the forward pass under torch.autocast.",
            stacklevel=8,
        )
