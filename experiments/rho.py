"""Accuracy against rho, for SAM, SAM on micro-batches and mSAM.

    python -m experiments run rho --profile cpu

The ResNet of Table 1 on CIFAR-10 at several rhos (the table rho, drawn as a curve). These runs do not choose anything:
Table 1's rho comes from its grid, on held-out images.

Expected (n=8): mSAM over SAM at the same rho +1.1, +1.5, +1.9 and +0.8 points at rho 0.025, 0.05, 0.1 and 0.2, over SAM
on micro-batches 0.0, +0.4, +0.9 and +1.1, all +- 0.4 to 1.3; SAM over SGD at most +0.4 +- 1.0. 100 to 115 seconds a run
on one core of an AMD EPYC (AVX2).
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
