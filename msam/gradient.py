"""The mSAM gradient, left in `.grad` for any optimizer to use."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from msam.atomic import Gradients, signals_held
from msam.batchnorm import Statistics
from msam.embedding import rows_only, tables
from msam.mean import Mean, mean_and_weight
from msam.microbatch import check_micro_batches, examples, fresh, split
from msam.noise import Noise
from msam.parallel import Replicas, unwrapped
from msam.perturbation import Weights
from msam.vectorized import Vectorized

Loss = Tensor | tuple[Tensor, float | Tensor]
"""A mean loss, or a mean loss and the weight (the count) of what it is the mean of."""


@dataclass(frozen=True)
class Step:
    """What one call of `backward` saw. All tensors are detached and on the model's device; nothing is synchronised.

    Under DistributedDataParallel it is what this rank saw.

    Attributes:
        loss: Mean loss at the weights w, as plain training would report it. Shape ().
        perturbed_loss: Mean of the losses at each micro-batch's own w + e_i, weighted alike. Shape ().
        gradient_norms: Norm ||g_i|| of each micro-batch's ascent gradient (ASAM: of |w| g_i), over the perturbed
            parameters, without the scaler's factor. Shape (m,); None for rho = 0, which takes no ascent gradient, and
            for `vectorized` if `loss_fn` returns weights, which are known for the mini-batch only.
    """

    loss: Tensor
    perturbed_loss: Tensor
    gradient_norms: Tensor | None

    @property
    def sharpness(self) -> Tensor:
        """How much the loss rose under the perturbations: `perturbed_loss - loss`. Shape ()."""
        return self.perturbed_loss - self.loss


def backward(
    loss_fn: Callable[[Any], Loss],
    batch: Any,
    model: nn.Module,
    *,
    rho: float,
    micro_batches: int | list[Any] | tuple[Any, ...] = 1,
    adaptive: bool = False,
    perturb: Callable[[str], bool] | None = None,
    same_noise: bool = True,
    vectorized: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> Step:
    """Add the mSAM gradient of a mini-batch to `.grad`: use it in place of `loss.backward()`.

    For every micro-batch S_i of the mini-batch S, with g_i the gradient of its mean loss at the weights w,

        e_i = rho * g_i / ||g_i||            its own perturbation; the norm is over all parameters together
        G   = sum_i |S_i|/|S| * grad L_{S_i}(w + e_i)

    and G is added to `.grad` (mSAM, arXiv 2302.09693; one micro-batch is SAM, arXiv 2010.01412). rho = 0 gives
    the plain gradient over the same micro-batches, at the price of plain training. Weight decay is the
    optimizer's and stays outside the perturbation.

    Running statistics, as of BatchNorm layers in train mode, move in the clean passes only, once for each
    micro-batch (see `msam.batchnorm`). Tensor hooks of a parameter see its ascent gradient and then its
    perturbed gradient, for each micro-batch; post-accumulate hooks see the latter only, as it adds up, and
    must not step an optimizer there. What DistributedDataParallel does is told in `msam.parallel`.

    Args:
        loss_fn: Takes a micro-batch and returns its mean loss, a scalar tensor; or the mean loss and its
            weight, >= 0, which counts what was averaged (the valid tokens, say): G is then weighted by it. It
            runs the forward pass only, and is called twice for each micro-batch (once if rho = 0), with the same
            tensors in fresh containers: it may pop from a dict, but must not write to a tensor. Weights that
            are numbers, or tensors on the CPU, are looked at, and a micro-batch of weight 0 is left out; of one
            whose weight lies on a GPU the gradient must be finite (that of `cross_entropy` is).
        batch: The mini-batch, of any structure that `msam.split` takes; None if `micro_batches` holds it.
        model: The module whose parameters are perturbed and receive the gradient; those with
            `requires_grad=False` are left alone. DistributedDataParallel and torch.compile may wrap it.
            Parameters outside it that the loss depends on get their gradient too, at unperturbed values, but
            are not put back if something goes wrong.
        rho: Radius of the perturbation, finite and >= 0, in the units of the weights.
        micro_batches: m >= 1, how many micro-batches; their sizes differ by one example at most. Or the list of
            micro-batches itself.
        adaptive: Take ASAM's perturbation (arXiv 2102.11600, equation 4 for the 2-norm with T_w = |w|, of all
            parameters, elementwise): e = rho * w^2 g / || |w| g ||, without the constant eta that its
            authors' code adds to |w|. Its rho is not comparable with SAM's.
        perturb: Says by a parameter's name whether it is perturbed; by default all are. The others stay at w and
            outside the norm, and get their gradient all the same.
        same_noise: Let both passes over a micro-batch see the same random numbers, so the same dropout masks. The
            CPU's and the GPUs' generators then end where one pass over each micro-batch would leave them;
            otherwise where two would.
        vectorized: Take all micro-batches through the model in one pass at w and one at their own w + e_i, where the
            default lets them take their turns. The result is the same up to rounding; it takes less time where
            micro-batches are small, and more memory: the activations of the whole mini-batch, and up to m gradients of
            each weight. `loss_fn` gets the whole batch, whose mean loss must be the mean of the micro-batches'.
            `msam.vectorized` says what it asks of a model; what it cannot do it refuses. If m does not divide the
            number of examples, m = 1 or rho = 0, micro-batches take their turns. Buffers other than BatchNorm's move
            once a step, and hooks of a parameter see its perturbed gradient alone, once.
        scaler: The `GradScaler` of fp16 training. Both passes are scaled; `unscale_`, `step` and `update` stay the
            caller's. A step that overflows anywhere leaves values that are not finite in `.grad`, for it to skip.

    Returns:
        The losses and ascent gradient norms of this call.

    Raises:
        ValueError: for an unusable rho, micro_batches or batch, a model without trainable or perturbed
            parameters, a loss that is not a scalar or does not depend on them, or a negative weight.
        NotImplementedError: for sharded parameters (FSDP, DeepSpeed), SyncBatchNorm or a static graph under
            DistributedDataParallel, reentrant activation checkpointing, embeddings with max_norm, and inside
            `parametrize.cached()`; if `vectorized`, for what cannot be done by micro-batch, by name.

    Whatever is raised, by `loss_fn` too, weights, buffers and `.grad` are then bit for bit what they were. Signals
    with handlers in Python (Ctrl-C; SIGTERM, SIGUSR1 and SIGUSR2 of a scheduler; timers and hang-ups) wait until the
    weights are no longer perturbed, but a second Ctrl-C does not; one that arrives at the very end finds the call
    finished. A gradient or norm that is not finite leaves values that are not finite in `.grad`, and the weights as
    they were. A graph that the caller kept from before the call, or from one of its passes, raises when it is used: the
    weights have moved since. What `loss_fn` keeps of the weights in a perturbed pass without copying may stay w + e.
    """
    check_rho(rho)
    parts, sizes = _parts(batch, micro_batches)
    network, ddp = unwrapped(model)
    params, perturbed = _parameters(network, perturb)
    replicas = Replicas(ddp)
    together = _together(model, perturbed, rho, adaptive, batch, sizes) if vectorized else None
    if together:
        parts, sizes = [batch], [examples(batch)]
    weights = together or Weights(perturbed, rho, adaptive)
    statistics = Statistics(network)
    sparse = [] if ddp or together else tables(model)
    noise = Noise(model, params) if rho and same_noise else None
    scaled = scaler.scale if scaler else lambda loss: loss

    def forward(
        part: Any, layers: Sequence[nn.Embedding], reduced: bool, noise: AbstractContextManager[None]
    ) -> tuple[Tensor, float | Tensor | None]:
        with replicas.silent(unless=reduced), rows_only(layers), together or nullcontext(), noise:
            return mean_and_weight(loss_fn(fresh(part)))

    def accumulate(loss: Tensor, share: float | Tensor, reduced: bool) -> None:
        share = share.to(loss.device, loss.dtype) if isinstance(share, Tensor) else share
        with replicas.silent(unless=reduced):
            scaled(loss * share).backward()

    losses, perturbed_losses, norms = [], [], []
    before = statistics.copied()
    gradients = Gradients(params, overwritten=replicas.overwrites)
    mean = Mean(sizes, gradients, replicas)
    try:
        gradients.set_aside()
        with replicas.watched():
            for number, part in enumerate(parts, start=1):
                last = number == len(parts)
                summed = [layer for layer in sparse if layer.weight.grad is not None]
                first = noise.first() if noise else nullcontext()
                loss, weight = forward(part, sparse if rho else summed, last and not rho, first)
                replicas.check_used()
                if weight is not None and number == 1:
                    for leaf in _leaves(loss):  # parameters outside the model are weighted alike
                        gradients.include(leaf)
                share = mean.share(weight, last)
                loss = _nothing_if(weight, loss, perturbed, ddp is not None)
                losses.append(loss.detach().clone())  # of a loss that is a view of a parameter too
                if not rho:
                    accumulate(loss, share, reduced=last)
                    continue

                if together:
                    gradient = together.ascent(scaled(loss), empty=isinstance(weight, float) and weight == 0)
                else:
                    gradient = _ascent_gradient(scaled(loss), perturbed)
                del loss  # and what the graph has kept for parameters that are not perturbed
                with signals_held(), weights.moved(gradient) as norm, statistics.kept():
                    loss, _ = forward(part, summed, last, noise.second() if noise else nullcontext())
                    loss = _nothing_if(weight, loss, perturbed, ddp is not None)
                    # The factor is 1, but NaN once the norm has overflowed: the step then shows it in .grad,
                    # where rho / inf = 0 would quietly make it a plain gradient. No wait for the device.
                    accumulate(loss * (1 + (norm - norm).sum()).to(loss.device), share, reduced=last)
                    perturbed_losses.append(loss.detach().clone())
                norms.append(norm)
    except BaseException:
        with signals_held(to_the_end=True):
            gradients.roll_back()
            statistics.put_back(before)
        raise
    with signals_held(to_the_end=True):
        gradients.commit()

    loss = mean.of(losses)
    if not rho:
        return Step(loss, loss, None)
    gradient_norms = torch.stack(norms).flatten() / scaled(torch.ones_like(norms[0]))
    if together:  # in one pass each counts as its share of the mini-batch: 1/m, or what loss_fn alone knows
        known = None if weight is not None else len(gradient_norms) * gradient_norms
        return Step(loss, mean.of(perturbed_losses), known)
    return Step(loss, mean.of(perturbed_losses), gradient_norms)


def check_rho(rho: float) -> None:
    """Refuse anything but a finite number >= 0.

    Raises:
        ValueError: with what was given.
    """
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not (math.isfinite(rho) and rho >= 0):
        raise ValueError(f"rho is {rho!r}, but must be a finite number, 0 (no perturbation) or greater.")


def _parts(batch: Any, micro_batches: int | list[Any] | tuple[Any, ...]) -> tuple[list[Any], list[int] | None]:
    """The micro-batches, and their numbers of examples unless nothing in a ready one can be counted."""
    if not isinstance(micro_batches, list | tuple):
        check_micro_batches(micro_batches)
        if batch is None:
            raise ValueError("batch is None: give the mini-batch, or a list of ready micro-batches as micro_batches.")
        parts = split(batch, micro_batches)
        return parts, [examples(part) for part in parts]
    if batch is not None:
        raise ValueError("micro_batches is a list of ready micro-batches, so batch must be None.")
    if not micro_batches:
        raise ValueError("micro_batches is an empty list: give at least one micro-batch.")
    try:
        return list(micro_batches), [examples(part) for part in micro_batches]
    except ValueError:
        return list(micro_batches), None


def _together(
    model: nn.Module, perturbed: Sequence[Tensor], rho: float, adaptive: bool, batch: Any, sizes: Sequence[int] | None
) -> Vectorized | None:
    """All micro-batches in one pass; None where there is nothing to gain, or their sizes differ."""
    if batch is None or sizes is None:
        raise ValueError("vectorized=True needs the mini-batch itself: give batch, and the number m as micro_batches.")
    if not rho or len(sizes) == 1 or min(sizes) < max(sizes):
        return None
    return Vectorized(model, perturbed, rho, adaptive, len(sizes), sum(sizes))


def _parameters(
    network: nn.Module, perturb: Callable[[str], bool] | None
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that are trained, and those among them that are perturbed."""
    if getattr(parametrize, "_cache_enabled", 0):
        raise NotImplementedError(
            "Inside torch.nn.utils.parametrize.cached() the second pass would see the weights of the first: "
            "call msam.backward outside of it."
        )
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("The model has no parameter with requires_grad=True, so there is nothing to train.")
    params = [p for _, p in named]
    perturbed = [p for name, p in named if perturb is None or perturb(name)]
    if not perturbed:
        names = ", ".join(name for name, _ in named[:5])
        raise ValueError(f"perturb chooses no parameter; it is asked about their names, such as {names}.")
    return params, perturbed


def _ascent_gradient(loss: Tensor, perturbed: Sequence[Tensor]) -> list[Tensor | None]:
    """g of each perturbed parameter; `.grad` and whatever waits for it are left alone."""
    gradient: list[Tensor | None] = list(torch.autograd.grad(loss, perturbed, allow_unused=True))
    if any(g is None for g in gradient) and _reentrant(loss):
        raise NotImplementedError(
            "Reentrant activation checkpointing hides its parameters from the ascent pass: use "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )
    if all(g is None for g in gradient):
        raise ValueError("The loss depends on no perturbed parameter of the model: does loss_fn call another model?")
    return gradient


def _reentrant(loss: Tensor) -> bool:
    """Whether the loss came through a checkpoint whose parameters torch.autograd.grad cannot see."""
    return any(node.name() == "CheckpointFunctionBackward" for node in _graph(loss))


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a backward pass from the loss accumulates gradients in."""
    return [node.variable for node in _graph(loss) if hasattr(node, "variable")]


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


def _nothing_if(weight: float | Tensor | None, loss: Tensor, perturbed: Sequence[Tensor], ddp: bool) -> Tensor:
    """The loss; or if its weight is 0, a loss of 0 with gradient 0, whatever came of averaging nothing.

    A reducer waits for every leaf of the pass, so there all of them get their 0; else one parameter will do.
    """
    if weight is None or isinstance(weight, Tensor) or weight > 0:
        if not loss.requires_grad:
            raise ValueError(
                "The loss depends on no parameter of the model: does loss_fn call another model, or run under no_grad?"
            )
        # A weight that is still a tensor lies on a device that must not be waited for.
        return torch.where(weight > 0, loss, torch.zeros_like(loss)) if isinstance(weight, Tensor) else loss
    anchors = (_leaves(loss) if ddp else []) or perturbed[:1]
    return sum(((p.reshape(-1)[:1] * 0).sum().to(loss.device, loss.dtype) for p in anchors), torch.zeros_like(loss))
