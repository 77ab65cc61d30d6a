"""The mSAM gradient, left in `.grad` for any optimizer to use."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from msam import embedding
from msam.atomic import Gradients, transaction
from msam.mean import Mean, Output, Total
from msam.microbatch import ready_sizes, split_with_sizes, versions, whole_number
from msam.noise import Noise
from msam.parallel import Replicas, compiled, unwrapped
from msam.passes import Passes
from msam.perturbation import Weights
from msam.state import State
from msam.streams import Streams
from msam.vectorized import Vectorized, together
from msam.ways import WAYS, NoWholeBatch, Rehearsal, Way, fastest

Undo = list[Callable[[], object]]
Returned = Tensor | tuple[Tensor, int | Tensor] | Output
"""A mean loss, or a mean loss and the count of what it is the mean of, or these and anything else."""


@dataclass(frozen=True)
class Step:
    """What one call of `backward` saw. All tensors are detached and on the model's device; nothing is synchronised.

    Under DistributedDataParallel it is what this rank saw.

    Attributes:
        loss: Mean loss at the weights w, as plain training would report it. Shape ().
        perturbed_loss: Mean of the losses at each micro-batch's own w + e_i, weighted alike. Shape ().
        gradient_norms: Norm ||g_i|| of each micro-batch's ascent gradient (ASAM: of |w| g_i), over the perturbed
            parameters, without the scaler's factor. Shape (m,); None for rho = 0, which takes no ascent gradient, and
            for `vectorized` if `loss_fn` returns weights, which are known for the mini-batch only. Where all
            micro-batches share one perturbation it is that of their mean gradient alone, shape (1,).
        aux: What `loss_fn` returned as `Output.aux` from each clean pass; None of one that returned nothing of the
            kind. One entry for `vectorized`, which has one clean pass.
        passes: How the micro-batches ran: "loop", "vectorized" or "streams".
    """

    loss: Tensor
    perturbed_loss: Tensor
    gradient_norms: Tensor | None
    aux: tuple[Any, ...] = ()
    passes: Way = "loop"

    @property
    def sharpness(self) -> Tensor:
        """How much the loss rose under the perturbations, `perturbed_loss - loss`. Shape ()."""
        return self.perturbed_loss - self.loss


def backward(
    loss_fn: Callable[[Any], Returned],
    batch: Any,
    model: nn.Module,
    *,
    rho: float | Tensor,
    micro_batches: int | Tensor | list[Any] | tuple[Any, ...] = 1,
    adaptive: bool = False,
    perturb: Callable[[str], bool] | None = None,
    shared: bool | Literal["ranks"] = False,
    same_noise: bool = True,
    generators: Sequence[Any] = (),
    state: nn.Module | Sequence[nn.Module] = (),
    passes: Way | Literal["auto"] = "loop",
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

    Both passes over a micro-batch start from the same state (buffers, frozen parameters: see `msam.state`), which ends
    as the clean passes leave it; so running statistics, as of BatchNorm layers in train mode, move once for each
    micro-batch. Tensor hooks of a parameter see its ascent gradient and then its perturbed gradient, for each
    micro-batch; post-accumulate hooks see the latter only, as it adds up, and must not step an optimizer there. What
    DistributedDataParallel does is described in `msam.parallel`.

    Args:
        loss_fn: Takes a micro-batch and returns its mean loss, a scalar tensor; or the mean loss and an integer, a
            count of what was averaged (the valid tokens, say), by which G is then weighted; or `msam.Output`, for a
            weight of another kind and for anything to be had back as `Step.aux`. It runs the forward pass only, and
            is called twice for each micro-batch (once if rho = 0), with the same tensors in fresh containers: it may
            pop from a dict, but must not write to a tensor, which raises. Weights that are numbers, or tensors on
            the CPU, are looked at, and a micro-batch of weight 0 is left out; of one whose weight lies on a GPU the
            gradient must be finite (that of `cross_entropy` is).
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
        shared: One perturbation for all micro-batches, e = rho * g / ||g|| with g the mean of their gradients, in
            place of one for each: SAM by accumulation, the gradient that m = 1 gives (where examples meet in the loss
            alone), with the activations of one micro-batch in memory, one gradient more, and the state before each
            micro-batch. Under DistributedDataParallel g is the mean over this rank; "ranks" takes it over all ranks,
            which is synchronous SAM and takes one more reduction.
        same_noise: Let both passes over a micro-batch see the same random numbers, so the same dropout masks: those
            of torch's generators of the CPU and the parameters' GPUs, and of NumPy's and Python's global generators.
            They then end where one pass over each micro-batch would leave them; otherwise where two would.
        generators: Further generators that `loss_fn` draws from and `same_noise` covers: `torch.Generator`,
            `numpy.random.Generator` or `RandomState`, `random.Random`. Others go on drawing: random numbers of other
            libraries, or of another process (as of a data loader), differ between the passes.
        state: Modules outside `model` whose state `loss_fn` moves: a discriminator with spectral norm, a criterion
            with a memory bank. It is treated like the model's own.
        passes: How micro-batches run; the results are the same up to rounding. What a way cannot do it refuses.
            "loop": one after the other.
            "vectorized": all in one pass at w and one at their own w + e_i. It takes less time where micro-batches are
            small, and more memory: the activations of the whole mini-batch, and up to m gradients of each weight.
            `loss_fn` gets the whole batch, whose mean loss must be the mean of the micro-batches'; see
            `msam.vectorized`. If m does not divide the number of examples they run one after the other. Hooks of a
            parameter see its perturbed gradient alone, once.
            "streams": side by side on a GPU, each at a copy of the weights; see `msam.streams`.
            "auto": the fastest of these, as some steps show that are taken at the first call for a model and an m, and
            undone. `Step.passes` says which, `msam.ways.measured(model)` why. The loop under DistributedDataParallel.
        vectorized: A word for `passes="vectorized"`.
        scaler: The `GradScaler` of fp16 training. Both passes are scaled; `unscale_`, `step` and `update` stay the
            caller's. A step that overflows anywhere leaves values that are not finite in `.grad`, for it to skip.

    Returns:
        The losses and ascent gradient norms of this call.

    Raises:
        ValueError: for an unusable rho, micro_batches, batch or options, a model without trainable or perturbed
            parameters, a loss that is not a scalar or does not depend on them, a negative weight, or a `loss_fn`
            that calls backward() or writes to the batch.
        RuntimeError: for a call from within `loss_fn` of another that works on the same parameters.
        NotImplementedError: for sharded parameters (FSDP, DeepSpeed), SyncBatchNorm, a static graph or join() under
            DistributedDataParallel, reentrant activation checkpointing, embeddings with max_norm, CUDA graphs of
            torch.compile's own (mode="reduce-overhead"), and inside `parametrize.cached()`; for what `passes` cannot
            do, by name.

    Whatever is raised, by `loss_fn` too, weights, buffers and `.grad` are then bit for bit what they were, unless
    `loss_fn` itself wrote to a weight. Signals
    with handlers in Python (Ctrl-C; SIGTERM, SIGUSR1 and SIGUSR2 of a scheduler; timers and hang-ups) wait until the
    weights are no longer perturbed, but a second Ctrl-C does not; one that arrives at the very end finds the call
    finished. A gradient or norm that is not finite leaves values that are not finite in `.grad`, and the weights as
    they were. A graph that the caller kept from before the call, or from one of its passes, raises when it is used: the
    weights have moved since. What `loss_fn` keeps of the weights in a perturbed pass without copying may stay w + e.
    """
    rho, modules = check_rho(rho), [state] if isinstance(state, nn.Module) else list(state)
    parts, sizes = _parts(batch, micro_batches)
    network, ddp = unwrapped(model)
    params, perturbed = _parameters(network, perturb)
    choice = bool(rho) and len(parts) > 1 and ddp is None
    way = _way(passes, vectorized, shared, choice, whole=batch is not None and sizes is not None)
    if way == "auto":
        step = partial(backward, loss_fn, batch, model, rho=rho, micro_batches=micro_batches, adaptive=adaptive)
        step = partial(step, perturb=perturb, same_noise=same_noise, generators=generators, state=state, scaler=scaler)
        way = fastest(step, Rehearsal(network, params, modules, generators), (len(parts), adaptive))
    once = together(model, perturbed, rho, adaptive, sizes, batch) if way == "vectorized" and sizes else None
    if once:
        parts, sizes = [batch], [sum(sizes or [])]
    weights, replicas = Weights(perturbed, rho, adaptive), Replicas(ddp)
    side = Streams(model, params, weights, len(parts)) if way == "streams" and rho and len(parts) > 1 else None
    tables = [] if ddp or once or side else embedding.tables(model)
    kept = State([network, *modules], params, lazily=not compiled(model))
    started, gradients = kept.taken("start"), Gradients(params, overwritten=replicas.overwrites)
    undo: Undo = [weights.put_back, partial(kept.put_back, started), partial(embedding.dense_again, tables)]
    with transaction(params, gradients, undo) as signals, replicas.watched():
        run = Passes(
            loss_fn=loss_fn,
            count=len(parts),
            perturbed=perturbed,
            tables=tables,
            replicas=replicas,
            scaled=scaler.scale if scaler else lambda loss: loss,
            state=kept,
            gradients=gradients,
            signals=signals,
            mean=Mean([1] if sizes is None and len(parts) == 1 and not ddp else sizes, gradients, replicas),
            noise=Noise(model, params, generators) if rho and same_noise else None,
            started=started,
            written=versions(parts if batch is None else batch) if rho else (),
            shared=shared if rho else False,
            apart=side is not None,
        )
        if once:
            return _in_one_pass(run, once, batch)
        if side:
            return _side_by_side(run, side, parts)
        take = _with_one_perturbation if run.shared else _one_after_the_other
        return take(run, weights, parts)


def _one_after_the_other(passes: Passes, weights: Weights, parts: Sequence[Any]) -> Step:
    """The algorithm: every micro-batch S_i at w, and then at its own w + e_i."""
    norms = []
    for number, S_i in enumerate(parts, start=1):
        clean = passes.clean(S_i, again=weights.rho > 0)  # L_i(w)
        if not weights.rho:
            passes.accumulate(clean.loss, clean.share, last=number == len(parts))  # G += |S_i|/|S| * grad L_i(w)
            continue
        g_i = passes.ascent_gradient(clean)  # g_i = grad L_i(w)
        with weights.moved(g_i) as norm:  # w + e_i, e_i = rho * g_i / ||g_i||
            passes.descend(S_i, clean, norm)  # G += |S_i|/|S| * grad L_i(w + e_i)
        norms.append(norm)
    return _step(passes, torch.stack(norms) if norms else None)


def _with_one_perturbation(passes: Passes, weights: Weights, parts: Sequence[Any]) -> Step:
    """SAM by accumulation: every micro-batch S_i at w, and then every one at the same w + e."""
    cleans, total = [], Total(len(passes.perturbed))
    for S_i in parts:
        cleans.append(passes.clean(S_i))  # L_i(w)
        total.add(passes.ascent_gradient(cleans[-1]), passes.mean.weights[-1])  # g += |S_i|/|S| * grad L_i(w)
    g = total.mean(passes.perturbed, passes.replicas if passes.shared == "ranks" else None)
    shares = passes.mean.shares()
    with weights.moved(g) as norm:  # w + e, e = rho * g / ||g||
        for S_i, clean, share in zip(parts, cleans, shares, strict=True):
            passes.descend(S_i, replace(clean, share=share), norm)  # G += |S_i|/|S| * grad L_i(w + e)
    return _step(passes, norm.reshape(1))


def _in_one_pass(passes: Passes, once: Vectorized, S: Any) -> Step:
    """The same for all micro-batches at once: the mini-batch S at w, and then each micro-batch at its own w + e_i."""
    passes.mode = once
    clean = passes.clean(S)
    once.check_state(passes.state, passes.started)
    once.ascend(passes.scaled(clean.take_loss()), empty=isinstance(clean.weight, float) and clean.weight == 0)
    with once.moved() as norms:
        passes.descend(S, clean, norms)
    # In one pass each counts as its share of the mini-batch: 1/m, or what loss_fn alone knows.
    return _step(passes, None if clean.weight is not None else len(norms) * norms, "vectorized")


def _side_by_side(passes: Passes, side: Streams, parts: Sequence[Any]) -> Step:
    """The same on streams: every micro-batch S_i at w, and then at its own w + e_i, a copy."""
    norms = []
    with side.joined():
        for S_i in parts:
            with side.next():
                with side.at_w():
                    clean = passes.clean(S_i)  # L_i(w)
                g_i = passes.ascent_gradient(clean)  # g_i = grad L_i(w)
                with side.moved(g_i) as norm:  # w + e_i, e_i = rho * g_i / ||g_i||
                    loss = passes.moved(S_i, clean, norm)  # L_i(w + e_i)
                side.accumulate(passes.scaled(loss), passes.mean.weights[-1])  # G += |S_i| * grad L_i(w + e_i)
            norms.append(norm)
    side.check_state(passes.state, passes.started)
    side.finish()  # G / |S|
    return _step(passes, torch.stack(norms), "streams")


def _step(passes: Passes, norms: Tensor | None, way: Way = "loop") -> Step:
    """The record of a step, whose ascent gradients have these norms times the scaler's factor."""
    loss = passes.mean.of(passes.losses)
    perturbed_loss = passes.mean.of(passes.perturbed_losses) if passes.perturbed_losses else loss
    norms = None if norms is None else norms / passes.scaled(torch.ones_like(norms[0]))
    return Step(loss, perturbed_loss, norms, tuple(passes.aux), way)


def check_rho(rho: Any) -> float:
    """rho as a float, from a number of any type: of Python, of NumPy, or a tensor without dimensions.

    Raises:
        ValueError: for anything but a finite number >= 0, with what was given.
    """
    number = rho.item() if isinstance(rho, Tensor) and not rho.dim() and rho.dtype is not torch.bool else rho
    value = float(number) if isinstance(number, Real) and not isinstance(number, bool) else math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"rho is {rho!r}, but must be a finite number, 0 (no perturbation) or greater.")
    return value


def _parts(batch: Any, micro_batches: Any) -> tuple[list[Any], list[int] | None]:
    """The micro-batches, and their numbers of examples unless nothing in them can be counted."""
    if not isinstance(micro_batches, list | tuple):
        if batch is None:
            whole_number(micro_batches)
            raise ValueError("batch is None: give the mini-batch, or a list of ready micro-batches as micro_batches.")
        return split_with_sizes(batch, micro_batches)
    if batch is not None:
        raise ValueError("micro_batches is a list of ready micro-batches, so batch must be None.")
    if not micro_batches:
        raise ValueError("micro_batches is an empty list: give at least one micro-batch.")
    return list(micro_batches), ready_sizes(micro_batches)


def _way(passes: Any, vectorized: bool, shared: Any, choice: bool, whole: bool) -> Way | Literal["auto"]:
    """How micro-batches run.

    Args:
        passes: What the caller asked for.
        vectorized: The caller's word for one of the ways.
        shared: Whether micro-batches share a perturbation.
        choice: Whether there is more than one way for what is asked.
        whole: Whether the mini-batch itself is there, and can be counted.

    Raises:
        ValueError: for what there is not, or what does not go together, with the mend.
    """
    if passes not in (*WAYS, "auto"):
        raise ValueError(f"passes is {passes!r}, but must be one of {', '.join(map(repr, (*WAYS, 'auto')))}.")
    if shared not in (False, True, "ranks"):
        raise ValueError(f'shared is {shared!r}, but must be True (this rank), "ranks" (all ranks) or False.')
    if vectorized and passes not in ("loop", "vectorized"):
        raise ValueError(f"vectorized=True is passes='vectorized', but passes is {passes!r}: leave one out.")
    way: Way | Literal["auto"] = "vectorized" if vectorized else passes
    if shared and way != "loop":
        raise ValueError(f'passes="{way}" gives each micro-batch its own perturbation, shared one to all: choose one.')
    if way == "vectorized" and not whole:
        raise NoWholeBatch(
            'passes="vectorized" needs the mini-batch itself, of tensors: give batch, and the number m as '
            "micro_batches."
        )
    return "loop" if way == "auto" and not choice else way


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
        raise ValueError(f"perturb returned False for every parameter. It is called with their names, such as {names}.")
    return params, perturbed
