"""Data parallelism: one reduction of gradients a step, during its last backward pass.

Under DistributedDataParallel every rank splits its own batch and perturbs its own copy of the weights, so m counts the
micro-batches over all ranks when each of w ranks is given m / w. Only the last backward pass of a step is
seen by the reducer, which sends each bucket as soon as it is complete, as in plain training; all other passes, forward
passes included, are under `no_sync`. One scalar more is reduced: the weight of all micro-batches together, so
that ranks of different sizes count by their examples.

Buffers are left to DistributedDataParallel: with `broadcast_buffers` rank 0 sends its own (its running statistics
among them) to the others in the first forward pass of the next step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Replicas:
    """The processes that train one model together; just this one without DistributedDataParallel."""

    def __init__(self, ddp: DistributedDataParallel | None) -> None:
        self._ddp = ddp
        self.several = ddp is not None
        self.overwrites = ddp is not None and ddp.gradient_as_bucket_view
        """Whether the reduction writes to tensors that `.grad` held before."""
        self.reducing = ddp is not None and ddp.require_backward_grad_sync
        """Whether the step ends with a reduction; not inside the caller's own `no_sync`, which accumulates."""
        self.count = dist.get_world_size(ddp.process_group) if ddp is not None else 1
        self._forwards = 0

    def mean_over_replicas(self, weight: float | Tensor) -> float | Tensor:
        """The mean over all replicas of a number that each of them has."""
        if self._ddp is None:
            return weight
        device = next(self._ddp.module.parameters()).device
        if isinstance(weight, Tensor):
            total = weight.to(device, torch.float64, copy=True)
        else:
            total = torch.full((), weight, dtype=torch.float64, device=device)  # which does not wait for the device
        dist.all_reduce(total, group=self._ddp.process_group)
        return total / self.count

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over all replicas of tensors that each of them has, one message for each type."""
        sums = [t.contiguous() for t in tensors]
        if self._ddp is None:
            return sums
        for kind in dict.fromkeys((t.device, t.dtype) for t in sums):
            places = [place for place, t in enumerate(sums) if (t.device, t.dtype) == kind]
            message = torch.cat([sums[place].flatten() for place in places])
            dist.all_reduce(message, group=self._ddp.process_group)
            parts = message.split([sums[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                sums[place] = part.view(sums[place].shape)
        return sums

    @contextmanager
    def silent(self, unless: bool) -> Iterator[None]:
        """Passes in the block send nothing, unless this is the one that reduces."""
        if self._ddp is None or (unless and self.reducing):
            yield
            return
        with self._ddp.no_sync():
            yield

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Know whether forward passes go through the wrapper, without which nothing would be reduced."""
        if self._ddp is None:
            yield
            return
        handle = self._ddp.register_forward_pre_hook(self._count)
        try:
            yield
        finally:
            handle.remove()

    def check_used(self) -> None:
        """Refuse a loss_fn that went past the wrapper.

        Raises:
            ValueError: if no forward pass has gone through it.
        """
        if self._ddp is not None and not self._forwards:
            raise ValueError(
                "loss_fn does not call the DistributedDataParallel model that msam.backward was given, so nothing "
                "would be reduced: call the wrapped model in loss_fn."
            )

    def _count(self, *_: object) -> None:
        self._forwards += 1


def expect_backward(ddp: DistributedDataParallel, params: Sequence[Tensor]) -> None:
    """Let the reducer reduce in the backward pass that delivers gradients now, although no forward pass announced it.

    Args:
        ddp: The wrapper.
        params: The parameters that get a gradient, for find_unused_parameters.
    """
    ddp.require_forward_param_sync = True  # the next step begins with rank 0's buffers
    with torch.enable_grad():
        used = [p.view_as(p) for p in params] if ddp.find_unused_parameters else []
    ddp.reducer._rebuild_buckets()
    ddp.reducer.prepare_for_backward(used)


def unwrapped(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The network inside torch.compile's and DistributedDataParallel's wrappers, and the latter.

    Raises:
        NotImplementedError: for models whose parameters are sharded, or run by an engine of their own, and
            for SyncBatchNorm, a static graph or join() under DistributedDataParallel; for embeddings with max_norm; for
            modules on a GPU that torch.compile runs as CUDA graphs (mode="reduce-overhead").
        ValueError: for lazy parameters that have no shape yet.
    """
    ddp: DistributedDataParallel | None = None
    while True:
        if isinstance(model, DistributedDataParallel):
            ddp, model = model, model.module
        elif (inner := dict(model.named_children()).get("_orig_mod")) is not None:  # torch.compile's
            _refuse_own_graphs(model)
            model = inner
        else:
            break
    if ddp is not None and ddp.static_graph:
        raise NotImplementedError(
            "DistributedDataParallel(static_graph=True) assumes one backward pass per step: leave static_graph out."
        )
    if ddp is not None and getattr(getattr(ddp, "_join_config", None), "enable", False):
        raise NotImplementedError(
            "Within DistributedDataParallel.join() a rank that has ended answers to one forward and one backward pass "
            "a step, and msam.backward takes more: leave join() out, and give every rank as many mini-batches."
        )
    for module in model.modules():
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None):
            _refuse_own_graphs(module)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise NotImplementedError(
                f"nn.{type(module).__name__}(max_norm=...) writes to its weights in the forward pass: leave max_norm "
                "out, and normalise after the optimizer's step."
            )
        if isinstance(module, nn.SyncBatchNorm) and (ddp is not None or _several_processes()):
            raise NotImplementedError(
                "SyncBatchNorm averages over ranks, but each rank perturbs its own micro-batches: use BatchNorm, whose "
                "statistics are then those of a micro-batch, or GroupNorm."
            )
        if type(module).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            _refuse(type(module).__name__)
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(f"The parameter {name} has no shape yet: run one forward pass before msam.backward.")
        if type(p).__name__ == "DTensor":
            _refuse("A DTensor (FSDP2 or tensor parallelism)")
        if hasattr(p, "ds_id"):
            _refuse("DeepSpeed's ZeRO stage 3")
    return model, ddp


def compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs any part of the model, which a change of how it is run would compile anew."""
    return any(
        "_orig_mod" in m._modules or m._compiled_call_impl
        for m in model.modules()
        if not isinstance(m, torch.jit.ScriptModule)
    )


def _refuse_own_graphs(module: nn.Module) -> None:
    """Refuse a module on a GPU that torch.compile runs as CUDA graphs of its own.

    Raises:
        NotImplementedError: with what to use instead.
    """
    asked = getattr(module._compiled_call_impl or module, "get_compiler_config", None)
    config: dict[str, object] = (asked() if asked else None) or {}
    if config.get("triton.cudagraphs") and any(p.is_cuda for p in module.parameters()):
        raise NotImplementedError(
            'torch.compile(mode="reduce-overhead") writes the results of each pass over those of the one before, and '
            "msam.backward needs both: compile in the default mode, and capture the whole step with msam.capture."
        )


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _refuse(what: str) -> None:
    raise NotImplementedError(
        f"{what} holds parts of the parameters only, and msam.backward perturbs whole ones: use "
        "DistributedDataParallel, or the bare module."
    )
