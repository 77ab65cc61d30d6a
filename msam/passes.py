"""The passes of one step: what surrounds every call of `loss_fn` and every backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from msam.atomic import Gradients, Signals
from msam.embedding import rows_only
from msam.mean import Mean, mean_and_weight
from msam.microbatch import fresh
from msam.noise import Draws, Noise
from msam.parallel import Replicas
from msam.state import Snapshot, State


@dataclass
class Clean:
    """What a pass at w leaves for the pass at w + e."""

    loss: Tensor
    """L_i(w), gone once its gradient is taken."""
    weight: float | Tensor | None
    share: float | Tensor
    """What the loss counts for in the mini-batch's."""
    before: Snapshot
    """The state that it started from."""
    draws: Draws | None
    """The random numbers that it drew."""

    def take_loss(self) -> Tensor:
        """The loss, which stays here no longer: nor does its graph, and what that keeps of the forward pass."""
        loss, self.loss = self.loss, self.loss.detach()
        return loss


@dataclass
class Passes:
    """Forward and backward passes over the micro-batches of one step, in their order."""

    loss_fn: Callable[[Any], Any]
    count: int
    """How many micro-batches there are."""
    perturbed: Sequence[Tensor]
    """The parameters that are perturbed."""
    tables: Sequence[nn.Embedding]
    """Embedding layers whose gradients may be rows."""
    replicas: Replicas
    scaled: Callable[[Tensor], Tensor]
    """The loss times the scaler's factor."""
    state: State
    gradients: Gradients
    signals: Signals
    mean: Mean
    noise: Noise | None
    started: Snapshot
    """The state that the step started from."""
    mode: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """What else surrounds a forward pass."""
    losses: list[Tensor] = field(default_factory=list)
    perturbed_losses: list[Tensor] = field(default_factory=list)

    def clean(self, part: Any, again: bool = True) -> Clean:
        """The forward pass over the next micro-batch at w.

        Args:
            part: The micro-batch.
            again: Whether a pass at w + e follows. If not, the backward pass is the one to be reduced.
        """
        last = len(self.losses) + 1 == self.count
        before = self.state.taken("before") if again and self.losses else self.started
        draws = self.noise.draws() if self.noise else None
        tables = self.tables if again else self._summed()
        with self.replicas.silent(unless=last and not again), rows_only(tables), self.mode:
            with draws.first() if draws else nullcontext(), self.signals.heard():
                returned = self.loss_fn(fresh(part))
            loss, weight = mean_and_weight(returned)
        self.replicas.check_used()
        if weight is not None and not self.losses:
            for leaf in leaves(loss):  # parameters outside the model are weighted alike
                self.gradients.include(leaf)
        share = self.mean.share(weight, last)
        loss = self._nothing_if(weight, loss)
        self.losses.append(loss.detach().clone())  # of a loss that is a view of a parameter too
        return Clean(loss, weight, share, before, draws)

    def descend(self, part: Any, clean: Clean, norm: Tensor) -> None:
        """Both passes over a micro-batch at w + e: its gradient is added to `.grad`.

        Args:
            part: The micro-batch.
            clean: What its pass at w has left.
            norm: Norm of the ascent gradient.
        """
        last, draws = len(self.losses) == self.count, clean.draws
        with self.state.rewound(clean.before):
            with self.replicas.silent(unless=last), rows_only(self._summed()), self.mode:
                with draws.again() if draws else nullcontext(), self.signals.heard_twice():
                    returned = self.loss_fn(fresh(part))
                loss, _ = mean_and_weight(returned)
            loss = self._nothing_if(clean.weight, loss)
            # The factor is 1, but NaN once the norm has overflowed: the step then shows it in .grad,
            # where rho / inf = 0 would quietly make it a plain gradient. No wait for the device.
            self.accumulate(loss * (1 + (norm - norm).sum()).to(loss.device), clean.share)
            self.perturbed_losses.append(loss.detach().clone())

    def accumulate(self, loss: Tensor, share: float | Tensor) -> None:
        """The backward pass of what a loss counts for, into `.grad`."""
        share = share.to(loss.device, loss.dtype) if isinstance(share, Tensor) else share
        with self.replicas.silent(unless=len(self.losses) == self.count):
            self.scaled(loss * share).backward()

    def ascent_gradient(self, clean: Clean) -> list[Tensor | None]:
        """g of each perturbed parameter; `.grad` and whatever waits for it are left alone.

        The loss goes, and with it what the graph has kept for parameters that are not perturbed.
        """
        loss = clean.take_loss()
        gradient: list[Tensor | None] = list(torch.autograd.grad(self.scaled(loss), self.perturbed, allow_unused=True))
        if any(g is None for g in gradient) and _reentrant(loss):
            raise NotImplementedError(
                "Reentrant activation checkpointing hides its parameters from the ascent pass: use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        if all(g is None for g in gradient):
            raise ValueError(
                "The loss depends on no perturbed parameter of the model: does loss_fn call another model?"
            )
        return gradient

    def _summed(self) -> list[nn.Embedding]:
        """Tables whose gradient adds to one that is there."""
        return [layer for layer in self.tables if layer.weight.grad is not None]

    def _nothing_if(self, weight: float | Tensor | None, loss: Tensor) -> Tensor:
        """The loss; or if its weight is 0, a loss of 0 with gradient 0, whatever came of averaging nothing.

        A reducer waits for every leaf of the pass, so there all of them get their 0; else one parameter will do.
        """
        if weight is None or isinstance(weight, Tensor) or weight > 0:
            if not loss.requires_grad:
                raise ValueError(
                    "The loss depends on no parameter of the model: does loss_fn call another model, or run under "
                    "no_grad?"
                )
            # A weight that is still a tensor lies on a device that must not be waited for.
            return torch.where(weight > 0, loss, torch.zeros_like(loss)) if isinstance(weight, Tensor) else loss
        anchors = (leaves(loss) if self.replicas.several else []) or self.perturbed[:1]
        return sum(((p.reshape(-1)[:1] * 0).sum().to(loss.device, loss.dtype) for p in anchors), torch.zeros_like(loss))


def leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a backward pass from the loss accumulates gradients in."""
    return [node.variable for node in _graph(loss) if hasattr(node, "variable")]


def _reentrant(loss: Tensor) -> bool:
    """Whether the loss came through a checkpoint whose parameters torch.autograd.grad cannot see."""
    return any(node.name() == "CheckpointFunctionBackward" for node in _graph(loss))


def _graph(loss: Tensor) -> Iterator[Any]:
    """Every node of autograd's graph behind a loss, once."""
    seen: set[Any] = {None}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node
