"""The passes of one step: what surrounds every call of `loss_fn` and every backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from msam.atomic import Gradients, Signals
from msam.embedding import rows_only
from msam.mean import Mean, unpacked
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
    """What the loss counts for in the mini-batch's; nothing yet if that is known later."""
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
    written: Sequence[tuple[Tensor, int]] = ()
    """The batch's tensors, and the versions that they must keep."""
    shared: bool | str = False
    """Whether all passes at w come before those at w + e, which is one for all; "ranks": for all ranks."""
    apart: bool = False
    """Whether each micro-batch has weights and state of its own, which are put into their places outside of this."""
    mode: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """What else surrounds a forward pass."""
    losses: list[Tensor] = field(default_factory=list)
    perturbed_losses: list[Tensor] = field(default_factory=list)
    aux: list[Any] = field(default_factory=list)
    """What else `loss_fn` returned from each pass at w."""

    def clean(self, part: Any, again: bool = True) -> Clean:
        """The forward pass over the next micro-batch at w.

        Args:
            part: The micro-batch.
            again: Whether a pass at w + e follows. If not, the backward pass is the one to be reduced.
        """
        number = len(self.losses) + 1
        last = number == self.count
        name = f"before {number}" if self.shared else "before"
        before = self.state.taken(name) if again and self.losses and not self.apart else self.started
        draws = self.noise.draws(keep=not self.shared) if self.noise else None
        tables = self.tables if again else self._summed()
        with self.replicas.silent(unless=last and not again), rows_only(tables), self._forward_only(again):
            with self.mode, draws.first() if draws else nullcontext(), self.signals.heard():
                returned = self.loss_fn(fresh(part))
            loss, weight, aux = unpacked(returned)
        self.replicas.check_used()
        if weight is not None and not self.losses:
            for leaf in leaves(loss):  # parameters outside the model are weighted alike
                self.gradients.include(leaf)
        self.mean.count(weight)
        share = 0.0 if self.shared or self.apart else self.mean.share(last)
        loss = self._nothing_if(weight, loss)
        self.losses.append(loss.detach().clone())  # of a loss that is a view of a parameter too
        self.aux.append(aux)
        return Clean(loss, weight, share, before, draws)

    def descend(self, part: Any, clean: Clean, norm: Tensor) -> None:
        """Both passes over a micro-batch at w + e: its gradient is added to `.grad`.

        Args:
            part: The micro-batch.
            clean: What its pass at w has left.
            norm: Norm of the ascent gradient.
        """
        last = len(self.perturbed_losses) + 1 == self.count
        with self.state.rewound(clean.before):
            loss = self.moved(part, clean, norm, last)
            if last and self.shared:
                self.mean.join()
            self.accumulate(loss, clean.share, last)

    def moved(self, part: Any, clean: Clean, norm: Tensor, last: bool = False) -> Tensor:
        """The forward pass over a micro-batch at w + e: its loss, shape ().

        Args:
            part: The micro-batch.
            clean: What its pass at w has left.
            norm: Norm of the ascent gradient.
            last: Whether the backward pass that follows is reduced.
        """
        draws = clean.draws
        with self.replicas.silent(unless=last), rows_only(self._summed()), self._forward_only():
            with self.mode, draws.again() if draws else nullcontext(), self.signals.heard_twice():
                returned = self.loss_fn(fresh(part))
            loss, _, _ = unpacked(returned)
        loss = self._nothing_if(clean.weight, loss)
        self.perturbed_losses.append(loss.detach().clone())
        # The factor is 1, but NaN once the norm has overflowed: the step then shows it in .grad,
        # where rho / inf = 0 would quietly make it a plain gradient. No wait for the device.
        return loss * (1 + (norm - norm).sum()).to(loss.device)

    def accumulate(self, loss: Tensor, share: float | Tensor, last: bool) -> None:
        """The backward pass of what a loss counts for, into `.grad`; it is reduced if it is the last."""
        share = share.to(loss.device, loss.dtype) if isinstance(share, Tensor) else share
        with self.replicas.silent(unless=last):
            self.scaled(loss * share).backward()

    @contextmanager
    def _forward_only(self, again: bool = True) -> Iterator[None]:
        """`loss_fn` is called in the block, which runs the forward pass and nothing else.

        Args:
            again: Whether another pass needs the batch as it was.

        Raises:
            ValueError: if `.grad`, a parameter or the batch has changed in the block.
        """
        before, versions = self.gradients.noted(), self.gradients.versions()
        yield
        if self.gradients.versions()[: len(versions)] != versions:
            raise ValueError(
                "loss_fn wrote to a trained parameter (F.embedding with max_norm does), which is not undone: write to "
                "parameters after the optimizer's step."
            )
        if any(g is not h or v != w for (g, v), (h, w) in zip(before, self.gradients.noted(), strict=True)):
            raise ValueError(
                "loss_fn has changed .grad of the model: it must run the forward pass only, and return the loss "
                "without calling backward() or zero_grad()."
            )
        changed = [tuple(t.shape) for t, version in self.written if t._version != version] if again else []
        if changed:
            raise ValueError(
                f"loss_fn wrote to a tensor of the batch, of shape {changed[0]}: both passes must see the same data, "
                "so write to a copy (x = x.clone()). The model is as before the call, the batch may not be."
            )

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
    return [node.variable for node in graph_of(loss) if hasattr(node, "variable")]


def _reentrant(loss: Tensor) -> bool:
    """Whether the loss came through a checkpoint whose parameters torch.autograd.grad cannot see."""
    return any(node.name() == "CheckpointFunctionBackward" for node in graph_of(loss))


def graph_of(loss: Tensor) -> Iterator[Any]:
    """Every node of autograd's graph behind a loss, once."""
    seen: set[Any] = {None}
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node
