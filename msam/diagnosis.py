"""Is it on? How far the weights really are from w in the perturbed passes, measured from outside."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from msam.as_loss import Options
from msam.gradient import Returned, Step, backward, check_rho
from msam.parallel import unwrapped
from msam.ways import Rehearsal

NEAR = 0.01
"""Relative distance from rho up to which the weights count as moved by rho."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` measured. Printed, it is a sentence.

    Attributes:
        rho: The radius that was asked for.
        distances: How far the weights were from w in each perturbed pass, in the units of rho: the 2-norm of w' - w
            over the perturbed parameters; for `adaptive`, of (w' - w) / |w|. Shape (m,); empty for
            rho = 0.
        step: The record of the step, with `sharpness` and `gradient_norms`.
    """

    rho: float
    distances: Tensor
    step: Step

    @property
    def on(self) -> bool:
        """Whether every perturbed pass was at distance rho, within 1 %."""
        return bool(self.rho) and bool(((self.distances / self.rho - 1).abs() <= NEAR).all())

    def __str__(self) -> str:
        if not self.rho:
            return "rho is 0, so this is plain training over micro-batches."
        least, most = self.distances.min().item(), self.distances.max().item()
        seen = (
            f"the weights moved by {least:.3g} to {most:.3g} in {len(self.distances)} perturbed passes "
            f"(rho = {self.rho:g}), and the loss rose by {self.step.sharpness.item():.3g}"
        )
        if self.on:
            return f"On: {seen}."
        norms = self.step.gradient_norms
        if norms is not None and not norms.all():
            return f"Off: {seen}. The gradient of a micro-batch is 0, so it has no direction to move in."
        return f"Off: {seen}. Weights stored in bf16 or fp16 round the perturbation away: keep them in float32."


def diagnose(loss_fn: Callable[[Any], Returned], batch: Any, model: nn.Module, **options: Unpack[Options]) -> Diagnosis:
    """Take a step of `msam.backward` on trial, and measure how far the weights move. Everything is put back.

    It copies the weights once and waits for the device: for a look before training, not for each step. A training step
    itself shows `Step.sharpness`, which is above 0 unless rho is tiny, and `Step.gradient_norms`.

    Args:
        loss_fn: As of `msam.backward`.
        batch: The mini-batch; None if `micro_batches` is a list.
        model: As of `msam.backward`.
        **options: Those of `msam.backward`, but for `passes` and `vectorized`: micro-batches run one after the other.

    Returns:
        The measured distances; print them, or use `.on` in an assertion.

    Raises:
        ValueError: for `passes` or `vectorized`, which give the same gradient without moving the weights; and as
            `msam.backward`.

    >>> import torch, msam
    >>> torch.manual_seed(0) and None
    >>> model, x = torch.nn.Linear(3, 1), torch.randn(8, 3)
    >>> found = msam.diagnose(lambda part: model(part).square().mean(), x, model, rho=0.1, micro_batches=2)
    >>> found.on, [round(distance, 4) for distance in found.distances.tolist()]
    (True, [0.1, 0.1])
    """
    rho = check_rho(options.get("rho"))
    if options.get("vectorized") or options.get("passes", "loop") != "loop":
        raise ValueError(
            "msam.diagnose measures the weights that a loop over micro-batches moves: leave passes and vectorized out."
        )
    network, _ = unwrapped(model)
    perturb = options.get("perturb") or (lambda name: True)
    params = [p for name, p in network.named_parameters() if p.requires_grad and perturb(name)]
    w = [p.detach().clone() for p in params]
    distances: list[Tensor] = []

    def measured(part: Any) -> Returned:
        distances.append(_distance(params, w, options.get("adaptive", False)))
        return loss_fn(part)

    state = options.get("state", ())
    modules = [state] if isinstance(state, nn.Module) else list(state)
    with Rehearsal(network, list(network.parameters()), modules, options.get("generators", ())).undone():
        step = backward(measured, batch, model, **options)
    passes = torch.stack(distances)
    perturbed = passes[len(passes) // 2 :] if options.get("shared") else passes[1::2]
    return Diagnosis(rho, perturbed if rho else passes[:0], step)


@torch.no_grad()
def _distance(params: list[nn.Parameter], w: list[Tensor], adaptive: bool) -> Tensor:
    """From w to where the parameters are, in float64."""
    found = []
    for p, before in zip(params, w, strict=True):
        e, size = p.detach().double() - before.double(), before.double().abs()
        found.append(torch.linalg.vector_norm(torch.where(size > 0, e / size, 0) if adaptive else e).cpu())
    return torch.linalg.vector_norm(torch.stack(found))
