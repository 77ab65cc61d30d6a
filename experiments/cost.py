"""What a step costs: time, memory and bytes sent, against m and the number of workers (Table 4).

    python -m experiments run cost --profile cpu        # one run at a time, whatever --jobs says

Each run times the base optimizer, its control, SAM and mSAM in turn, see `harness/work/timing.py`; seeds repeat it.
The networks are those of Table 1 at their batch size, and a deeper one (ResNet-20) for the scaling with size; ResNet-8
also at half and twice the batch. On CPUs two data-parallel workers, a core each, follow; on GPUs one worker is timed.
"""

from dataclasses import replace
from typing import Any

from experiments import resnet_cifar, vit_cifar, wrn_cifar
from experiments.harness.runs.spec import Spec

TABLE = "table4"

LARGEST_M = {"smoke": 4, "cpu": 16, "paper": 16}
ROUNDS = {"smoke": 3, "cpu": 20, "paper": 50}


def timed(base: Spec, **changes: Any) -> Spec:
    """The cost run of a base optimizer's cell."""
    return replace(
        base,
        kind="cost",
        rho=0.05,
        micro_batches=LARGEST_M[base.profile],
        epochs=ROUNDS[base.profile],
        warmup_epochs=0.0,
        workers=2 if base.device == "cpu" else 1,
        **changes,
    )


RUNS = {
    profile: [
        timed(next(cell for cell in experiment.RUNS[profile] if cell.dataset == "cifar10"))
        for experiment in (resnet_cifar, vit_cifar, wrn_cifar)
    ]
    for profile in ("smoke", "cpu", "paper")
}
RUNS["cpu"] += [timed(resnet_cifar.CPU, batch_size=64), timed(resnet_cifar.CPU, batch_size=256)]
RUNS["cpu"] += [timed(resnet_cifar.CPU, model="resnet20")]
