"""Scenarios of ddp_worker.py for `msam.loss`: who reduces, when, and what."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import msam
from tests.msam.small import convnet, data, gradients, loss_of, mlp

RHO = 0.3


def shard(batch, sizes, rank):
    """This rank's examples of a batch whose ranks hold `sizes`."""
    return tuple(t.split(sizes)[rank] for t in batch)


def tensors(ddp):
    return {name.removeprefix("module."): g.clone() for name, g in gradients(ddp).items() if g is not None}


class Redirected(nn.Module):
    """As Lightning runs a training step: the wrapper's forward pass is a method that computes the loss."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, batch):
        return msam.loss(loss_of(self.network), batch, self, rho=RHO, micro_batches=2)


def reductions(ddp):
    """A list that gets the size of each bucket that is reduced from now on."""
    sent = []

    def hook(_, bucket):
        sent.append(bucket.buffer().numel())
        return (
            dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    ddp.register_comm_hook(None, hook)
    return sent


def steps(rank, ddp, call):
    """Two steps, since DDP cuts its buckets after the first; what is sent in the second, and when."""
    sent = reductions(ddp)
    for _ in range(2):
        ddp.zero_grad()
        sent.clear()
        loss = call(shard(data(16, 5), [8, 8], rank))
        before = list(sent)
        loss.backward()
    grads = {name.removeprefix("network."): g for name, g in tensors(ddp).items()}
    return {"grad": grads, "sent": sent, "before_backward": before}


def loss_equal(rank, **options):
    ddp = DDP(mlp(), bucket_cap_mb=1e-4, **options)
    return steps(rank, ddp, lambda batch: msam.loss(loss_of(ddp), batch, ddp, rho=RHO, micro_batches=2))


def loss_bucket_views(rank):
    return loss_equal(rank, gradient_as_bucket_view=True)


def loss_find_unused(rank):
    return loss_equal(rank, find_unused_parameters=True)


def loss_inside(rank, **options):
    ddp = DDP(Redirected(mlp()), bucket_cap_mb=1e-4, **options)
    return steps(rank, ddp, ddp)


def loss_inside_find_unused(rank):
    return loss_inside(rank, find_unused_parameters=True)


def loss_compiled(rank):
    """torch.compile around the wrapper, as accelerate does it."""
    model = torch.compile(DDP(mlp()), backend="eager")
    batch = shard(data(16, 5), [8, 8], rank)
    msam.loss(loss_of(model), batch, model, rho=RHO, micro_batches=2).backward()
    return {"grad": {name.removeprefix("_orig_mod.module."): g for name, g in gradients(model).items()}}


def loss_uneven(rank):
    """6 examples on rank 0 and 3 on rank 1: a mean over ranks, as in plain training."""
    ddp = DDP(mlp())
    loss = msam.loss(loss_of(ddp), shard(data(9, 5), [6, 3], rank), ddp, rho=RHO, micro_batches=2)
    (2 * loss).backward()
    return {"grad": tensors(ddp)}


def loss_accumulated(rank):
    """The first two losses under no_sync, the third reduces the sum; a loss is dropped in between."""
    ddp = DDP(mlp())
    one = lambda seed: msam.loss(  # noqa: E731
        loss_of(ddp), shard(data(8, 5, seed=seed), [4, 4], rank), ddp, rho=RHO, micro_batches=2
    )
    with ddp.no_sync():
        for seed in (1, 2):
            (one(seed) / 3).backward()
    alone = tensors(ddp)
    one(9)
    (one(3) / 3).backward()
    return {"grad": tensors(ddp), "alone": alone}


def loss_spare(rank):
    """A layer that is never used."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": mlp(), "spare": nn.Linear(5, 3).double()})
    model.forward = lambda x: model["body"](x)
    ddp = DDP(model, find_unused_parameters=True)
    for _ in range(2):
        ddp.zero_grad()
        batch = shard(data(16, 5), [8, 8], rank)
        msam.loss(loss_of(ddp), batch, ddp, rho=RHO, micro_batches=2).backward()
    return {"grad": {name.removeprefix("body."): g for name, g in tensors(ddp).items()}}


def loss_drift(rank):
    """20 steps with momentum and BatchNorm in float32, and what rank 0's statistics are elsewhere."""
    ddp = DDP(convnet().float())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
    for seed in range(20):
        x, y = shard(data(12, 3, 8, 8, seed=seed), [6, 6], rank)
        optimizer.zero_grad()
        msam.loss(loss_of(ddp), (x.float(), y), ddp, rho=0.1, micro_batches=2).backward()
        optimizer.step()
    ddp(x.float())
    return {"state": ddp.module.state_dict()}


SCENARIOS = [
    loss_equal,
    loss_bucket_views,
    loss_find_unused,
    loss_inside,
    loss_inside_find_unused,
    loss_compiled,
    loss_uneven,
    loss_accumulated,
    loss_spare,
    loss_drift,
]
