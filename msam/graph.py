"""A whole training step as one CUDA graph: the host launches it with one call, however many micro-batches it has.

A step of m micro-batches has m times the launches of a SAM step, and a GPU that waits for launches takes m times as
long. `capture` records zero_grad, `backward`, clipping and the optimizer's step once; every later step is a replay.

What a replay cannot see is refused or looked after:

- Numbers of the host are those of the capture. Learning rates become tensors on the device, which schedulers write to;
  a change of anything else in the optimizer's groups raises. So does a weight that `loss_fn` returns as a number.
- Addresses are those of the capture. A batch is copied to where the first one lay. An optimizer's state that was loaded
  is copied to where the captured one lies; parameters that lie elsewhere raise.
- Random numbers of the two passes come from two states of the GPU's generator that advance alike.
- Python does not run: hooks raise, and whatever else `loss_fn` does besides calling torch happens once.

Not run on a GPU yet: its bookkeeping is tested on a CPU with a stand-in for the graph.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from msam.gradient import Step, backward
from msam.noise import twins
from msam.parallel import unwrapped
from msam.ways import Rehearsal

WARM = 3
"""Steps before the capture: what torch allocates, tunes and compiles at first is not part of the graph."""

FROM_ZERO = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adadelta)
"""Optimizers whose state before the first step may as well be zeros."""


class Graph(Protocol):
    """What records and replays."""

    def warm(self, step: Callable[[], Any]) -> None:
        """Run a step that is not recorded."""

    def record(self, step: Callable[[], Any]) -> Any:
        """Record a step, without running it, and return what it returns: tensors that each replay writes to."""

    def replay(self) -> None:
        """Run the step."""


class CudaGraph:
    """torch's own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        self.bytes: int | None = None
        for _, second in twins(device):
            self._graph.register_generator_state(second)

    def warm(self, step: Callable[[], Any]) -> None:
        """Run a step on a stream of its own, as torch asks for before a capture."""
        stream, usual = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            step()
        usual.wait_stream(stream)

    def record(self, step: Callable[[], Any]) -> Any:
        """Record a step; `bytes` is the peak of what it allocates, which the graph keeps."""
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        with torch.cuda.graph(self._graph):
            result = step()
        self.bytes = torch.cuda.max_memory_allocated(self._device) - before
        return result

    def replay(self) -> None:
        """Run the step; the second states of the generators first follow those that were drawn from outside."""
        for generator, second in twins(self._device):
            second.set_state(generator.get_state())
        self._graph.replay()


class Captured:
    """A training step, made by `capture`. Call it with a mini-batch.

    Attributes:
        replays: How many steps were replayed.
        eager: How many were not: batches of another shape than the captured one, or all of them by request.
        bytes: Peak memory of a step, which its graph keeps; None if nothing is captured.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None,
        scaler: torch.amp.GradScaler | None,
        options: dict[str, Any],
    ) -> None:
        self.replays = self.eager = 0
        self._loss_fn, self._model, self._optimizer = loss_fn, model, optimizer
        self._clip_norm, self._scaler, self._options = clip_norm, scaler, options
        self._params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._graph: Graph | None = None

    @property
    def bytes(self) -> int | None:
        """Peak memory of the captured step."""
        return getattr(self._graph, "bytes", None)

    def __call__(self, batch: Any) -> Step:
        """Take the step: `.grad` is set, the weights and the optimizer's state move.

        Args:
            batch: The mini-batch. One of the captured shape is copied and replayed, any other is run eagerly.

        Returns:
            The losses and norms of this step, which later ones leave alone.

        Raises:
            ValueError: if parameters, or settings of the optimizer other than the learning rate, are no longer those
                of the capture.
        """
        leaves, structure = _pytree.tree_flatten(batch)
        if self._graph is None or structure != self._structure or not all(map(_fits, leaves, self._leaves)):
            self.eager += 1
            return self._step(batch)
        self._check()
        for given, static in zip(leaves, self._leaves, strict=True):
            if isinstance(static, Tensor):
                static.copy_(given, non_blocking=True)
        self._graph.replay()
        self.replays += 1
        for p, g in zip(self._params, self._grads, strict=True):
            p.grad = g
        values = {name: _copied(getattr(self._result, name)) for name in ("loss", "perturbed_loss", "gradient_norms")}
        return replace(self._result, **values, aux=_pytree.tree_map(_copied, self._result.aux))

    def record(self, graph: Graph, batch: Any) -> None:
        """Capture the step; weights, state and random numbers are afterwards what they were.

        Args:
            graph: What records.
            batch: A mini-batch of the shape that is to be replayed.

        Raises:
            NotImplementedError: if a step does what cannot be captured.
        """
        leaves, self._structure = _pytree.tree_flatten(batch)
        self._leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        static = _pytree.tree_unflatten(self._leaves, self._structure)
        _to_tensors(self._optimizer, self._params[0].device)
        with _undone(self._model, self._optimizer, self._params, self._options):
            for _ in range(WARM):
                graph.warm(lambda: self._step(static))
        grads = [p.grad for p in self._params]
        for p in self._params:
            p.grad = None
        try:
            self._result = graph.record(lambda: self._step(static))
        except NotImplementedError:
            raise
        except RuntimeError as error:
            raise NotImplementedError(
                "The step cannot be captured: something in it waits for the GPU (.item(), .cpu(), printing a tensor, a "
                f"branch on a value), or torch cannot record it. Pass eager=True to run it as it is. {error}"
            ) from error
        finally:
            self._grads = [p.grad for p in self._params]
            for p, g in zip(self._params, grads, strict=True):
                p.grad = g
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._settings = [self._setting(group) for group in self._optimizer.param_groups]
        self._addresses = [p.data_ptr() for p in self._params]
        self._state = {p: dict(self._optimizer.state[p]) for p in self._params if p in self._optimizer.state}
        self._graph = graph

    def _setting(self, group: dict[str, Any]) -> dict[str, Any]:
        """What the graph takes from the host."""
        return {name: group[name] for name in self._optimizer.defaults if name != "lr" and name in group}

    def _step(self, batch: Any) -> Step:
        """What is captured."""
        self._optimizer.zero_grad(set_to_none=True)
        step = backward(self._loss_fn, batch, self._model, scaler=self._scaler, **self._options)
        if self._scaler is not None and self._clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._params, self._clip_norm)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return step

    @torch.no_grad()
    def _check(self) -> None:
        """What the graph works on is where it was, and what it was."""
        if any(p.data_ptr() != address for p, address in zip(self._params, self._addresses, strict=True)):
            raise ValueError("A parameter lies at another address than when the step was captured: capture it again.")
        for group, rate, settings in zip(self._optimizer.param_groups, self._rates, self._settings, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"]) if not isinstance(group["lr"], Tensor) else rate.copy_(group["lr"])
                group["lr"] = rate
            changed = [name for name, value in self._setting(group).items() if settings.get(name) != value]
            if changed:
                raise ValueError(
                    f"The optimizer's {changed[0]} has changed since the step was captured, and a replay would not "
                    "know: capture it again."
                )
        for p, held in self._state.items():
            now = self._optimizer.state[p]
            for name, value in held.items():
                if isinstance(value, Tensor) and now.get(name) is not value:  # load_state_dict
                    value.copy_(now[name]) if name in now else value.zero_()
                    now[name] = value


def capture(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    clip_norm: float | None = None,
    eager: bool = False,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> Captured:
    """Capture a whole training step as a CUDA graph: zero_grad, `msam.backward`, clipping, and the optimizer's step.

    Weights, the optimizer's state, gradients, buffers and random numbers are afterwards what they were; state that the
    optimizer had not made yet is zeros, from which its first step is the same. Learning rates become tensors.

    Args:
        loss_fn: As of `msam.backward`. What it does besides calling torch happens at the capture only, so metrics go
            through `msam.Output.aux`. A weight that it returns must be a tensor on the GPU.
        batch: A mini-batch of the shape that is to be replayed, on the GPU.
        model: On one CUDA device, in the mode (train or eval) that it is to be run in.
        optimizer: One whose step waits for nothing: SGD with fused=True, Adam or AdamW with capturable=True or
            fused=True, and the like.
        clip_norm: Norm to which the gradient is clipped.
        eager: Do not capture: every step is run as it is, on any device.
        scaler: The `GradScaler` of fp16 training. The optimizer must then be a fused one.
        **options: Those of `msam.backward`: rho, micro_batches, passes, and so on.

    Returns:
        A function of a mini-batch that takes a step and returns its `Step`.

    Raises:
        ValueError: for a model that is not on a GPU, an optimizer that waits for it, or one whose first step is not
            that from zeros.
        NotImplementedError: for what cannot be captured: hooks, DistributedDataParallel, steps that wait for the GPU.
    """
    captured = Captured(loss_fn, model, optimizer, clip_norm=clip_norm, scaler=scaler, options=options)
    if eager:
        return captured
    device = captured._params[0].device
    if device.type != "cuda":
        raise ValueError(f"The model is on a {device.type}, and CUDA graphs are for GPUs: pass eager=True.")
    check(model, optimizer, scaler)
    captured.record(CudaGraph(device), batch)
    return captured


def check(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
    """Refuse what a replay would leave out or get wrong.

    Raises:
        ValueError: for an optimizer that waits for the device.
        NotImplementedError: for the rest, by name.
    """
    network, ddp = unwrapped(model)
    if ddp is not None:
        raise NotImplementedError("A step under DistributedDataParallel cannot be captured: pass eager=True.")
    for name, module in network.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
        if any(not _of_torch(hook) for hook in hooks):
            raise NotImplementedError(
                f"{name or 'The model'} has a hook, which a replay does not call: remove it, or pass eager=True."
            )
    for name, p in network.named_parameters():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise NotImplementedError(
                f"The parameter {name} has a hook, which a replay does not call: remove it, or pass eager=True."
            )
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        if not (group.get("fused") or group.get("capturable")):
            raise ValueError(
                f"{kind} makes the host wait or takes its learning rate from it: build it with "
                f"{'fused=True' if isinstance(optimizer, torch.optim.SGD) else 'capturable=True or fused=True'}."
            )
        if scaler is not None and not group.get("fused"):
            raise ValueError(f"GradScaler makes the host wait for {kind} unless it is built with fused=True.")
        fresh = any(p.requires_grad and not optimizer.state.get(p) for p in group["params"])
        if fresh and (not isinstance(optimizer, FROM_ZERO) or group.get("dampening")):
            raise ValueError(f"The first step of {kind} is not that from zeros: take one step before the capture.")


def _of_torch(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.")


def _fits(given: Any, static: Any) -> bool:
    """Whether a part of a batch may take the place of the captured one."""
    if isinstance(static, Tensor):
        return isinstance(given, Tensor) and given.shape == static.shape and given.dtype == static.dtype
    return type(given) is type(static) and bool(given == static)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _to_tensors(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Learning rates become tensors, in place of which a scheduler would put numbers that a graph does not see."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor) or group["lr"].device != device:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)


@contextmanager
def _undone(
    model: nn.Module, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], options: dict[str, Any]
) -> Iterator[None]:
    """Steps in the block leave nothing but an optimizer's state of zeros where there was none."""
    state = options.get("state", ())
    modules = [state] if isinstance(state, nn.Module) else list(state)
    weights = [p.detach().clone() for p in params]
    moments = {p: {name: _copied(value) for name, value in optimizer.state.get(p, {}).items()} for p in params}
    with Rehearsal(unwrapped(model)[0], params, modules, options.get("generators", ())).undone():
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(params), weights)
                for p in params:
                    for name, value in optimizer.state.get(p, {}).items():
                        if isinstance(value, Tensor):
                            value.copy_(moments[p][name]) if name in moments[p] else value.zero_()
