"""How much the loss rises around the weights: along random directions, by ascent, and by mSAM's perturbations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import msam

Loss = Callable[[Any], Tensor]
"""Takes a batch and returns its mean loss; in this module the model is always in eval mode."""


class Rise(NamedTuple):
    """What `micro_batch_sharpness` measures for one m."""

    sharpness: float
    """Mean over the micro-batches of L_i(w + e_i) - L_i(w)."""
    penalty: float
    """Mean of ||grad L_i(w)||; rho times this is the first-order term of `sharpness`."""
    squared: float
    """Mean of ||grad L_i(w)||^2."""


def random_sharpness(
    loss_fn: Loss, batch: Any, model: nn.Module, *, rho: float, directions: int, seed: int = 0
) -> np.ndarray:
    """The rises L(w + e) - L(w), (directions,), for e uniform on the sphere of radius rho over all parameters."""
    params = trained(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        before = loss_fn(batch).item()
        rises = []
        for _ in range(directions):
            e = [torch.randn(p.shape, generator=generator).to(p) for p in params]
            with moved(params, _scaled(e, rho)):
                rises.append(loss_fn(batch).item() - before)
    return np.array(rises)


def ascent_sharpness(loss_fn: Loss, batch: Any, model: nn.Module, *, rho: float, steps: int) -> float:
    """The largest L(w + e) - L(w) in projected gradient ascent over ||e|| <= rho: a lower bound of the maximum.

    The first step is SAM's, along the gradient to the boundary; each further step has length rho / 2.
    """
    params = trained(model)
    e = [torch.zeros_like(p) for p in params]
    before, best = None, 0.0
    for step in range(steps + 1):
        with moved(params, e):
            loss = loss_fn(batch)
            g = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        before = loss.item() if before is None else before
        best = max(best, loss.item() - before)
        e = [a + b for a, b in zip(e, _scaled(g, rho if step == 0 else rho / 2), strict=True)]
        if _norm(e) > rho:
            e = _scaled(e, rho)
    return best


def micro_batch_sharpness(loss_fn: Loss, batch: Any, model: nn.Module, *, rho: float, micro_batches: int) -> Rise:
    """m-sharpness: the mean rise of the micro-batch losses, each at its own perturbation of length rho.

    This is what `msam.backward` reports for m = micro_batches nearly equal parts; `.grad` is restored afterwards.
    """
    params = list(model.parameters())
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        step = msam.backward(loss_fn, batch, model, rho=rho, micro_batches=micro_batches)
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad
    assert step.gradient_norms is not None
    norms = step.gradient_norms.double()
    return Rise(step.sharpness.item(), norms.mean().item(), norms.square().mean().item())


def filter_normalised(model: nn.Module, seed: int) -> list[Tensor]:
    """A random direction whose filters are as long as the weights' (Li et al. 2018, arXiv 1712.09913, section 4).

    A filter is one output of a matrix or convolution. Biases and the weights of norms do not move, as in that paper.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for p in trained(model):
        d = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim < 2:
            direction.append(torch.zeros_like(p))
            continue
        over = tuple(range(1, p.ndim))
        length = torch.linalg.vector_norm(d, dim=over, keepdim=True).clamp_min(1e-12)
        direction.append(d / length * torch.linalg.vector_norm(p.detach(), dim=over, keepdim=True))
    return direction


def loss_slice(
    loss_fn: Loss,
    batch: Any,
    model: nn.Module,
    directions: Sequence[Sequence[Tensor]],
    positions: Sequence[Sequence[float]],
) -> list[float]:
    """L(w + a_1 d_1 + ...) at each position (a_1, ...), which has one number per direction."""
    params, losses = trained(model), []
    with torch.no_grad():
        for position in positions:
            e = [
                sum((a * part for a, part in zip(position, parts, strict=True)), torch.zeros_like(parts[0]))
                for parts in zip(*directions, strict=True)
            ]
            with moved(params, e):
                losses.append(loss_fn(batch).item())
    return losses


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, each once."""
    return [p for p in model.parameters() if p.requires_grad]


@contextmanager
def moved(params: Sequence[nn.Parameter], e: Sequence[Tensor]) -> Iterator[None]:
    """Move the weights to w + e within the block; afterwards they are restored bit for bit."""
    before = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            torch._foreach_add_(list(params), list(e))
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(params), before)


def _norm(e: Sequence[Tensor]) -> float:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.double()) for t in e])).item()


def _scaled(e: Sequence[Tensor], length: float) -> list[Tensor]:
    """e rescaled to this length; zero stays zero."""
    factor = length / max(_norm(e), 1e-300)
    return [t * factor for t in e]
