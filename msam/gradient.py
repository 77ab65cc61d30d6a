"""The mSAM gradient, left in `.grad` for any optimizer to use."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from msam.microbatch import check_micro_batches, examples, split


@dataclass(frozen=True)
class Step:
    """What one call of `backward` saw. All tensors are detached and on the model's device; nothing is synchronised.

    Attributes:
        loss: Mean loss at the weights w, as plain training would report it. Shape ().
        perturbed_loss: Mean over the examples of the losses at each micro-batch's own w + e_i. Shape ().
        gradient_norms: Norm ||g_i|| of each micro-batch's ascent gradient (ASAM: of |w| g_i). Shape (m,);
            None for rho = 0, which takes no ascent gradient.
    """

    loss: Tensor
    perturbed_loss: Tensor
    gradient_norms: Tensor | None

    @property
    def sharpness(self) -> Tensor:
        """How much the loss rose under the perturbations: `perturbed_loss - loss`. Shape ()."""
        return self.perturbed_loss - self.loss


def backward(
    loss_fn: Callable[[Any], Tensor],
    batch: Any,
    model: nn.Module,
    *,
    rho: float,
    micro_batches: int = 1,
    adaptive: bool = False,
) -> Step:
    """Add the mSAM gradient of a mini-batch to `.grad`: use it in place of `loss.backward()`.

    For every micro-batch S_i of the mini-batch S, with g_i the gradient of its mean loss at the weights w,

        e_i = rho * g_i / ||g_i||            its own perturbation; the norm is over all parameters together
        G   = sum_i |S_i|/|S| * grad L_{S_i}(w + e_i)

    and G is added to `.grad` (mSAM, arXiv 2302.09693; one micro-batch is SAM, arXiv 2010.01412). rho = 0 gives
    the plain gradient over the same micro-batches, at the price of plain training. Weight decay is the
    optimizer's and stays outside the perturbation.

    Both passes over a micro-batch see the same random numbers, so the same dropout masks; the CPU's and the
    GPUs' generators end where one clean pass over the micro-batches would leave them. Running statistics, as of
    BatchNorm layers in train mode, move in the clean passes only, once for each micro-batch.

    Args:
        loss_fn: Takes a micro-batch and returns its mean loss, a scalar tensor. It runs the forward pass
            only, and is called twice for each micro-batch (once if rho = 0).
        batch: The mini-batch, of any structure that `msam.split` takes.
        model: The module whose parameters are perturbed and receive the gradient; those with
            `requires_grad=False` are left alone.
        rho: Radius of the perturbation, finite and >= 0, in the units of the weights.
        micro_batches: m >= 1, how many micro-batches; their sizes differ by one example at most.
        adaptive: Take ASAM's perturbation (arXiv 2102.11600), rho * w^2 g / || |w| g ||, elementwise, without its
            constant eta. Its rho is not comparable with SAM's.

    Returns:
        The losses and ascent gradient norms of this call.

    Raises:
        ValueError: for an unusable rho, micro_batches or batch, a model without trainable parameters, or a
            loss that is not a scalar.
        NotImplementedError: for a model wrapped in DistributedDataParallel.

    Whatever is raised, by `loss_fn` too, weights, buffers and `.grad` are then bit for bit what they were.
    A gradient that is not finite leaves values that are not finite in `.grad`, and the weights as they were.
    """
    check_rho(rho)
    check_micro_batches(micro_batches)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise NotImplementedError(
            "msam.backward does not know DistributedDataParallel yet: pass the bare module and reduce .grad yourself."
        )
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("The model has no parameter with requires_grad=True, so there is nothing to train.")

    losses, perturbed_losses, norms = [], [], []
    total = examples(batch)
    with _all_or_nothing(model, params):
        weights = [p.detach().clone() for p in params] if rho else []
        for micro_batch in split(batch, micro_batches):
            share = examples(micro_batch) / total
            if not rho:
                loss = _scalar(loss_fn(micro_batch))
                (loss * share).backward()
                losses.append(loss.detach() * share)
                continue

            noise = _generator_states(params)
            loss = _scalar(loss_fn(micro_batch))
            gradient = torch.autograd.grad(loss, params, allow_unused=True)
            try:
                norm = _perturb(params, gradient, rho, adaptive)
                del gradient
                _set_generator_states(noise)
                with _statistics_kept(model):
                    # The factor is 1, but NaN once the norm has overflowed: the step then shows it in .grad,
                    # where rho / inf = 0 would quietly make it a plain gradient. No wait for the device.
                    perturbed_loss = _scalar(loss_fn(micro_batch)) * (1 + (norm - norm))
                    (perturbed_loss * share).backward()
            finally:
                _copy(weights, params)
            losses.append(loss.detach() * share)
            perturbed_losses.append(perturbed_loss.detach() * share)
            norms.append(norm)

    mean_loss = torch.stack(losses).sum()
    if not rho:
        return Step(mean_loss, mean_loss, None)
    return Step(mean_loss, torch.stack(perturbed_losses).sum(), torch.stack(norms))


def check_rho(rho: float) -> None:
    """Refuse anything but a finite number >= 0.

    Raises:
        ValueError: with what was given.
    """
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not (math.isfinite(rho) and rho >= 0):
        raise ValueError(f"rho is {rho!r}, but must be a finite number, 0 (no perturbation) or greater.")


@torch.no_grad()
def _perturb(params: Sequence[Tensor], gradient: Sequence[Tensor | None], rho: float, adaptive: bool) -> Tensor:
    """Move the parameters by e_i, in place; return the norm that e_i was divided by."""
    reached = [(p, g) for p, g in zip(params, gradient, strict=True) if g is not None]
    if not reached:
        raise ValueError("The loss depends on no parameter of the model: does loss_fn call another model?")
    w, g = [p for p, _ in reached], [g for _, g in reached]
    if adaptive:
        g = torch._foreach_mul(g, torch._foreach_abs(w))
    dtype = reduce(torch.promote_types, (t.dtype for t in g), torch.float32)
    norms = torch._foreach_norm(g, 2, dtype=dtype)
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    scale = rho / norm.clamp_min(1e-12)
    if adaptive:
        g = torch._foreach_mul(g, torch._foreach_abs(w))
    scales = {device: scale.to(device) for device in {t.device for t in g}}
    torch._foreach_add_(w, [t * scales[t.device].to(t.dtype) for t in g])
    return norm


@contextmanager
def _all_or_nothing(model: nn.Module, params: Sequence[Tensor]) -> Iterator[None]:
    """Collect new gradients apart from those already in `.grad`, and add them only if all went well."""
    before = [p.grad for p in params]
    buffers = _training_buffers(model)
    for p in params:
        p.grad = None
    try:
        yield
    except BaseException:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad
        _restore_buffers(buffers)
        raise
    for p, grad in zip(params, before, strict=True):
        if grad is not None:
            p.grad = grad if p.grad is None else grad.add_(p.grad)


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Put running statistics back afterwards, those of BatchNorm and of any layer with buffers of its own."""
    buffers = _training_buffers(model)
    try:
        yield
    finally:
        _restore_buffers(buffers)


def _training_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Module, name, tensor and a copy of each buffer that a forward pass may change."""
    return [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


@torch.no_grad()
def _restore_buffers(buffers: Sequence[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    for module, name, buffer, copy in buffers:
        buffer.copy_(copy)
        module._buffers[name] = buffer


@torch.no_grad()
def _copy(source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(target), list(source))


def _generator_states(params: Sequence[Tensor]) -> tuple[Tensor, dict[torch.device, Tensor]]:
    """States of the CPU's generator and of those of the GPUs that hold parameters."""
    gpus = {p.device for p in params if p.device.type == "cuda"}
    return torch.get_rng_state(), {gpu: torch.cuda.get_rng_state(gpu) for gpu in gpus}


def _set_generator_states(states: tuple[Tensor, dict[torch.device, Tensor]]) -> None:
    torch.set_rng_state(states[0])
    for gpu, state in states[1].items():
        torch.cuda.set_rng_state(state, gpu)


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return the micro-batch's mean loss, a scalar tensor; it returned {found}.")
    return loss.reshape(())
