"""A stability run: the largest sharpness at which an interpolating minimum is still stable, predicted and simulated.

The loss is a scale times the mean of micro-batch losses L_i that all have their minimum at the same weights (the data
are interpolated). The scale changes only the sharpness lambda_max(H) of that minimum. Derivations and sources are in
docs/theory.md. The simulation takes the method's actual steps with gradients from autograd; only the prediction uses
Hessians.
"""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import msam
from experiments.harness.runs.record import Record
from experiments.harness.runs.spec import SpecError, Stability
from experiments.harness.tasks.process import set_torch, torch_environment
from experiments.harness.tasks.task import generator
from experiments.harness.work.session import Session

INPUTS = {"regression": 16, "two-layer": 6}
HIDDEN = 8

SCALES = 12
"""Number of scales that are simulated at once, if all of them take the same steps."""
WIDEST = (0.02, 20.0)
"""First and last scale of the search, as multiples of the largest scale at which plain gradient descent is stable."""
RESOLUTION = 1.004
"""The search ends when the smallest unstable scale is at most this multiple of the largest stable one."""

START = 1e-6
"""Initial distance from the minimum in an unnormalised simulation: small enough to stay in the linear regime."""
GROWN, GONE = 1e6, 1e-6
"""Loss relative to its initial value above which the minimum counts as left, and below which it counts as reached."""
ESCAPED = 100.0
"""Distance, in multiples of rho, beyond which a normalised simulation counts as unbounded."""


@dataclass(frozen=True)
class Minimum:
    """An interpolating minimum of a small model, in float64."""

    model: nn.Module
    """The model with its parameters at the minimum."""
    x: Tensor
    """(N, inputs)"""
    y: Tensor
    """(N, 1): the model's own outputs."""

    def loss(self, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Half the mean squared error."""
        return (functional_call(self.model, dict(params), (x,)) - y).square().mean() / 2

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights at the minimum."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def hessians(self, micro_batches: int) -> Tensor:
        """(m, P, P): each micro-batch's Hessian at the minimum."""
        flat, shape = _flat(self.weights)
        hessians = []
        for x, y in zip(self.x.chunk(micro_batches), self.y.chunk(micro_batches), strict=True):

            def loss(w: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
                return self.loss(_shaped(w, shape), x, y)

            hessians.append(jacrev(grad(loss))(flat))
        return torch.stack(hessians)


def measure(spec: Stability, record: Record, session: Session) -> None:
    """Find the largest stable sharpness of the spec's method by simulation, and predict it.

    The summary has `stable_sharpness`, `predicted_sharpness` and `relative_error`.

    Raises:
        Interrupted: if `session.stop` returns True; the run starts over next time.
        SpecError: for a spec that cannot be simulated.
    """
    check(spec)
    set_torch(spec)
    started = time.monotonic()
    record.add_environment({**session.environment, **torch_environment(spec)})
    minimum = interpolating_minimum(spec)
    sharpness = _largest(minimum.hessians(1)[0])
    ends = low, high = tuple(factor * 2 / spec.learning_rate / sharpness for factor in WIDEST)
    while high / low > RESOLUTION:
        session.stop_if_asked("Stopped between two rounds of the simulation.")
        one_by_one = spec.normalised and spec.rho > 0
        inner = np.geomspace(low, high, 3 if one_by_one else SCALES + 2)[1:-1]
        stable = [bounded(spec, minimum, inner[0])] if one_by_one else decaying(spec, minimum, torch.from_numpy(inner))
        edges = [low, *inner, high]
        first = next((i for i, ok in enumerate(stable) if not ok), len(inner))
        low, high = float(edges[first]), float(edges[first + 1])
        wide, narrow = math.log(ends[1] / ends[0]), math.log(RESOLUTION)
        session.report(round(100 * (wide - math.log(high / low))), round(100 * (wide - narrow)))
    if low == ends[0] or high == ends[1]:
        raise SpecError(
            f"There is no boundary between {WIDEST[0]} and {WIDEST[1]} times that of gradient descent: lower rho."
        )
    simulated = math.sqrt(low * high) * sharpness
    predicted = predicted_sharpness(spec, minimum)
    record.finish(
        {
            "stable_sharpness": simulated,
            "predicted_sharpness": predicted,
            "relative_error": simulated / predicted - 1,
            "wall_seconds": round(time.monotonic() - started, 3),
        }
    )


def check(spec: Stability) -> None:
    """Reject a spec that cannot be simulated.

    Raises:
        SpecError: if batches or micro-batches do not divide the examples equally.
    """
    if spec.examples % spec.batch_size or spec.batch_size % spec.micro_batches:
        raise SpecError(
            f"Batches of {spec.batch_size} and m={spec.micro_batches} must divide the {spec.examples} examples equally."
        )


def interpolating_minimum(spec: Stability) -> Minimum:
    """The spec's model at random weights, which are a minimum because the targets are the model's own outputs."""
    inputs = INPUTS[spec.model]
    draw = generator(spec.seed, inputs)
    x = torch.randn(spec.examples, inputs, generator=draw, dtype=torch.float64)
    if spec.model == "regression":
        model: nn.Module = nn.Linear(inputs, 1, bias=False)
    else:
        model = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) / p.shape[-1] ** 0.5)
        y = model(x)
    return Minimum(model, x, y)


def predicted_sharpness(spec: Stability, minimum: Minimum) -> float:
    """lambda_max(H) at which lambda_max(H + (rho/m) sum_i H_i^2) = 2 / eta, for H_i proportional to the minimum's.

    2 / eta if rho = 0, or if the perturbation is normalised: it is bounded then and stays close to the minimum.
    """
    limit = 2 / spec.learning_rate
    if not spec.rho or spec.normalised:
        return limit
    H_i = minimum.hessians(spec.micro_batches)
    H, squares = H_i.mean(0), (H_i @ H_i).mean(0)
    sharpness = _largest(H)

    def beyond(scale: float) -> float:
        return _largest(scale * H + spec.rho * scale**2 * squares) - limit

    return brentq(beyond, 0.0, limit / sharpness, rtol=1e-12) * sharpness


def decaying(spec: Stability, minimum: Minimum, scales: Tensor) -> Tensor:
    """For each scale of the loss, whether gradient descent or unnormalised SAM or mSAM returns to the minimum.

    Args:
        spec: The method; batches smaller than the data are redrawn at each step.
        minimum: The simulation starts at a small random distance from it.
        scales: (S,)

    Returns:
        (S,) booleans: whether the loss at the end is smaller than half-way. Growing out of the linear regime counts as
        False, and reaching the precision of the weights as True. All scales see the same batches.
    """
    flat, shape = _flat(minimum.weights)
    draw = generator(spec.seed, 1)
    away = torch.randn(flat.shape, generator=draw, dtype=torch.float64)
    w = (flat + START * away / away.norm()).repeat(len(scales), 1)
    m, steps = spec.micro_batches, spec.epochs * (spec.examples // spec.batch_size)
    eta, rho = spec.learning_rate, spec.rho

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return minimum.loss(_shaped(w, shape), x, y)

    per_micro_batch = vmap(grad(loss), in_dims=(None, 0, 0))  # all micro-batches at one point
    at_own_points = vmap(grad(loss))  # each micro-batch at a different point
    first = vmap(per_micro_batch, in_dims=(0, None, None))
    second = vmap(at_own_points, in_dims=(0, None, None))
    scale = scales[:, None, None]
    every_loss = vmap(loss, in_dims=(0, None, None))
    started = every_loss(w, minimum.x, minimum.y)
    left, half = torch.zeros(len(scales), dtype=torch.bool), started
    for step in range(steps):
        x, y = _batch(spec, minimum, draw)
        x, y = (part.unflatten(0, (m, -1)) for part in (x, y))
        g = scale * first(w, x, y)
        if rho:
            g = scale * second(w[:, None] + rho * g, x, y)
        w = w - eta * g.mean(1)
        now = every_loss(w, minimum.x, minimum.y)
        left |= ~(now < GROWN * started)
        if step + 1 == steps // 2:
            half = now
    return ~left & ((now < half) | (now < GONE * started))


def bounded(spec: Stability, minimum: Minimum, scale: float) -> bool:
    """Whether SGD steps with `msam.backward` stay near the minimum of the scaled loss.

    A perturbation of length rho does not vanish at the minimum, so the weights do not converge to it. Stable can only
    mean bounded.
    """
    network = copy.deepcopy(minimum.model)
    params = list(network.parameters())
    draw = generator(spec.seed, 1)
    with torch.no_grad():
        for p in params:
            p.add_(spec.rho * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    optimizer = torch.optim.SGD(params, spec.learning_rate)
    start = [p.detach() for p in minimum.model.parameters()]

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        return scale * minimum.loss(dict(network.named_parameters()), *batch)

    for _ in range(spec.epochs * (spec.examples // spec.batch_size)):
        optimizer.zero_grad()
        msam.backward(loss_fn, _batch(spec, minimum, draw), network, rho=spec.rho, micro_batches=spec.micro_batches)
        optimizer.step()
        away = sum(float((p.detach() - w).square().sum()) for p, w in zip(params, start, strict=True))
        if not away < (ESCAPED * spec.rho) ** 2:
            return False
    return True


def _batch(spec: Stability, minimum: Minimum, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """All the data, or a batch of it drawn without replacement."""
    if spec.batch_size == spec.examples:
        return minimum.x, minimum.y
    chosen = torch.randperm(spec.examples, generator=draw)[: spec.batch_size]
    return minimum.x[chosen], minimum.y[chosen]


def _largest(H: Tensor) -> float:
    return torch.linalg.eigvalsh(H)[-1].item()


def _flat(params: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, torch.Size]]:
    return torch.cat([p.flatten() for p in params.values()]), {name: p.shape for name, p in params.items()}


def _shaped(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
