"""Accuracy against the batch size, at micro-batches of one size.

    python -m experiments run batch_size --profile paper

The ResNet of Table 1 on CIFAR-10, with smaller and larger batches (the table batch_size, drawn as a curve). All
micro-batches have the same number of images, so m grows with the batch size and BatchNorm is not affected. The learning
rate is proportional to the batch size, as in Goyal et al. 2017 (arXiv 1706.02677). Epochs and rho are those of Table 1;
they were tuned for its batch size, which favours that batch size.
"""

from dataclasses import replace

from experiments import resnet_cifar
from experiments.harness.runs.spec import Training

TABLE = "batch_size"
VARIES = ("batch_size",)

TIMES = {"smoke": (0.5, 1), "paper": (0.25, 0.5, 1, 2, 4)}
"""Batch sizes as multiples of Table 1's."""


def scaled(cell: Training, times: float) -> Training:
    """The cell at another batch size, with micro-batches of the same size."""
    micro_batches = cell.micro_batches if cell.micro_batches == 1 else round(cell.micro_batches * times)
    return replace(
        cell,
        batch_size=round(cell.batch_size * times),
        micro_batches=micro_batches,
        learning_rate=cell.learning_rate * times,
    )


RUNS = {
    profile: [
        scaled(cell, times) for times in sizes for cell in resnet_cifar.RUNS[profile] if cell.dataset == "cifar10"
    ]
    for profile, sizes in TIMES.items()
}
