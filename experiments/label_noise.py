"""Accuracy with wrong training labels.

    python -m experiments run label_noise --profile cpu
    python -m experiments run label_noise-tuning --profile cpu     # the grid that chooses learning rate and rho

The ResNet of Table 1 on CIFAR-10 with 0, 20, 40 and 60 % wrong training labels, where each of the other nine classes is
equally likely (the table label_noise, drawn as a curve). In this setting, Foret et al. 2021 (section 3.3) saw SAM gain
most. Labels of test and held-out images are correct; the same labels are wrong for every method and seed. The
training accuracy counts wrong labels too, so it shows memorization. Learning rate and rho are Table 1's unless `CHOSEN`
has others. As in Table 1, the learning rate is the best one for plain training. It is lower than without wrong labels,
so effects of the labels cannot be separated from effects of the learning rate across shares. The grid is the committed
table label_noise-tuning.
"""

from dataclasses import replace

from experiments import resnet_cifar
from experiments.harness.runs.grids import tuning_grid
from experiments.harness.runs.spec import Training

TABLE = "label_noise"
VARIES = ("label_noise",)

SHARES = {"smoke": (0.0, 0.4), "cpu": (0.0, 0.2, 0.4, 0.6), "paper": (0.0, 0.2, 0.4, 0.6)}

CHOSEN: dict[str, dict[float, dict[str, float]]] = {
    "cpu": {
        0.2: {"learning_rate": 0.05, "sam": 0.1, "msam": 0.025},
        0.4: {"learning_rate": 0.025, "sam": 0.1, "msam": 0.025},
        0.6: {"learning_rate": 0.025, "sam": 0.2, "msam": 0.1},
    }
}
"""The grid's choices by profile and share: `learning_rate`, and the rho of `sam` and of `msam`."""


def noisy(cell: Training, share: float) -> Training:
    """The cell of Table 1 with wrong labels."""
    chosen = CHOSEN.get(cell.profile, {}).get(share, {})
    learning_rate = chosen.get("learning_rate", cell.learning_rate)
    return replace(cell, label_noise=share, learning_rate=learning_rate, rho=chosen.get(cell.method, cell.rho))


RUNS = {
    profile: [
        noisy(cell, share) for share in shares for cell in resnet_cifar.RUNS[profile] if cell.dataset == "cifar10"
    ]
    for profile, shares in SHARES.items()
}

USUAL = (0.025, 0.05, 0.1, 0.2, 0.4)
TRIED = {0.2: (0.0125, *USUAL), 0.4: (0.0125, *USUAL), 0.6: USUAL}
"""The grid's rhos by share; one smaller rho was added where mSAM did best at the smallest."""

TUNING = {
    "cpu": [
        cell
        for share, rhos in TRIED.items()
        for cell in tuning_grid(
            noisy(resnet_cifar.CPU, share),
            micro_batches=[8],
            learning_rates=(0.0125, 0.025, 0.05, 0.1),
            rhos=rhos,
        )
    ],
}
