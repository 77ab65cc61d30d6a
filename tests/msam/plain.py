"""mSAM written once more, for any module: weights moved in their place, plain autograd, nothing of the package.

It is what the zoo and the fuzzer compare `msam.backward` with. `msam.reference` works on pure functions and so cannot
show what becomes of buffers; this can.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LEAST = 1e-12
"""What the norm of a gradient counts for at least, so that one that is nothing but rounding moves little."""


@dataclass
class Plain:
    """What a step gives: the gradient by name, None of parameters that no loss depends on, and the mean losses."""

    gradient: dict[str, Tensor | None]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def plain_step(
    loss_fn: Callable[[Any], Any],
    parts: Sequence[Any],
    sizes: Sequence[int],
    model: nn.Module,
    rho: float,
    *,
    adaptive: bool = False,
    perturb: Callable[[str], bool] | None = None,
    shared: bool = False,
) -> Plain:
    """The mSAM gradient at the model's weights; its buffers and random numbers end as the passes at w leave them.

    Args:
        loss_fn: Returns a mean loss, or a pair of a mean loss and a number to weigh it by.
        parts: The micro-batches.
        sizes: Their numbers of examples, which weigh where `loss_fn` returns no number.
        model: Of float64.
        rho: Radius.
        adaptive: ASAM's perturbation.
        perturb: Which parameters are perturbed, by name.
        shared: One perturbation for all micro-batches.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moved = {name: p for name, p in named.items() if perturb is None or perturb(name)}
    w = {name: p.detach().clone() for name, p in named.items()}
    step = Plain(dict.fromkeys(named))
    starts, ends, ascents, weights = [], [], [], []
    for part, size in zip(parts, sizes, strict=True):
        starts.append(_state(model))
        loss, weight = _loss(loss_fn(part), size)
        ascents.append(_gradient(loss, moved) if weight else {})
        ends.append(_state(model))
        weights.append(weight)
        step.losses.append(loss.item())
    total = sum(weights) or 1.0
    together: dict[str, Tensor] = {}
    for ascent, weight in zip(ascents, weights, strict=True):
        for name, g in ascent.items():
            together[name] = together.get(name, torch.zeros_like(g)) + weight / total * g
    for part, size, weight, ascent, start in zip(parts, sizes, weights, ascents, starts, strict=True):
        if not weight:
            continue
        _back(start)
        step.norms.append(_move(moved, together if shared else ascent, rho, adaptive))
        for name, g in _gradient(_loss(loss_fn(part), size)[0], named).items():
            known = step.gradient[name]
            step.gradient[name] = weight / total * g + (0 if known is None else known)
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(w[name])
    _back(ends[-1])
    return step


def _loss(returned: Any, size: int) -> tuple[Tensor, float]:
    return (returned[0], float(returned[1])) if isinstance(returned, tuple) else (returned, float(size))


def _gradient(loss: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {name: g.to_dense() for name, g in zip(params, found, strict=True) if g is not None}


def _move(params: dict[str, nn.Parameter], g: dict[str, Tensor], rho: float, adaptive: bool) -> float:
    """Move by e = rho * T^2 g / max(||T g||, 1e-12), and return the norm."""
    T = {name: params[name].detach().abs() if adaptive else torch.ones_like(params[name]) for name in g}
    norm = sum(((T[name] * g[name]) ** 2).sum().item() for name in g) ** 0.5
    if norm and rho:
        with torch.no_grad():
            for name, step in g.items():
                params[name] += rho / max(norm, LEAST) * T[name] ** 2 * step
    return norm


State = tuple[list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]], list[tuple[Tensor, Tensor]], Tensor]


def _state(model: nn.Module) -> State:
    """Which buffers the modules hold (a forward pass may assign others), their values, and torch's generator."""
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    tensors = [*frozen, *(b for _, held in tables for b in held.values() if b is not None)]
    return tables, [(t, t.detach().clone()) for t in tensors], torch.get_rng_state()


@torch.no_grad()
def _back(state: State) -> None:
    tables, values, generator = state
    for table, held in tables:
        table.update(held)
    for t, value in values:
        t.copy_(value)
    torch.set_rng_state(generator)


def error(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> float:
    """The greatest error of a parameter's gradient, relative to its norm or a thousandth of the whole gradient's.

    A gradient that is exactly 0 but for rounding (the bias of a key) has no digits of its own, hence the thousandth.
    """
    whole = sum(g.square().sum().item() for g in theirs.values() if g is not None) ** 0.5
    errors = [0.0]
    for name, g in theirs.items():
        own = ours[name]
        if own is None and g is None:
            continue
        difference = (0 if own is None else own) - (0 if g is None else g)
        size = 0.0 if g is None else g.norm().item()
        errors.append(difference.norm().item() / (size + 1e-3 * whole + 1e-300))
    return max(errors) if all(e == e for e in errors) else float("nan")
