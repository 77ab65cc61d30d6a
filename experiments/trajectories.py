"""The largest Hessian eigenvalue along training, for each method (a figure).

    python -m experiments run trajectories --profile cpu

The ResNet runs of Table 1 once more (on the same type of processor bit for bit), with the eigenvalue measured every
few epochs on the first 256 training images (all of them where there are fewer), BatchNorm in eval mode. The table
trajectories has it after the last epoch, and its greatest value on the way.
"""

from dataclasses import replace

from experiments import resnet_cifar

TABLE = "trajectories"

EVERY = {"smoke": 2, "cpu": 4, "paper": 20}
"""Epochs."""

RUNS = {
    profile: [replace(cell, curvature_every=every) for cell in resnet_cifar.RUNS[profile] if cell.dataset == "cifar10"]
    for profile, every in EVERY.items()
}
