"""Wide ResNet on CIFAR: SGD and SAM, both also over micro-batches, and mSAM (the WRN block of Table 1).

    python -m experiments run wrn_cifar --profile cpu
    python -m experiments run wrn_cifar-tuning --profile cpu     # the grid that chose learning rate and rho

cpu: WRN-10-1, the family's smallest member, on 1,024 images of CIFAR-10, scored on all 10,000 test images. paper:
WRN-28-10 on CIFAR-10 and CIFAR-100; no GPU has run it yet.

Expected (n=16, +- 95 %): SGD 44.3 +- 0.5, twice the epochs 44.8 +- 0.6, over micro-batches 44.6 +- 0.5, SAM 44.7 +-
0.7, SAM on micro-batches 45.6 +- 0.6, mSAM 46.7 +- 0.6; 69, 135, 80, 135, 152 and 157 seconds per run on one core of
an AMD EPYC (AVX2).
"""

from dataclasses import replace

from experiments import resnet_cifar
from experiments.harness.runs.grids import all_arms, grid_of_arms
from experiments.harness.runs.spec import ON_GPU, Training

TABLE = "table1"

SMOKE = Training(
    profile="smoke",
    dataset="cifar10",
    model="wrn-10-1",
    train_examples=64,
    test_examples=250,
    base_optimizer="sgd",
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    epochs=4,
    batch_size=32,
)

CPU = replace(
    SMOKE,
    profile="cpu",
    train_examples=1024,
    test_examples=None,
    learning_rate=0.8,
    epochs=36,
    batch_size=128,
)

# Chosen by the grid, which tries a learning rate with eight seeds and a rho with two.
CPU_RHOS = {"sam": 0.2, "shared": 0.1, "msam": 0.1}
CPU_RATES = (0.1, 0.2, 0.4, 0.8, 1.6)
CPU_GRID = dict.fromkeys(CPU_RHOS, (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4))

# Foret et al. 2021 (SAM, Table 1, WRN-28-10 with basic augmentation): 200 epochs, batch 256, learning rate 0.1,
# weight decay 5e-4, rho 0.05 on CIFAR-10 and 0.1 on CIFAR-100.
PAPER = replace(
    SMOKE,
    profile="paper",
    model="wrn-28-10",
    train_examples=None,
    test_examples=None,
    augmentation="crop-flip",
    epochs=200,
    batch_size=256,
    **ON_GPU,
)

# We do not know the paper's m and rho for mSAM. Until the grid below has run on a GPU, mSAM uses SAM's rho and m=8:
# micro-batches of 32, the per-device shards with which Foret et al. computed SAM. ASAM's rho is that of
# SamsungLabs/ASAM@dc9b513 (example_cifar.py).
PAPER_RHOS = {
    dataset: {"sam": rho, "shared": rho, "msam": rho, "asam": 0.5, "masam": 0.5}
    for dataset, rho in (("cifar10", 0.05), ("cifar100", 0.1))
}

# All of CIFAR-10 in minutes a run, with the settings of ResNet-18.
GPU = replace(resnet_cifar.GPU, model="wrn-16-4")

RUNS = {
    "smoke": all_arms(SMOKE, micro_batches=4, rhos={"sam": 0.1, "shared": 0.1, "msam": 0.1}),
    "cpu": all_arms(CPU, micro_batches=8, rhos=CPU_RHOS),
    "gpu": all_arms(GPU, micro_batches=8, rhos=resnet_cifar.GPU_RHOS),
    "paper": [
        cell
        for dataset, rhos in PAPER_RHOS.items()
        for cell in all_arms(replace(PAPER, dataset=dataset), micro_batches=8, rhos=rhos)
    ],
}

TUNING = {
    "cpu": grid_of_arms(CPU, micro_batches=8, learning_rates=CPU_RATES, rhos=CPU_GRID, pairs=4),
    "gpu": grid_of_arms(GPU, micro_batches=8, learning_rates=(0.2, 0.4, 0.8), rhos=resnet_cifar.GPU_GRID),
    "paper": [
        cell
        for dataset in PAPER_RHOS
        for cell in grid_of_arms(replace(PAPER, dataset=dataset), micro_batches=8, rhos=resnet_cifar.PAPER_GRID)
    ],
}
