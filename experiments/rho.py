"""Accuracy against rho, for SAM, SAM on micro-batches and mSAM.

    python -m experiments run rho --profile cpu

The ResNet of Table 1 on CIFAR-10 at several rhos (the table rho, drawn as a curve). These runs do not choose anything:
Table 1's rho comes from its grid, on held-out images.

Expected: not trained yet in this design. An earlier one (three seeds, no SAM on micro-batches) had mSAM above SAM at
each rho up to 0.2, by 0.8 to 2.0 points.
"""

from dataclasses import replace

from experiments import resnet_cifar
from experiments.harness.runs.methods import arms_of

TABLE = "rho"

RHOS = {
    "smoke": (0.1,),
    "cpu": (0.025, 0.05, 0.1, 0.2),
    "paper": (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
}

RUNS = {}
for profile, rhos in RHOS.items():
    cells = {arm.name: cell for cell, arm in arms_of(resnet_cifar.RUNS[profile]).items() if cell.dataset == "cifar10"}
    perturbed = [replace(cells[arm], rho=rho) for arm in ("sam", "shared", "msam") if arm in cells for rho in rhos]
    RUNS[profile] = [cells["base"], cells["control"], *perturbed]
