"""Accuracy against m, the number of micro-batches, with and without BatchNorm.

    python -m experiments run micro_batches --profile cpu
    python -m experiments run micro_batches-tuning --profile cpu     # the grid that chooses rho for each m

The ResNet of Table 1 on CIFAR-10 at Table 1's batch size, with m = 1 (SAM), 2, ... (the table micro_batches, drawn as
differences). At each m the control (plain gradients over the same micro-batches) and SAM on micro-batches (one
perturbation for all of them) separate the effect of micro-batch BatchNorm from that of mSAM. The same network with
GroupNorm depends on m by its perturbations alone: the base optimizer is its control, and SAM is its SAM on
micro-batches.

cpu: rho is chosen for each arm and m among four values, the same for all arms at one m. At m = 1 and 8 that is Table
1's grid; at m = 2 and 32 the values lie where an earlier grid of mSAM alone, on the seeds 0 and 1, had done well. smoke
and paper: one rho for all; no GPU has run the paper profile.

Results of cpu (1,024 images, 288 steps, 8 seeds): with BatchNorm mSAM leads SAM at m = 8 and 32 by 2.23 ± 0.86 and
2.07 ± 0.67 points, about half of which SAM on micro-batches has too, and not significantly at m = 2; their rhos differ.
With GroupNorm (another learning rate, rho 0.003125, 49 % of the training images fitted) mSAM is equivalent to SAM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from experiments import resnet_cifar
from experiments.harness.runs.grids import grid_of_arms, perturbed
from experiments.harness.runs.spec import Run, Training

TABLE = "micro_batches"

Rhos = Mapping[str, Mapping[int, float]]
"""By arm, the rho at each m."""


def same(rho: float, m: Sequence[int], arms: Sequence[str] = ("shared", "msam")) -> Rhos:
    """One rho for SAM and for these arms at each m."""
    return {"sam": {1: rho}} | {arm: dict.fromkeys(m, rho) for arm in arms}


def against_m(base: Training, rhos: Rhos, controls: Sequence[int]) -> list[Run]:
    """The base optimizer, the control at each m in `controls`, and each arm at each m that has a rho."""
    cells = [base, *(replace(base, micro_batches=m) for m in controls)]
    return [*cells, *(perturbed(base, arm, m, rho) for arm, by_m in rhos.items() for m, rho in by_m.items())]


def cifar10(profile: str) -> Training:
    """The base optimizer's cell of Table 1."""
    return next(cell for cell in resnet_cifar.RUNS[profile] if cell.dataset == "cifar10")


GROUPNORM = {
    "smoke": replace(resnet_cifar.SMOKE, model="resnet8-groupnorm"),
    "cpu": replace(resnet_cifar.CPU, model="resnet8-groupnorm", learning_rate=0.1),
}

CPU_RHOS: Rhos = {
    "sam": {1: resnet_cifar.CPU_RHOS["sam"]},
    "shared": {2: 0.1, 8: resnet_cifar.CPU_RHOS["shared"], 32: 0.05},
    "msam": {2: 0.2, 8: resnet_cifar.CPU_RHOS["msam"], 32: 0.025},
}
CPU_GROUPNORM_RHOS: Rhos = {"sam": {1: 0.003125}, "msam": {8: 0.003125, 32: 0.003125}}

RUNS: dict[str, list[Run]] = {
    "smoke": [
        *against_m(cifar10("smoke"), same(0.1, (2, 4)), (2, 4)),
        *against_m(GROUPNORM["smoke"], same(0.1, (2, 4), ["msam"]), ()),
    ],
    "cpu": [
        *against_m(cifar10("cpu"), CPU_RHOS, (2, 8, 32)),
        *against_m(GROUPNORM["cpu"], CPU_GROUPNORM_RHOS, ()),
    ],
    "paper": against_m(cifar10("paper"), same(0.05, (2, 4, 8, 16, 32, 64)), (2, 4, 8, 16, 32, 64)),
}

TRIED = {2: (0.05, 0.1, 0.2, 0.4), 32: (0.0125, 0.025, 0.05, 0.1)}
"""The rhos of ResNet-8's grid by m, for SAM on micro-batches and mSAM."""
LOWEST = (0.0015625, 0.003125, 0.00625, 0.0125)

TUNING = {
    "cpu": [
        *(
            cell
            for m, rhos in TRIED.items()
            for cell in grid_of_arms(resnet_cifar.CPU, micro_batches=m, rhos={"shared": rhos, "msam": rhos})
        ),
        *grid_of_arms(
            GROUPNORM["cpu"],
            micro_batches=8,
            learning_rates=(0.05, 0.1, 0.2),
            rhos={"sam": LOWEST, "msam": LOWEST},
            pairs=4,
        ),
        *grid_of_arms(GROUPNORM["cpu"], micro_batches=32, rhos={"msam": LOWEST}),
    ],
}
"""ResNet-8's rho at m = 1 and 8 comes from Table 1's grid; GroupNorm's is chosen here."""
