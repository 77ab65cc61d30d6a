"""One of the processes of test_parallel.py: runs every scenario and writes down what its rank saw.

    python -m tests.msam.ddp_worker RANK WORLD FOLDER

The processes meet in a file of the folder and talk through gloo, as a training on CPUs would.
"""

import copy
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import msam
from tests.msam import ddp_losses
from tests.msam.ddp_losses import RHO, shard
from tests.msam.small import convnet, data, gradients, loss_of, mlp

IGNORED = -100


def tensors(ddp):
    return {name.removeprefix("module."): g for name, g in gradients(ddp).items()}


def equal(rank, vectorized=False, **options):
    """2 ranks x 2 micro-batches; what is sent, and when, by the second step: DDP cuts its buckets after the first."""
    ddp = DDP(mlp(), bucket_cap_mb=1e-4, **options)
    sent, before_pass = ddp_losses.reductions(ddp), []

    def loss_fn(part):
        before_pass.append(len(sent))
        return loss_of(ddp)(part)

    for _ in range(2):
        ddp.zero_grad()
        sent.clear()
        before_pass.clear()
        batch = shard(data(16, 5), [8, 8], rank)
        msam.backward(loss_fn, batch, ddp, rho=RHO, micro_batches=2, vectorized=vectorized)
    return {"grad": tensors(ddp), "sent": sent, "before_pass": before_pass}


def bucket_views(rank):
    return equal(rank, gradient_as_bucket_view=True)


def find_unused(rank):
    return equal(rank, find_unused_parameters=True)


def in_one_pass(rank):
    return equal(rank, vectorized=True)


def one_micro_batch(rank):
    """m=2 over both ranks: plain SAM on each."""
    ddp = DDP(mlp())
    msam.backward(loss_of(ddp), shard(data(16, 5), [8, 8], rank), ddp, rho=RHO)
    return {"grad": tensors(ddp)}


def shared(rank, over=True, **options):
    """3 and 2 micro-batches, 7 and 5 examples: one perturbation on each rank, or on both."""
    ddp = DDP(mlp(), **options)
    ddp.module[0].bias.grad = torch.ones(7, dtype=torch.float64)
    batch = shard(data(12, 5), [7, 5], rank)
    step = msam.backward(loss_of(ddp), batch, ddp, rho=RHO, micro_batches=3 - rank, shared=over)
    ddp.module[0].bias.grad -= 1
    return {"grad": tensors(ddp), "norms": step.gradient_norms}


def shared_over_ranks(rank):
    return shared(rank, over="ranks")


def shared_over_ranks_in_views(rank):
    return shared(rank, over="ranks", gradient_as_bucket_view=True)


def shared_counts_over_ranks(rank):
    """Weighted by what is valid, of which rank 1 has nothing in one micro-batch."""
    ddp = DDP(mlp())
    x, y = shard(data(12, 5), [7, 5], rank)
    if rank:
        y[:3] = IGNORED

    def loss_fn(part):
        return F.cross_entropy(ddp(part[0]), part[1], ignore_index=IGNORED), (part[1] != IGNORED).sum()

    msam.backward(loss_fn, (x, y), ddp, rho=RHO, micro_batches=2, shared="ranks")
    return {"grad": tensors(ddp)}


def joined(rank):
    """Uneven inputs under join(), which would wait for one reduction a step."""
    ddp = DDP(mlp())
    with ddp.join():
        call = lambda: msam.backward(loss_of(ddp), data(4, 5), ddp, rho=RHO, micro_batches=2)  # noqa: E731
        return refusal(NotImplementedError, call)


def control(rank):
    """rho = 0: the plain gradient over all examples."""
    ddp = DDP(mlp())
    msam.backward(loss_of(ddp), shard(data(16, 5), [10, 6], rank), ddp, rho=0, micro_batches=3)
    return {"grad": tensors(ddp)}


def uneven(rank):
    """6 examples on rank 0 and 3 on rank 1: micro-batches of 3, 3, 2 and 1."""
    ddp = DDP(mlp())
    msam.backward(loss_of(ddp), shard(data(9, 5), [6, 3], rank), ddp, rho=RHO, micro_batches=2)
    return {"grad": tensors(ddp)}


def counted(rank):
    """Weighted by valid labels, of which rank 1's last micro-batch has none."""
    ddp = DDP(mlp())
    x, y = data(12, 5)
    y[[0, 4]] = IGNORED
    y[9:] = IGNORED

    def loss_fn(part):
        return F.cross_entropy(ddp(part[0]), part[1], ignore_index=IGNORED), (part[1] != IGNORED).sum()

    msam.backward(loss_fn, shard((x, y), [6, 6], rank), ddp, rho=RHO, micro_batches=2)
    return {"grad": tensors(ddp)}


def accumulated(rank):
    """The first call inside the caller's no_sync, the second reduces the sum of both."""
    ddp = DDP(mlp())
    with ddp.no_sync():
        msam.backward(loss_of(ddp), shard(data(8, 5, seed=1), [4, 4], rank), ddp, rho=RHO, micro_batches=2)
    alone = {name: g.clone() for name, g in tensors(ddp).items()}
    objects = [p.grad for p in ddp.parameters()]
    msam.backward(loss_of(ddp), shard(data(8, 5, seed=2), [4, 4], rank), ddp, rho=RHO, micro_batches=2)
    same = all(p.grad is g for p, g in zip(ddp.parameters(), objects, strict=True))
    return {"grad": tensors(ddp), "alone": alone, "same_tensors": same}


def drift(rank):
    """50 steps with momentum and BatchNorm, in float32."""
    ddp = DDP(convnet().float())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for seed in range(50):
        x, y = shard(data(12, 3, 8, 8, seed=seed), [6, 6], rank)
        optimizer.zero_grad()
        msam.backward(loss_of(ddp), (x.float(), y), ddp, rho=0.1, micro_batches=2)
        optimizer.step()
    return {"weights": dict(ddp.module.named_parameters())}


def buffers(rank):
    """Running statistics are each rank's own after the step; the next forward pass brings rank 0's."""
    ddp = DDP(convnet())
    twin = copy.deepcopy(ddp.module)
    batch = shard(data(12, 3, 8, 8), [6, 6], rank)
    for part in msam.split(batch, 2):
        twin(part[0])
    msam.backward(loss_of(ddp), batch, ddp, rho=RHO, micro_batches=2)
    own = torch.equal(ddp.module[1].running_mean, twin[1].running_mean)
    after = ddp.module[1].running_mean.clone()
    ddp.eval()  # moves nothing itself, and still takes rank 0's
    ddp(batch[0])
    return {"own": own, "after_step": after, "after_next_forward": ddp.module[1].running_mean}


def not_finite(rank):
    """An infinite input on rank 1 alone."""
    ddp = DDP(mlp())
    before = copy.deepcopy(ddp.module.state_dict())
    x, y = shard(data(16, 5), [8, 8], rank)
    if rank == 1:
        x[0] = float("inf")
    msam.backward(loss_of(ddp), (x, y), ddp, rho=RHO, micro_batches=2)
    finite = [bool(torch.isfinite(p.grad).all()) for p in ddp.parameters()]
    kept = all(torch.equal(t, before[name]) for name, t in ddp.module.state_dict().items())
    return {"finite": finite, "kept": kept, "grad": tensors(ddp)}


class Optional(nn.Module):
    """A layer that is used if all inputs are positive, and one that never is."""

    def __init__(self):
        super().__init__()
        self.body, self.spare = mlp(), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.body(x)


def unused_and_empty(rank):
    """find_unused_parameters, and rank 1's last micro-batch has weight 0."""
    torch.manual_seed(0)
    ddp = DDP(Optional(), find_unused_parameters=True)
    parts = msam.split(shard(data(12, 5), [6, 6], rank), 2)

    def loss_fn(part):
        loss = loss_of(ddp)(part)
        return (loss * float("nan"), 0) if rank == 1 and part is parts[1] else (loss, 3)

    msam.backward(loss_fn, None, ddp, rho=RHO, micro_batches=parts)
    return {"grad": {name.removeprefix("body."): g for name, g in tensors(ddp).items() if "spare" not in name}}


def rolled_back(rank, **options):
    """An exception in the last backward pass, when `.grad` holds something already."""
    ddp = DDP(convnet(), **options)
    batch = shard(data(12, 3, 8, 8), [6, 6], rank)
    msam.backward(loss_of(ddp), batch, ddp, rho=RHO, micro_batches=2)
    before = copy.deepcopy(ddp.module.state_dict())
    grads = {name: g.clone() for name, g in tensors(ddp).items()}
    passes = iter(range(9))

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("out of memory, say")

    def loss_fn(part):
        last = next(passes) == 3
        x = F.conv2d(part[0], torch.eye(3, dtype=torch.float64)[:, :, None, None])
        return loss_of(ddp)((Fails.apply(x.requires_grad_()) if last else x, part[1]))

    try:
        msam.backward(loss_fn, batch, ddp, rho=RHO, micro_batches=2)
        raised = False
    except RuntimeError:
        raised = True
    kept = all(torch.equal(t, before[name]) for name, t in ddp.module.state_dict().items())
    same = all(torch.equal(g, grads[name]) for name, g in tensors(ddp).items())
    return {"raised": raised, "kept": kept, "same": same}


def rolled_back_bucket_views(rank):
    return rolled_back(rank, gradient_as_bucket_view=True)


def static_graph(rank):
    ddp = DDP(mlp(), static_graph=True)
    return refusal(NotImplementedError, lambda: msam.backward(loss_of(ddp), data(4, 5), ddp, rho=RHO))


def bare_module(rank):
    """loss_fn goes past the wrapper."""
    ddp = DDP(mlp())
    return refusal(ValueError, lambda: msam.backward(loss_of(ddp.module), data(4, 5), ddp, rho=RHO))


def sync_batchnorm(rank):
    ddp = DDP(convnet())
    ddp.module = nn.SyncBatchNorm.convert_sync_batchnorm(ddp.module)  # which DDP refuses to wrap on a CPU
    return refusal(NotImplementedError, lambda: msam.backward(loss_of(ddp), data(4, 3, 8, 8), ddp, rho=RHO))


def sync_batchnorm_inside(rank):
    """Without the wrapper, as in Lightning's training step."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(convnet())
    return refusal(NotImplementedError, lambda: msam.loss(loss_of(model), data(4, 3, 8, 8), model, rho=RHO))


def fsdp2(rank):
    """Parameters sharded over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return refusal(NotImplementedError, lambda: msam.backward(loss_of(model), data(4, 5), model, rho=RHO))


def refusal(kind, call):
    try:
        call()
    except kind as error:
        return {"said": str(error)}
    return {"said": None}


SCENARIOS = [
    equal,
    bucket_views,
    find_unused,
    in_one_pass,
    one_micro_batch,
    shared,
    shared_over_ranks,
    shared_over_ranks_in_views,
    shared_counts_over_ranks,
    joined,
    control,
    uneven,
    counted,
    accumulated,
    drift,
    buffers,
    not_finite,
    unused_and_empty,
    rolled_back,
    rolled_back_bucket_views,
    static_graph,
    bare_module,
    sync_batchnorm,
    sync_batchnorm_inside,
    *ddp_losses.SCENARIOS,
    fsdp2,
]


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    found = {scenario.__name__: scenario(rank) for scenario in SCENARIOS}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
