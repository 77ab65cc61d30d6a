"""Accuracy with wrong training labels.

    python -m experiments run label_noise --profile paper

The ResNet of Table 1 on CIFAR-10 with 0, 20, 40 and 60 % wrong training labels, where each of the other nine classes is
equally likely (the table label_noise, drawn as a curve). In this setting, Foret et al. 2021 (section 3.3) saw SAM gain
most. Labels of test images are correct; the same labels are wrong for every method and seed. The training accuracy
counts wrong labels too, so it shows memorization. Learning rate and rho are Table 1's.
"""

from dataclasses import replace

from experiments import resnet_cifar

TABLE = "label_noise"
VARIES = ("label_noise",)

SHARES = {"smoke": (0.0, 0.4), "paper": (0.0, 0.2, 0.4, 0.6)}

RUNS = {
    profile: [
        replace(cell, label_noise=share)
        for share in shares
        for cell in resnet_cifar.RUNS[profile]
        if cell.dataset == "cifar10"
    ]
    for profile, shares in SHARES.items()
}
