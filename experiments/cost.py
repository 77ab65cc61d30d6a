"""What a step costs: time, memory and bytes sent, against m and the number of workers (Table 4).

    python -m experiments run cost --profile cpu        # one run at a time, whatever --jobs says

Each run times steps of the base optimizer, the control, SAM and mSAM, interleaved (see `harness/work/timing.py`); seeds
are repetitions. The networks are those of Table 1 at their batch size, ResNet-8 also at half and twice its batch size,
and the deeper ResNet-20. On CPUs, two data-parallel workers with a core each are timed as well; on GPUs only one. The
gpu profile times each network eagerly and as a CUDA graph, in each way of running micro-batches, at two batch sizes.
"""

from dataclasses import replace

from experiments import bert_glue, resnet_cifar, vit_cifar, wrn_cifar
from experiments.harness.runs.grids import timing_of
from experiments.harness.runs.spec import Timing, Training

TABLE = "table4"

LARGEST_M = {"smoke": 4, "cpu": 16, "gpu": 16, "paper": 16}
ROUNDS = {"smoke": 3, "cpu": 20, "gpu": 50, "paper": 50}


def timed(cell: Training) -> Timing:
    """The timing run of all methods on a cell's network."""
    m, rounds = LARGEST_M[cell.profile], ROUNDS[cell.profile]
    return timing_of(cell, rho=0.05, micro_batches=m, rounds=rounds, workers=2 if cell.device == "cpu" else 1)


RUNS = {
    profile: [
        timed(next(cell for cell in experiment.RUNS[profile] if cell.dataset == "cifar10"))
        for experiment in (resnet_cifar, vit_cifar, wrn_cifar)
    ]
    for profile in ("smoke", "cpu", "paper")
}
RUNS["cpu"] += [timed(replace(resnet_cifar.CPU, batch_size=size)) for size in (64, 256)]
RUNS["cpu"] += [timed(replace(resnet_cifar.CPU, model="resnet20"))]

WAYS = ((False, "loop"), (True, "loop"), (True, "vectorized"), (True, "streams"), (True, "auto"))
"""How steps run in the `gpu` profile: whether they are captured, and how micro-batches run."""

SMALL = 128
"""A batch size with micro-batches of 8 images at m=16: the hardest case for a GPU."""

IMAGES = [replace(e.GPU, batch_size=size) for e in (resnet_cifar, vit_cifar, wrn_cifar) for size in (512, SMALL)]
RUNS["gpu"] = [
    replace(timed(cell), capture=capture, passes=passes)
    for cell in (*IMAGES, bert_glue.GPU)
    for capture, passes in WAYS
]
