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

from msam.mean import HALF

SWAPPED_ON = ("cpu",)
"""Types of devices whose parameters point to other memory while perturbed, instead of being moved in their place."""

SMALL = 2**20
"""Elements up to which parameters are moved together, as one call of torch, for which their steps take memory."""

AT_ONCE = 2**24
"""Elements of those that are moved together."""

_warned = WeakTensorKeyDictionary()
"""Its keys: a parameter of each model that was warned about, for as long as it lives."""


@dataclass(eq=False)
class _Moved:
    """A parameter that the loss depends on, or the rows of it that were looked up."""

    parameter: Tensor
    rows: Tensor | None
    """Indices of the rows; None for all of the parameter."""
    w: Tensor
    """The values to come back to: a copy, or the parameter's own memory if it points to other memory."""
    g: Tensor
    """The ascent gradient, of w's shape; deleted once the weights have moved."""
    other: Tensor | None = None
    """Memory that the parameter points to while it is perturbed."""

    @property
    def alone(self) -> bool:
        """Whether it is moved by itself, in float32 or better: rows, or a parameter of half precision."""
        return self.rows is not None or self.w.dtype in HALF


class Weights:
    """The perturbed parameters. Memory for whole ones is taken once and serves all micro-batches of a step.

    On the CPU a parameter of float32 or better points to other memory, which holds w + e, for the length of a
    perturbed pass: what was not touched needs neither a copy nor a way back. Not if anything else holds the parameter's
    memory, a view that a layer has kept, say, which would go on reading w; nor on a GPU, where memory is fast and
    compiled graphs hold addresses: such weights are moved in their place, and copied back.
    """

    def __init__(self, params: Sequence[Tensor], rho: float, adaptive: bool) -> None:
        self.params, self.rho = params, rho
        self.adaptive = adaptive
        self._memory: dict[Tensor, Tensor] = {}
        self._swapped: dict[Tensor, bool] = {}
        self._version: dict[Tensor, int] = {}
        self._moved: list[_Moved] = []

    @contextmanager
    def moved(self, gradient: list[Tensor | None]) -> Iterator[Tensor]:
        """Move by e = rho * T^2 g / ||T g||, T = 1 (ASAM: |w|, elementwise), for the length of the block.

        Args:
            gradient: g of each parameter, None where it has none. The list is emptied, to free it before the
                second pass.

        Yields:
            ||T g||, shape (), in float32 or better. Where it is not finite so are some weights in the block.
        """
        try:
            norm = self._move(self._ready(gradient))
            torch.clear_autocast_cache()  # else a surrounding autocast reuses its casts of the weights at w
            yield norm
        finally:
            self.put_back()
            torch.clear_autocast_cache()

    @torch.no_grad()
    def put_back(self) -> None:
        """Every parameter that is moved is w again. What fails is passed over, to be tried again, then raised."""
        moved, left = self._moved, []
        failures: list[Exception] = []
        whole = [part for part in moved if part.other is None and part.rows is None]
        try:
            if whole:
                torch._foreach_copy_([part.parameter for part in whole], [part.w for part in whole])
        except Exception:
            whole = []
        for part in moved:
            try:
                if part.other is not None:
                    part.parameter.data = part.w
                    increment_version(part.parameter)  # a graph that was kept must not read w for w + e
                elif part.rows is not None:
                    part.parameter.index_copy_(0, part.rows, part.w)
                elif not whole:
                    part.parameter.copy_(part.w)
            except Exception as error:
                failures.append(error)
                left.append(part)
        for part in moved:
            self._version[part.parameter] = part.parameter._version
        self._moved = left
        if failures:
            raise failures[0]

    @torch.no_grad()
    def _ready(self, gradient: list[Tensor | None]) -> list[_Moved]:
        """The parameters that have a gradient, with what they come back to. The list is emptied."""
        pairs = [(p, g) for p, g in zip(self.params, gradient, strict=True) if g is not None]
        gradient.clear()
        copied = []
        for p, g in pairs:
            if g.is_sparse:
                continue
            if p not in self._swapped:
                self._swapped[p] = p.device.type in SWAPPED_ON and p.dtype not in HALF and _nobody_else_holds(p)
            if p not in self._memory:
                self._memory[p] = torch.empty_like(p, requires_grad=False)
            if not self._swapped[p] and self._version.get(p) != p._version:
                copied.append(p)
        if copied:
            torch._foreach_copy_([self._memory[p] for p in copied], copied)
        return [self._parted(p, g) for p, g in pairs]

    def _parted(self, p: Tensor, g: Tensor) -> _Moved:
        if g.is_sparse:
            g = g.coalesce()
            rows = g.indices()[0]
            return _Moved(p, rows, p.detach().index_select(0, rows), g.values())
        if self._swapped[p]:
            return _Moved(p, None, p.detach(), g, self._memory[p])
        return _Moved(p, None, self._memory[p], g)

    @torch.no_grad()
    def _move(self, parts: list[_Moved]) -> Tensor:
        self._moved = parts
        if self.adaptive and (whole := [part for part in parts if not part.alone and part.other is None]):
            torch._foreach_mul_([part.parameter for part in whole], [part.g for part in whole])
        scaled = [self._scaled(part) for part in parts]
        norm, scale = radius(scaled, self.rho)
        factors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        in_place: dict[tuple[torch.device, torch.dtype], list[_Moved]] = {}
        for part in parts:
            kind = part.w.device, part.w.dtype
            if kind not in factors:
                factors[kind] = scale.to(part.w.device, part.w.dtype if part.w.dtype not in HALF else None)
            if part.alone:
                self._move_alone(part, factors[kind])
            elif part.other is not None:
                self._swap(part, part.other, factors[kind])
            else:
                in_place.setdefault(kind, []).append(part)
        for kind, group in in_place.items():
            self._move_in_place(group, factors[kind])
        self._warn_of_rounding(parts)
        for part in parts:
            del part.g
        return norm

    def _scaled(self, part: _Moved) -> Tensor:
        """T g, or what has its norm; ASAM's in the place where w + e will be: no further copy of the parameters."""
        if not self.adaptive:
            return part.g
        if part.alone:
            return part.g * part.w.abs()
        return torch.mul(part.w, part.g, out=part.other) if part.other is not None else part.parameter

    def _swap(self, part: _Moved, other: Tensor, scale: Tensor) -> None:
        along = other.mul_(part.w.conj()) if self.adaptive else part.g
        torch.addcmul(part.w, along, scale, out=other)
        part.parameter.data = other
        increment_version(part.parameter)  # a graph that was kept from elsewhere must not read w + e for w

    def _move_in_place(self, parts: Sequence[_Moved], scale: Tensor) -> None:
        """Move parameters of one device and type."""
        if self.adaptive:
            p, w = [part.parameter for part in parts], [part.w for part in parts]
            torch._foreach_mul_(p, [t.conj() for t in w])
            torch._foreach_mul_(p, scale)
            torch._foreach_add_(p, w)
            return
        for part in parts:
            if part.w.numel() > SMALL:
                part.parameter.addcmul_(part.g, scale)
        for group in _in_portions([part for part in parts if part.w.numel() <= SMALL]):
            steps = torch._foreach_mul([part.g for part in group], scale)
            torch._foreach_add_([part.parameter for part in group], steps)

    def _move_alone(self, part: _Moved, scale: Tensor) -> None:
        w, g = (part.w.float(), part.g.float()) if part.w.dtype in HALF else (part.w, part.g)
        moved = (w + g * scale.to(g.dtype) * (w.abs().square() if self.adaptive else 1)).to(part.w.dtype)
        if part.rows is None:
            part.parameter.copy_(moved)
        else:
            part.parameter.index_copy_(0, part.rows, moved)

    def _warn_of_rounding(self, parts: Sequence[_Moved]) -> None:
        """Say once for each model how much of the perturbation weights of half precision take on."""
        if not any(part.w.dtype in HALF for part in parts) or parts[0].parameter in _warned:
            return
        _warned[parts[0].parameter] = True
        steps = [
            torch.linalg.vector_norm((p if rows is None else p.index_select(0, rows)).double() - w.double())
            for p, rows, w in ((part.parameter, part.rows, part.w) for part in parts)
        ]
        distance = torch.linalg.vector_norm(torch.stack([s.to(steps[0].device) for s in steps])).item()
        effect = "is rounded" if self.adaptive else f"moves them by {distance / self.rho:.0%} of rho"  # ASAM's differs
        warn(
            f"Weights of {next(part.w.dtype for part in parts if part.w.dtype in HALF)} lose the perturbation to "
            f"rounding: it {effect}. Keep the weights in float32 and run the forward pass under torch.autocast.",
            stacklevel=8,
        )


def radius(scaled: list[Tensor], rho: float) -> tuple[Tensor, Tensor]:
    """||T g|| over all parameters together, and rho / ||T g||, both of shape () and in float32 or better."""
    dtype = reduce(torch.promote_types, {t.dtype for t in scaled}, torch.float32)
    norms = torch._foreach_norm(scaled, 2, dtype=dtype)
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return norm, rho / norm.clamp_min(1e-12)


def _in_portions(parts: Sequence[_Moved]) -> Iterator[list[_Moved]]:
    """The parts in their order, in lists of `AT_ONCE` elements."""
    portion: list[_Moved] = []
    elements = 0
    for part in parts:
        if portion and elements + part.w.numel() > AT_ONCE:
            yield portion
            portion, elements = [], 0
        portion.append(part)
        elements += part.w.numel()
    if portion:
        yield portion


def _nobody_else_holds(p: Tensor) -> bool:
    """Whether no other tensor, of the caller's or of a layer's, lies on the parameter's memory.

    torch counts the holders of a storage, but only for itself; where it does not, somebody might.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return False
    mine, fresh = p.untyped_storage(), torch.empty(1).untyped_storage()
    return bool(count(mine._cdata) <= count(fresh._cdata) + 1)
