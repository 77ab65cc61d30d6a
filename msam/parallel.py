"""Data parallelism: one reduction of gradients a step, during its last backward pass.

Under DistributedDataParallel every rank splits its own batch and perturbs its own copy of the weights, so m counts the
micro-batches over all ranks when each of w ranks is given m / w. Only the last backward pass of a step is
seen by the reducer, which sends each bucket as soon as it is complete, as in plain training; all other passes, forward
passes included, are under `no_sync`. One scalar more is reduced: the weight of all micro-batches together, so
that ranks of different sizes count by their examples.

Buffers are left to DistributedDataParallel: with `broadcast_buffers` rank 0 sends its own (its running statistics
among them) to the others in the first forward pass of the next step.
"""

from collections.abc import Iterator
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
        self._forwards = 0

    def per_replica(self, weight: float | Tensor) -> float | Tensor:
        """The mean over all replicas of a number that each of them has."""
        if self._ddp is None:
            return weight
        device = next(self._ddp.module.parameters()).device
        total = torch.as_tensor(weight, dtype=torch.float64).to(device, copy=True)
        dist.all_reduce(total, group=self._ddp.process_group)
        return total / dist.get_world_size(self._ddp.process_group)

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


def unwrapped(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The network inside torch.compile's and DistributedDataParallel's wrappers, and the latter.

    Raises:
        NotImplementedError: for models whose parameters are sharded, or run by an engine of their own, and
            for SyncBatchNorm or a static graph under DistributedDataParallel; for embeddings with max_norm.
    """
    ddp: DistributedDataParallel | None = None
    while True:
        if isinstance(model, DistributedDataParallel):
            ddp, model = model, model.module
        elif (inner := dict(model.named_children()).get("_orig_mod")) is not None:  # torch.compile's
            model = inner
        else:
            break
    if ddp is not None and ddp.static_graph:
        raise NotImplementedError(
            "DistributedDataParallel(static_graph=True) counts on one backward pass a step: leave static_graph out."
        )
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise NotImplementedError(
                "nn.Embedding(max_norm=...) writes to its weights in the forward pass: leave max_norm out, and "
                "normalise after the optimizer's step."
            )
        if ddp is not None and isinstance(module, nn.SyncBatchNorm):
            raise NotImplementedError(
                "SyncBatchNorm averages over the ranks, whose micro-batches are perturbed apart: use BatchNorm, "
                "whose statistics are then those of a micro-batch, or GroupNorm."
            )
        if type(module).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            _refuse(type(module).__name__)
    for p in model.parameters():
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


def _refuse(what: str) -> None:
    raise NotImplementedError(
        f"{what} holds parts of the parameters only, and msam.backward perturbs whole ones: use "
        "DistributedDataParallel, or the bare module."
    )
