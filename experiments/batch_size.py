"""Accuracy against the batch size, at micro-batches of one size.

    python -m experiments run batch_size --profile cpu

The ResNet of Table 1 on CIFAR-10, with smaller and larger batches (the table batch_size, drawn as a curve). A
micro-batch has as many images in each, so m grows with the batch and BatchNorm sees no difference. The learning rate
grows in proportion to the batch, as in Goyal et al. 2017 (arXiv 1706.02677); epochs and rho are those of Table 1, whose
batch size they were tuned for, so that one is favoured.
"""

from dataclasses import replace

from experiments import resnet_cifar
from experiments.harness.runs.spec import Training

TABLE = "batch_size"
VARIES = ("batch_size",)

TIMES = {"smoke": (0.5, 1), "cpu": (0.25, 0.5, 1, 2), "paper": (0.25, 0.5, 1, 2, 4)}
"""How many times as large as in Table 1."""


def scaled(cell: Training, times: float) -> Training:
    """The cell at another batch size, with micro-batches of as many images."""
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
