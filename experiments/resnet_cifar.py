"""ResNet on CIFAR: SGD and SAM, both also over micro-batches, and mSAM (the ResNet block of Table 1).

    python -m experiments run resnet_cifar --profile cpu
    python -m experiments run resnet_cifar-tuning --profile cpu     # the grid that chose learning rate and rho

cpu: ResNet-8 of width 16 on 1,024 images of CIFAR-10, scored on all 10,000 test images. paper: ResNet-50 on CIFAR-10
and CIFAR-100; no GPU has run it yet.

Expected (n=16, +- 95 %): SGD 43.9 +- 0.5, for twice the epochs 44.3 +- 0.4, over micro-batches 44.7 +- 0.4, SAM 44.3 +-
0.4, over micro-batches 45.5 +- 0.4, mSAM 46.8 +- 0.5; 70, 139, 82, 136, 158 and 154 seconds per run on one core of an
AMD EPYC with AVX2.
"""

from dataclasses import replace

from experiments.harness.runs.grids import all_arms, grid_of_arms
from experiments.harness.runs.spec import CAPTURED, ON_GPU, Training

TABLE = "table1"
PRIMARY = ("msam", "shared")

SMOKE = Training(
    profile="smoke",
    dataset="cifar10",
    model="resnet8",
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
    learning_rate=0.4,
    epochs=36,
    batch_size=128,
)

# Chosen by the grid. All arms depend on the learning rate, so it has eight seeds, and a rho two.
CPU_RHOS = {"sam": 0.05, "shared": 0.1, "msam": 0.1}
CPU_GRID = dict.fromkeys(CPU_RHOS, (0.025, 0.05, 0.1, 0.2))

# ResNet-50, CIFAR variant: epochs, batch size, learning rate and weight decay from Becker et al. 2024 (Momentum-SAM,
# Table 1), with label smoothing 0.1 and crop and flip, but without their cutout.
PAPER = replace(
    SMOKE,
    profile="paper",
    model="resnet50",
    train_examples=None,
    test_examples=None,
    augmentation="crop-flip",
    label_smoothing=0.1,
    weight_decay=1e-3,
    epochs=200,
    batch_size=256,
    **ON_GPU,
)

# SAM's rho: 0.05 on CIFAR-10 from Foret et al. 2021 (Table 1, WRN-28-10), 0.2 on CIFAR-100 from the configurations of
# MarlonBecker/MSAM@780fa4f. We do not know the paper's m and rho for mSAM. Until the grid below has run on a GPU, mSAM
# uses SAM's rho and m=8: micro-batches of 32, the per-device shards with which Foret et al. computed SAM. ASAM's rho is
# that of SamsungLabs/ASAM@dc9b513 (example_cifar.py).
PAPER_RHOS = {
    dataset: {"sam": rho, "shared": rho, "msam": rho, "asam": 0.5, "masam": 0.5}
    for dataset, rho in (("cifar10", 0.05), ("cifar100", 0.2))
}
PAPER_GRID = {
    **dict.fromkeys(("sam", "shared", "msam"), (0.025, 0.05, 0.1, 0.2, 0.4)),
    **dict.fromkeys(("asam", "masam"), (0.25, 0.5, 1.0, 2.0, 4.0)),
}

# All of CIFAR-10 in minutes a run. The micro-batches have 64 images (m=8).
GPU = replace(
    CPU,
    profile="gpu",
    model="resnet18",
    train_examples=None,
    augmentation="crop-flip",
    nesterov=True,
    warmup_epochs=5,
    epochs=25,
    batch_size=512,
    **CAPTURED,
)

# Until the grid has run, SAM's rho is 0.1 and mSAM's 0.05, which were best of 0.05, 0.1, 0.2 and 0.4 for held-out
# images in one trial of 20 epochs (one seed, bfloat16), and ASAM's is 0.5, as in
# SamsungLabs/ASAM@dc9b513 (example_cifar.py).
GPU_RHOS = {"sam": 0.1, "shared": 0.1, "msam": 0.05, "asam": 0.5, "masam": 0.5}
GPU_GRID = {
    **dict.fromkeys(("sam", "shared", "msam"), (0.025, 0.05, 0.1, 0.2)),
    **dict.fromkeys(("asam", "masam"), (0.25, 0.5, 1.0, 2.0)),
}

RUNS = {
    "smoke": all_arms(SMOKE, micro_batches=4, rhos={"sam": 0.1, "shared": 0.1, "msam": 0.1}),
    "cpu": all_arms(CPU, micro_batches=8, rhos=CPU_RHOS),
    "gpu": all_arms(GPU, micro_batches=8, rhos=GPU_RHOS),
    "paper": [
        cell
        for dataset, rhos in PAPER_RHOS.items()
        for cell in all_arms(replace(PAPER, dataset=dataset), micro_batches=8, rhos=rhos)
    ],
}

TUNING = {
    "cpu": grid_of_arms(CPU, micro_batches=8, learning_rates=(0.2, 0.4, 0.8), rhos=CPU_GRID, pairs=4),
    "gpu": grid_of_arms(GPU, micro_batches=8, learning_rates=(0.2, 0.4, 0.8), rhos=GPU_GRID),
    "paper": [
        cell
        for dataset in PAPER_RHOS
        for cell in grid_of_arms(replace(PAPER, dataset=dataset), micro_batches=8, rhos=PAPER_GRID)
    ],
}
