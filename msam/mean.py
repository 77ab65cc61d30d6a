"""What `loss_fn` returns, and from the means over micro-batches to the mean over the mini-batch, on all replicas."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from msam.atomic import Gradients
from msam.parallel import Replicas

HALF = (torch.float16, torch.bfloat16)
LEAST = 1e-30
"""The least weight that is divided by."""


@dataclass(frozen=True)
class Output:
    """What `loss_fn` may return where a loss is not all.

    Attributes:
        loss: The micro-batch's mean loss, a scalar tensor.
        weight: What the loss counts for, >= 0: the valid tokens, or any other number. None: the examples.
        aux: Anything to be had back from the clean pass (logits, metrics), as `Step.aux`, its tensors detached.
    """

    loss: Tensor
    weight: float | Tensor | None = None
    aux: Any = None


class Mean:
    """Weights micro-batches by their examples, or by what `loss_fn` says that it counted.

    The number of examples is known beforehand: a micro-batch's loss is multiplied by its share of the mini-batch. A
    weight that `loss_fn` returns is known after its clean pass only. A loss is then multiplied by its weight over
    the greatest so far, so by 1 at most, which keeps fp16's range; what has accumulated in `.grad` follows when that
    unit grows, and at the last backward pass, the one that a reducer sees, when it becomes the sum.
    """

    def __init__(self, sizes: Sequence[int] | None, gradients: Gradients, replicas: Replicas) -> None:
        self._sizes, self._gradients, self._replicas = sizes, gradients, replicas
        self._counted: bool | None = None
        self._total: float | Tensor | None = None
        self._unit: float | Tensor | None = None
        self.weights: list[float | Tensor] = []
        """Of the micro-batches so far."""

    def count(self, weight: float | Tensor | None) -> None:
        """Take note of the next micro-batch.

        Args:
            weight: What `loss_fn` counted; None if it counts nothing.

        Raises:
            ValueError: if it counts some micro-batches only, or nothing where the examples are not known.
        """
        if self._counted is None:
            self._counted = weight is not None
        if self._counted != (weight is not None):
            raise ValueError("loss_fn must return a weight for every micro-batch, or for none.")
        if weight is None and self._sizes is None:
            raise ValueError(
                "The micro-batches hold no tensors whose examples could be counted: let loss_fn return "
                "(mean loss, count) or msam.Output(mean loss, weight)."
            )
        if weight is None:
            assert self._sizes is not None
            weight = self._sizes[len(self.weights)]
        self.weights.append(weight)

    def share(self, last: bool) -> float | Tensor:
        """What the loss of the micro-batch counted last is to be multiplied by before its gradient is added to `.grad`.

        Args:
            last: Whether this is the last micro-batch. What `.grad` holds is then made ready for it.
        """
        share = self._counted_share(last) if self._counted else self._examples_share()
        if last:
            self.join()
        return share

    def shares(self) -> list[float | Tensor]:
        """The shares of all micro-batches, once each has been counted."""
        total = _greater(self._replicas.mean_over_replicas(sum(self.weights)), LEAST)
        return [weight / total for weight in self.weights]

    def join(self) -> None:
        """What `.grad` held before joins it, where the backward pass that follows is reduced."""
        if self._replicas.reducing:
            self._gradients.join()

    def of(self, losses: Sequence[Tensor]) -> Tensor:
        """The weighted mean of the micro-batches' losses on this replica; NaN if all weights are 0."""
        total = sum(self.weights)
        if not isinstance(total, Tensor):
            total = total or math.nan
        return torch.stack([loss * (w / total) for loss, w in zip(losses, self.weights, strict=True)]).sum()

    def _examples_share(self) -> float | Tensor:
        if self._total is None:
            self._total = self._replicas.mean_over_replicas(sum(self._sizes or []))
        return self.weights[-1] / self._total

    def _counted_share(self, last: bool) -> float | Tensor:
        weight = self.weights[-1]
        unit, self._unit = self._unit, _greater(self._unit, weight)
        if last:
            self._unit = _greater(self._replicas.mean_over_replicas(sum(self.weights)), LEAST)
        if unit is not None and (isinstance(self._unit, Tensor) or self._unit != unit):
            self._gradients.scale(unit / self._unit)
        return weight / self._unit


class Total:
    """The weighted sum of gradients, of as many parameters."""

    def __init__(self, count: int) -> None:
        self._sums: list[Tensor | None] = [None] * count
        self._weight: float | Tensor = 0.0

    @torch.no_grad()
    def add(self, gradient: list[Tensor | None], weight: float | Tensor) -> None:
        """Add the gradient of a micro-batch of this weight. The list is emptied."""
        self._weight = self._weight + weight
        found = [place for place, g in enumerate(gradient) if g is not None]
        self._add(found, _times([g for g in gradient if g is not None], weight))
        gradient.clear()

    @torch.no_grad()
    def join(self, other: "Total") -> None:
        """Take in another sum, which is gone."""
        sums, other._sums = other._sums, []
        self._weight = self._weight + other._weight
        self._add([place for place, g in enumerate(sums) if g is not None], [g for g in sums if g is not None])

    def _add(self, places: Sequence[int], terms: Sequence[Tensor]) -> None:
        known, added = [], []
        for place, term in zip(places, terms, strict=True):
            total = self._sums[place]
            if total is not None and total.layout is term.layout is torch.strided:
                known.append(total)
                added.append(term)
            else:
                self._sums[place] = term if total is None else total + term
        if known:
            torch._foreach_add_(known, added)

    @torch.no_grad()
    def mean(self, params: Sequence[Tensor], replicas: Replicas | None) -> list[Tensor | None]:
        """The mean gradient; over all replicas if they are given. The sums are gone."""
        sums, self._sums = self._sums, []
        weight = self._weight
        if replicas is not None and replicas.several:
            weight = replicas.mean_over_replicas(weight)
            dense = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(params, sums, strict=True)]
            sums = [g / replicas.count for g in replicas.summed(dense)]
        means = iter(_times([g for g in sums if g is not None], 1 / _greater(weight, LEAST)))
        return [None if g is None else next(means) for g in sums]


def _times(tensors: Sequence[Tensor], factor: float | Tensor) -> list[Tensor]:
    """Each times a number, in one call of torch for all dense ones of a device and type."""
    products = list(tensors)
    groups: dict[Any, list[int]] = {}
    for place, t in enumerate(tensors):
        groups.setdefault((t.device, t.dtype) if t.layout is torch.strided else place, []).append(place)
    for places in groups.values():
        first = tensors[places[0]]
        number = factor.to(first.device, first.dtype) if isinstance(factor, Tensor) else factor
        dense = first.layout is torch.strided
        found = torch._foreach_mul([tensors[place] for place in places], number) if dense else (first * number,)
        for place, product in zip(places, found, strict=True):
            products[place] = product
    return products


def unpacked(returned: Any) -> tuple[Tensor, float | Tensor | None, Any]:
    """What `loss_fn` returned, checked: the mean loss, shape (), in float32 or better, its weight, and what else.

    A weight is a number if its value can be had without waiting for a device.

    Raises:
        ValueError: if the loss or the weight is no scalar, the weight is negative or not finite, or a tuple holds
            anything but a count.
    """
    if isinstance(returned, Output):
        loss, weight, aux = returned.loss, returned.weight, _detached(returned.aux)
    elif isinstance(returned, tuple) and not hasattr(returned, "_fields") and len(returned) == 2:
        (loss, weight), aux = returned, None
        _check_count(weight)
    else:
        loss, weight, aux = returned, None, None
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else _kind(loss)
        raise ValueError(
            f"loss_fn must return the micro-batch's mean loss, a scalar tensor; it returned {kind}. "
            "What else it has to return goes into msam.Output(loss, aux=...)."
        )
    loss = loss.reshape(()).float() if loss.dtype in HALF else loss.reshape(())
    return loss, _weight(weight, loss), aux


def _weight(weight: Any, loss: Tensor) -> float | Tensor | None:
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(f"loss_fn returned a weight of shape {tuple(weight.shape)}; it must be one number.")
        weight = weight.detach().reshape(()).to(loss.dtype)
    if weight is None or (isinstance(weight, Tensor) and weight.device.type != "cpu"):
        return weight
    if not isinstance(weight, Real | Tensor):
        raise ValueError(f"loss_fn returned a {_kind(weight)} as weight; it must be one number.")
    weight = float(weight)
    if not 0 <= weight < math.inf:
        raise ValueError(
            f"loss_fn returned the weight {weight}: the weight of a mean loss must be finite, and 0 or more."
        )
    if capturing(loss):
        raise NotImplementedError(
            f"loss_fn returned the weight {weight}, a number on the host, which every replay of a captured step would "
            "use again: return it as a tensor on the GPU."
        )
    return weight


def capturing(loss: Tensor) -> bool:
    """Whether what is computed now is recorded as a CUDA graph."""
    return loss.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_count(weight: Any) -> None:
    """Refuse what comes second in a tuple and is no count."""
    if isinstance(weight, Tensor):
        if weight.numel() == 1 and not (
            weight.is_floating_point() or weight.is_complex() or weight.dtype is torch.bool
        ):
            return
        kind = f"a tensor of {weight.dtype} and shape {tuple(weight.shape)}"
    elif isinstance(weight, Integral) and not isinstance(weight, bool):
        return
    else:
        kind = _kind(weight)
    raise ValueError(
        f"loss_fn returned a loss and {kind}. In a tuple the second is a count, an integer: return "
        "msam.Output(loss, aux=...) to have anything else back as Step.aux, or msam.Output(loss, weight=...) for a "
        "weight that is one number of any kind."
    )


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value}" if isinstance(value, int | float | str) else type(value).__name__


def _detached(aux: Any) -> Any:
    return _pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, aux)


def _greater(value: float | Tensor | None, other: float | Tensor) -> float | Tensor:
    """The greater of two numbers, at least 1e-30, so that it can be divided by. No wait for a device."""
    both = [v for v in (value, other) if v is not None]
    tensors = [v for v in both if isinstance(v, Tensor)]
    least = max([LEAST, *(v for v in both if not isinstance(v, Tensor))])
    if not tensors:
        return least
    greatest = tensors[0].clamp(min=least)
    for t in tensors[1:]:
        greatest = torch.maximum(greatest, t.to(greatest.device, greatest.dtype))
    return greatest
