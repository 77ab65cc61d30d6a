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
from msam.mean import HALF

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
    g: Tensor
    """The ascent gradient, of w's shape; deleted once the weights have moved."""
    lent: Tensor | None = None
    """Memory that stands in for the parameter's own while it is perturbed."""

    @property
    def alone(self) -> bool:
        """Whether it is moved by itself, in float32 or better: rows, or a parameter of half precision."""
        return self.rows is not None or self.w.dtype in HALF


class Weights:
    """The perturbed parameters. Memory for whole ones is taken once and serves all micro-batches of a step.

    On the CPU a parameter of float32 or better is lent memory that holds w + e, and points to it for the length of a
    perturbed pass: what was not touched needs neither a copy nor a way back. Not if anything else holds the parameter's
    memory, a view that a layer has kept, say, which would go on reading w; nor on a GPU, where memory is fast and
    compiled graphs hold addresses: such weights are moved in their place, and copied back.
    """

    def __init__(self, params: Sequence[Tensor], rho: float, adaptive: bool) -> None:
        self._params, self._rho, self._adaptive = params, rho, adaptive
        self._memory: dict[Tensor, Tensor] = {}
        self._lent: dict[Tensor, bool] = {}

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
                del part.g
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
        if p not in self._memory:
            self._lent[p] = p.device.type in LENT_ON and p.dtype not in HALF and _nobody_else_holds(p)
            self._memory[p] = torch.empty_like(p) if self._lent[p] else p.detach().clone()
        if self._lent[p]:
            return _Reached(p, None, p.detach(), g, self._memory[p])
        return _Reached(p, None, self._memory[p], g)

    @torch.no_grad()
    def _move(self, reached: Sequence[_Reached]) -> Tensor:
        scaled = [self._scaled(part) for part in reached]
        dtype = reduce(torch.promote_types, (t.dtype for t in scaled), torch.float32)
        norms = torch._foreach_norm(scaled, 2, dtype=dtype)
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        scale = self._rho / norm.clamp_min(1e-12)
        scales = {device: scale.to(device) for device in {part.w.device for part in reached}}
        for part in reached:
            if part.alone:
                self._move_alone(part, scales[part.w.device])
            elif part.lent is not None:
                self._move_lent(part, part.lent, scales[part.w.device])
        self._move_in_place([part for part in reached if part.lent is None and not part.alone], scales)
        self._warn_of_rounding(reached)
        return norm

    def _scaled(self, part: _Reached) -> Tensor:
        """T g, or what has its norm; ASAM's in the place where w + e will be: no further copy of the parameters."""
        if not self._adaptive:
            return part.g
        if part.alone:
            return part.g * part.w.abs()
        return torch.mul(part.w, part.g, out=part.lent) if part.lent is not None else part.parameter.mul_(part.g)

    def _move_lent(self, part: _Reached, lent: Tensor, scale: Tensor) -> None:
        along = lent.mul_(part.w.conj()) if self._adaptive else part.g
        torch.addcmul(part.w, along, scale.to(part.w.dtype), out=lent)
        part.parameter.data = lent
        increment_version(part.parameter)  # a graph that was kept from elsewhere must not read w + e for w

    def _move_in_place(self, parts: Sequence[_Reached], scales: dict[torch.device, Tensor]) -> None:
        if not parts:
            return
        p, w, g = ([getattr(part, name) for part in parts] for name in ("parameter", "w", "g"))
        factors = [scales[t.device].to(t.dtype) for t in w]
        if not self._adaptive:
            torch._foreach_addcmul_(p, g, factors)
            return
        torch._foreach_mul_(p, [t.conj() for t in w])
        for t, factor in zip(p, factors, strict=True):
            t.mul_(factor)
        torch._foreach_add_(p, w)

    def _move_alone(self, part: _Reached, scale: Tensor) -> None:
        w, g = (part.w.float(), part.g.float()) if part.w.dtype in HALF else (part.w, part.g)
        moved = (w + g * scale.to(g.dtype) * (w.abs().square() if self._adaptive else 1)).to(part.w.dtype)
        if part.rows is None:
            part.parameter.copy_(moved)
        else:
            part.parameter.index_copy_(0, part.rows, moved)

    @torch.no_grad()
    def _put_back(self, reached: Sequence[_Reached]) -> None:
        for part in reached:
            if part.lent is not None:
                part.parameter.data = part.w
                increment_version(part.parameter)  # nor w for w + e
            elif part.rows is not None:
                part.parameter.index_copy_(0, part.rows, part.w)
        whole = [part for part in reached if part.lent is None and part.rows is None]
        if whole:
            torch._foreach_copy_([part.parameter for part in whole], [part.w for part in whole])

    def _warn_of_rounding(self, reached: Sequence[_Reached]) -> None:
        """Say once for each model how much of the perturbation weights of half precision take on."""
        if not any(part.w.dtype in HALF for part in reached) or reached[0].parameter in _warned:
            return
        _warned[reached[0].parameter] = True
        steps = [
            torch.linalg.vector_norm((p if rows is None else p.index_select(0, rows)).double() - w.double())
            for p, rows, w in ((part.parameter, part.rows, part.w) for part in reached)
        ]
        moved = torch.linalg.vector_norm(torch.stack([s.to(steps[0].device) for s in steps])).item()
        told = "is rounded" if self._adaptive else f"moves them by {moved / self._rho:.0%} of rho"  # ASAM's is not rho
        warn(
            f"Weights of {next(part.w.dtype for part in reached if part.w.dtype in HALF)} lose the perturbation to "
            f"rounding: it {told}. Keep the weights in float32 and run the forward pass under torch.autocast.",
            stacklevel=8,
        )


def _nobody_else_holds(p: Tensor) -> bool:
    """Whether no other tensor, of the caller's or of a layer's, lies on the parameter's memory.

    torch counts the holders of a storage, but tells it in private only; where it does not, somebody might.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return False
    mine, fresh = p.untyped_storage(), torch.empty(1).untyped_storage()
    return bool(count(mine._cdata) <= count(fresh._cdata) + 1)
