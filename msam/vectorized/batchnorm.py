"""BatchNorm over each micro-batch, of all micro-batches in one call: the micro-batches become channels.

(m k, C, ...) is copied as (k, m C, ...), where channel (i, c) has the examples of micro-batch i alone, its mean and
variance, and its own scale and shift. So the number of kernels does not grow with m, and a kernel on a few examples
costs little more than its launch.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from msam.vectorized.operations import Operation, stacked


class BatchNorm(Operation):
    """`torch.nn.functional.batch_norm` in training, with both a weight and a bias, or neither."""

    def __init__(
        self,
        m: int,
        perturbed: Sequence[bool],
        adaptive: bool,
        running: tuple[Tensor | None, Tensor | None],
        settings: tuple[float, float],
    ) -> None:
        """As `Operation`; `running` are the mean and the variance that move, `settings` momentum and eps."""
        super().__init__(m, perturbed, adaptive)
        self._running, (self._momentum, self._eps) = running, settings
        self._pass: tuple[GradientEdge, list[Tensor]] | None = None
        """Where the gradient of the last pass starts, and what it may be taken of: the input, scales, shifts."""

    def renew(self, new: Operation) -> None:
        assert isinstance(new, BatchNorm)
        self._running = new._running

    def clean(self, x: Any, *params: Any) -> Tensor:
        return self._run(x, [p.expand(self.m, -1) for p in params])

    def ascent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> Tensor | None:
        dx, gradients = self._back(dy, by_x)
        self._keep(params, gradients)
        return dx

    def moved(self, scale: Tensor, x: Any, *params: Any) -> Tensor:
        return self._run(x, [stacked(weights) for weights in self._weights(scale, params)])

    def descent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> tuple[Tensor | None, ...]:
        dx, gradients = self._back(dy, by_x)
        return dx, *(None if own is None else own.sum(0) for own in gradients)

    def _run(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The function at weights of shape (m, C)."""
        leaves = [self._folded(x).requires_grad_(x.requires_grad)]
        leaves += [w.reshape(-1).detach().requires_grad_(want) for w, want in zip(weights, self.trained, strict=True)]
        kept = next((r for r in self._running if r is not None), weights[0] if weights else x)
        mean, variance = kept.new_zeros(2, leaves[0].shape[1])
        with torch.enable_grad():
            weight, bias = leaves[1:] or (None, None)
            y = F.batch_norm(leaves[0], mean, variance, weight, bias, True, 1.0, self._eps)
        self._pass = (get_gradient_edge(y), leaves) if y.requires_grad else None
        self._move((mean, variance))
        return self._unfolded(y.detach())

    @torch.no_grad()
    def _move(self, statistics: Sequence[Tensor]) -> None:
        """The running statistics move as if one micro-batch had followed the other."""
        stay = 1 - self._momentum
        for running, new in zip(self._running, statistics, strict=True):
            if running is not None:
                ages = torch.arange(self.m - 1, -1, -1, device=new.device, dtype=new.dtype)
                shares = self._momentum * stay**ages if stay else (ages == 0).to(new)
                running.mul_(stay**self.m).add_((new.view(self.m, -1) * shares.unsqueeze(1)).sum(0))

    def _back(self, dy: Tensor, by_x: bool) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients by the input, if wanted, and by each parameter, of shape (m, C)."""
        assert self._pass is not None
        (edge, leaves), self._pass = self._pass, None
        wanted = [t for number, t in enumerate(leaves) if t.requires_grad and (number or by_x)]
        gradients = dict(zip(map(id, wanted), torch.autograd.grad(edge, wanted, self._folded(dy)), strict=True))
        dx, *own = [gradients.get(id(t)) for t in leaves]
        return (None if dx is None else self._unfolded(dx)), [g if g is None else g.view(self.m, -1) for g in own]

    def _folded(self, x: Tensor) -> Tensor:
        """(m k, C, ...) as (k, m C, ...)."""
        k, C = len(x) // self.m, x.shape[1]
        y = torch.empty((k, self.m * C, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=_format(x))
        y.unflatten(1, (self.m, C)).copy_(x.detach().unflatten(0, (self.m, k)).transpose(0, 1))
        return y

    def _unfolded(self, y: Tensor) -> Tensor:
        """(k, m C, ...) as (m k, C, ...)."""
        k, C = len(y), y.shape[1] // self.m
        x = torch.empty((self.m * k, C, *y.shape[2:]), dtype=y.dtype, device=y.device, memory_format=_format(y))
        x.unflatten(0, (self.m, k)).transpose(0, 1).copy_(y.unflatten(1, (self.m, C)))
        return x


def _format(x: Tensor) -> torch.memory_format:
    """Channels last where they are, so that kernels for it are used."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
