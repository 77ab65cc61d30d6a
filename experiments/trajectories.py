"""The largest Hessian eigenvalue during training, for each method (a figure).

    python -m experiments run trajectories --profile paper

The ResNet runs of Table 1 (bit for bit, on the same type of processor), with the eigenvalue measured every few epochs
on the first 256 training images (or all, if fewer), with BatchNorm in eval mode. The table trajectories shows its value
after the last epoch and its largest value during training.
"""

from dataclasses import replace

from experiments import resnet_cifar

TABLE = "trajectories"

EVERY = {"smoke": 2, "paper": 20}
"""Epochs between measurements."""

RUNS = {
    profile: [replace(cell, curvature_every=every) for cell in resnet_cifar.RUNS[profile] if cell.dataset == "cifar10"]
    for profile, every in EVERY.items()
}
