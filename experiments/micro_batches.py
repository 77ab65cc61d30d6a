"""Accuracy and flatness against m, the number of micro-batches.

    python -m experiments run micro_batches --profile cpu
    python -m experiments run micro_batches-tuning --profile cpu     # the grid that chooses rho for each m

The ResNet of Table 1 on CIFAR-10 at Table 1's batch size, with m = 1 (SAM), 2, 4, ... (the table micro_batches, drawn
as curves). mSAM runs at SAM's rho, and at a tuned rho if `TUNED` has one. At each m the control (plain gradients over
the same micro-batches) separates the effect of micro-batch BatchNorm from that of mSAM. So does the same network with
GroupNorm, which does not depend on m. Each network is measured like those of Table 3: the largest Hessian eigenvalue,
and the accuracy with re-estimated BatchNorm statistics.

The grid is the committed table micro_batches-tuning (for ResNet-8's rho at m = 1 and 8, see Table 1's grid). With
GroupNorm, both SAM and mSAM did best at the smallest rho, where neither beat plain training on held-out images; at
`RHO`, where its curve against m is drawn, both were worse than plain training. The grid has two seeds and four to six
rhos, so the tuned rho of each m is rough.
"""

from dataclasses import replace

from experiments import resnet_cifar
from experiments.harness.runs.grids import curvature_of, tuning_grid
from experiments.harness.runs.spec import Run, Training

TABLE = "micro_batches"

M = {"smoke": (2, 4), "cpu": (2, 4, 8, 16, 32), "paper": (2, 4, 8, 16, 32, 64)}

RHO = {"smoke": 0.1, "cpu": 0.05, "paper": 0.05}
"""SAM's rho in Table 1, used at every m."""

TUNED: dict[str, dict[str, dict[int, float]]] = {
    "cpu": {"resnet8": {2: 0.2, 4: 0.1, 8: 0.1, 32: 0.0125}, "resnet8-groupnorm": {1: 0.00625, 8: 0.00625}}
}
"""By profile and model, the rho of each m if the grid chose another than `RHO`; GroupNorm has only m = 1 and 8."""

GROUPNORM = {
    "smoke": replace(resnet_cifar.SMOKE, model="resnet8-groupnorm"),
    "cpu": replace(resnet_cifar.CPU, model="resnet8-groupnorm", learning_rate=0.1),
}

MEASURED = {"smoke": (16, 0.05), "cpu": (256, 0.05), "paper": (512, 0.05)}
"""Examples and radius of the curvature runs, equal to those of `hessian` so that both share runs."""


def against_m(base: Training, profile: str) -> list[Training]:
    """The base optimizer, SAM and, at each m, the control, mSAM at SAM's rho, and mSAM at its tuned rho."""
    tuned = TUNED.get(profile, {}).get(base.model, {})
    cells = [base, *(replace(base, rho=rho) for rho in dict.fromkeys((RHO[profile], tuned.get(1, RHO[profile]))))]
    for m in M[profile]:
        rhos = dict.fromkeys((0.0, RHO[profile], tuned.get(m, RHO[profile])))
        cells += [replace(base, micro_batches=m, rho=rho) for rho in rhos]
    return cells


RUNS: dict[str, list[Run]] = {}
for profile, (examples, radius) in MEASURED.items():
    base = next(cell for cell in resnet_cifar.RUNS[profile] if cell.dataset == "cifar10")
    networks = against_m(base, profile)
    if profile in GROUPNORM:
        networks += [cell for cell in against_m(GROUPNORM[profile], profile) if cell.method != "control"]
    RUNS[profile] = [*networks, *curvature_of(networks, examples=examples, rho=radius)]

USUAL = (0.025, 0.05, 0.1, 0.2)
LOWER = (0.00625, 0.0125)
TRIED = {2: (*USUAL, 0.4), 4: USUAL, 16: USUAL, 32: (*LOWER, *USUAL)}
"""The rhos of ResNet-8's grid by m: Table 1's, and more where the best was at an end of these."""

TUNING = {
    "cpu": [
        *(
            cell
            for m, rhos in TRIED.items()
            for cell in tuning_grid(resnet_cifar.CPU, micro_batches=[m], rhos=rhos)
            if cell.micro_batches == m
        ),
        *tuning_grid(
            GROUPNORM["cpu"],
            micro_batches=[8],
            learning_rates=(0.05, 0.1, 0.2, 0.4),
            rhos=(*LOWER, *USUAL),
        ),
    ],
}
"""ResNet-8's rho at m = 1 and 8 comes from Table 1's grid; GroupNorm's is chosen here."""
