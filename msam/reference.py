"""mSAM as it is printed, for tests: slow, out of place, in float64. Nothing here is shared with `gradient.py`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]


def msam_gradient(
    loss_fn: Callable[[Parameters, Any], Tensor],
    w: Parameters,
    micro_batches: Sequence[Any],
    sizes: Sequence[int],
    rho: float,
    adaptive: bool = False,
    groups: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """The gradient G of mSAM (arXiv 2302.09693) at the weights w.

    Args:
        loss_fn: Takes parameters and a micro-batch, returns the mean loss; a pure function.
        w: Parameters by name, float64.
        micro_batches: The micro-batches S_i.
        sizes: Their numbers of examples |S_i|.
        rho: Radius of the perturbation.
        adaptive: ASAM's elementwise perturbation (arXiv 2102.11600, eta = 0).
        groups: Which micro-batches, by number, share one perturbation, that of the mean of their gradients; by
            default none do.

    Returns:
        G by name, of the parameters' shapes.

    Raises:
        ValueError: if a parameter is not float64.
    """
    if any(p.dtype != torch.float64 for p in w.values()):
        raise ValueError("The reference works in float64: convert the model with .double().")
    G = {name: torch.zeros_like(p) for name, p in w.items()}
    for group in groups or [[number] for number in range(len(micro_batches))]:
        g = {name: torch.zeros_like(p) for name, p in w.items()}
        for i in group:
            for name, g_i in _gradient(loss_fn, w, micro_batches[i]).items():
                g[name] += sizes[i] / sum(sizes[j] for j in group) * g_i
        T = {name: p.abs() if adaptive else torch.ones_like(p) for name, p in w.items()}
        norm = sum((((T[name] * g[name]) ** 2).sum() for name in w), torch.zeros((), dtype=torch.float64)).sqrt()
        e = {name: rho * T[name] ** 2 * g[name] / norm if norm > 0 else torch.zeros_like(g[name]) for name in w}
        for i in group:
            perturbed = _gradient(loss_fn, {name: w[name] + e[name] for name in w}, micro_batches[i])
            for name in w:
                G[name] += sizes[i] / sum(sizes) * perturbed[name]
    return G


def _gradient(loss_fn: Callable[[Parameters, Any], Tensor], w: Parameters, S_i: Any) -> dict[str, Tensor]:
    leaves = {name: p.detach().clone().requires_grad_() for name, p in w.items()}
    gradient = torch.autograd.grad(loss_fn(leaves, S_i), list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(w[name]) if g is None else g for name, g in zip(leaves, gradient, strict=True)}
