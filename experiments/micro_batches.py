"""Accuracy against m, in both readings: the number of micro-batches, and the number of examples in one.

    python -m experiments run micro_batches --profile cpu
    python -m experiments run micro_batches-tuning --profile cpu     # the grid that chooses rho for each m

The ResNet of Table 1 on CIFAR-10 at Table 1's batch size B, with m = 1 (SAM), 2, ... micro-batches of B/m images (the
table micro_batches, drawn as curves). At each m there are the control (plain gradients over the same micro-batches),
SAM over micro-batches (one perturbation for all) and mSAM, the latter two at the rho that the grid chose for them, with
as many tries at each m. The same network with GroupNorm does not depend on micro-batches, so its control is plain
training and its SAM over micro-batches is SAM: both have one row.

Expected: not measured yet.
"""

from collections.abc import Sequence
from dataclasses import replace

from experiments import resnet_cifar
from experiments.harness.runs.grids import grid_of_arms, perturbed
from experiments.harness.runs.spec import Training

TABLE = "micro_batches"

M = {"smoke": (2, 4), "cpu": (2, 8, 32), "paper": (2, 4, 8, 16, 32, 64)}

RHO = {"smoke": 0.1, "cpu": 0.05, "paper": 0.05}
"""rho where `CHOSEN` has none."""

CHOSEN: dict[str, dict[int, dict[str, float]]] = {
    "resnet8": {1: {"sam": resnet_cifar.CPU_RHOS["sam"]}, 8: resnet_cifar.CPU_RHOS},
    "resnet8-groupnorm": {},
}
"""What the cpu grid chose, by model, m and arm; at m = 1 and 8, ResNet-8 has the rho of Table 1."""

GROUPNORM = {
    "smoke": replace(resnet_cifar.SMOKE, model="resnet8-groupnorm"),
    "cpu": replace(resnet_cifar.CPU, model="resnet8-groupnorm", learning_rate=0.1),
}


def against_m(base: Training, arms: Sequence[str]) -> list[Training]:
    """The base optimizer, SAM and, at each m, these arms: `control`, `shared` or `msam`."""

    def cell(m: int, arm: str) -> Training:
        if arm == "control":
            return replace(base, micro_batches=m)
        chosen = CHOSEN.get(base.model, {}) if base.profile == "cpu" else {}
        return perturbed(base, arm, m, chosen.get(m, {}).get(arm, RHO[base.profile]))

    return [base, cell(1, "sam"), *(cell(m, arm) for m in M[base.profile] for arm in arms)]


RUNS = {
    profile: against_m(
        next(cell for cell in resnet_cifar.RUNS[profile] if cell.dataset == "cifar10"), ("control", "shared", "msam")
    )
    for profile in M
}
for profile, base in GROUPNORM.items():
    RUNS[profile] += against_m(base, ("msam",))

RHOS = resnet_cifar.CPU_GRID["msam"]
LOWER = (0.00625, 0.0125, 0.025, 0.05, 0.1)
"""Those of the network with GroupNorm, which does best at small rho."""

TUNING = {
    "cpu": [
        *(
            cell
            for m in (2, 32)
            for cell in grid_of_arms(resnet_cifar.CPU, micro_batches=m, rhos=dict.fromkeys(("shared", "msam"), RHOS))
        ),
        *grid_of_arms(GROUPNORM["cpu"], micro_batches=2, learning_rates=(0.05, 0.1, 0.2, 0.4), rhos={"sam": LOWER}),
        *(cell for m in M["cpu"] for cell in grid_of_arms(GROUPNORM["cpu"], micro_batches=m, rhos={"msam": LOWER})),
    ],
}
"""ResNet-8's rho at m = 1 and 8 comes from Table 1's grid."""
