"""Accuracy with wrong training labels.

    python -m experiments run label_noise --profile cpu
    python -m experiments run label_noise-tuning --profile cpu     # the grid that chose rho

The ResNet of Table 1 on CIFAR-10 with 0, 20, 40 and 60 % of the training labels wrong, each of the other nine classes
as likely (the table label_noise, drawn as a curve): the setting in which Foret et al. 2021 (section 3.3) saw SAM gain
most. Test labels are right, and so are those of the held-out images that choose rho; which labels are wrong is the
same for every method and seed. The train accuracy counts the wrong labels too: it shows what was learnt by heart.
"""

from dataclasses import replace

from experiments import resnet_cifar
from experiments.harness.spec import tuning_grid

TABLE = "label_noise"

SHARES = {"smoke": (0.0, 0.4), "cpu": (0.0, 0.2, 0.4, 0.6), "paper": (0.0, 0.2, 0.4, 0.6)}

RUNS = {
    profile: [
        replace(cell, label_noise=share)
        for share in shares
        for cell in resnet_cifar.RUNS[profile]
        if cell.dataset == "cifar10"
    ]
    for profile, shares in SHARES.items()
}

TUNING = {
    "cpu": [
        cell
        for share in SHARES["cpu"][1:]
        for cell in tuning_grid(
            replace(resnet_cifar.CPU, label_noise=share), micro_batches=[8], rhos=(0.025, 0.05, 0.1, 0.2, 0.4)
        )
    ],
}
