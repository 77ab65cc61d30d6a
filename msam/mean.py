"""From the means over micro-batches to the mean over the mini-batch, on all replicas together."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from msam.atomic import Gradients
from msam.parallel import Replicas

HALF = (torch.float16, torch.bfloat16)


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
        self._total: float | Tensor = 0.0
        self._unit: float | Tensor | None = None
        self.weights: list[float | Tensor] = []
        """Of the micro-batches so far."""

    def share(self, weight: float | Tensor | None, last: bool) -> float | Tensor:
        """What the next micro-batch's loss is to be multiplied by before its gradient is added to `.grad`.

        Args:
            weight: What `loss_fn` counted; None if it counts nothing.
            last: Whether this is the last micro-batch. What `.grad` holds is then made ready for it.
        """
        if self._counted is None:
            self._counted = weight is not None
            if not self._counted and self._sizes is not None:
                self._total = self._replicas.per_replica(sum(self._sizes))
        if self._counted != (weight is not None):
            raise ValueError("loss_fn must return a weight for every micro-batch, or for none.")
        share = self._examples_share() if weight is None else self._counted_share(weight, last)
        if last and self._replicas.reducing:
            self._gradients.join()
        return share

    def of(self, losses: Sequence[Tensor]) -> Tensor:
        """The weighted mean of the micro-batches' losses on this replica; NaN if all weights are 0."""
        total = sum(self.weights)
        if not isinstance(total, Tensor):
            total = total or math.nan
        return torch.stack([loss * (w / total) for loss, w in zip(losses, self.weights, strict=True)]).sum()

    def _examples_share(self) -> float | Tensor:
        if self._sizes is None:
            raise ValueError(
                "The micro-batches hold no tensors whose examples could be counted: let loss_fn return "
                "(mean loss, weight)."
            )
        self.weights.append(self._sizes[len(self.weights)])
        return self.weights[-1] / self._total

    def _counted_share(self, weight: float | Tensor, last: bool) -> float | Tensor:
        unit, self._unit = self._unit, _greater(self._unit, weight)
        self.weights.append(weight)
        if last:
            self._unit = _greater(self._replicas.per_replica(sum(self.weights)), 1e-30)
        if unit is not None and (isinstance(self._unit, Tensor) or self._unit != unit):
            self._gradients.scale(unit / self._unit)
        return weight / self._unit


def mean_and_weight(returned: Any) -> tuple[Tensor, float | Tensor | None]:
    """What `loss_fn` returned, checked: the mean loss, shape (), in float32 or better, and its weight if it gave one.

    A weight is a number if its value can be had without waiting for a device.

    Raises:
        ValueError: if the loss or the weight is no scalar, or the weight is negative or not finite.
    """
    loss, weight = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return the micro-batch's mean loss, a scalar tensor; it returned {found}.")
    loss = loss.reshape(()).float() if loss.dtype in HALF else loss.reshape(())
    if isinstance(weight, Tensor):
        if weight.numel() != 1:
            raise ValueError(f"loss_fn returned a weight of shape {tuple(weight.shape)}; it must be one number.")
        weight = weight.detach().reshape(()).to(loss.dtype)
    if weight is None or (isinstance(weight, Tensor) and weight.device.type != "cpu"):
        return loss, weight
    weight = float(weight)
    if not 0 <= weight < math.inf:
        raise ValueError(f"loss_fn returned the weight {weight}; it counts what was averaged, so it must be 0 or more.")
    return loss, weight


def _greater(value: float | Tensor | None, other: float | Tensor) -> float | Tensor:
    """The greater of two numbers, at least 1e-30, so that it can be divided by."""
    both = [v for v in (value, other, 1e-30) if v is not None]
    if any(isinstance(v, Tensor) for v in both):
        like = next(v for v in both if isinstance(v, Tensor))
        return torch.stack([torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in both]).max()
    return max(both)
