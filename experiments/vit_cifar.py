"""Vision Transformer on CIFAR: AdamW, AdamW over micro-batches, SAM and mSAM (the ViT block of Table 1).

    python -m experiments run vit_cifar --profile cpu
    python -m experiments run vit_cifar-tuning --profile cpu     # the grid that chose learning rate and rho

cpu: a ViT of 3 layers and width 64 over 16 tokens from a convolutional stem, on 4,096 images of CIFAR-10, scored on all
10,000 test images. Settings tried earlier, on held-out images: with square patches of 8 (4 layers), the base optimizer
either fits 2,048 images and does not beat a linear model, or sees each of 5,120 to 10,240 images too rarely for any rho
to help; with this stem and 32 epochs, AdamW does best at half the learning rate, where rho of 0.02 and more only hurts.
paper: a ViT of 7 layers and width 384 over patches of 4, from scratch, on CIFAR-10 and CIFAR-100; no GPU has run it.

Expected (n=16, +- 95 %): AdamW 42.5 +- 0.3, for twice the epochs 40.8 +- 0.3, over micro-batches 42.5 +- 0.3, SAM 42.5
+- 0.4, mSAM 42.5 +- 0.4; 40, 80, 62, 80 and 126 seconds per run on one core of an AMD EPYC. No rho helps: the grid
chose one so small that both methods are AdamW within half a point.
"""

from dataclasses import replace

from experiments.harness.runs.grids import all_arms, grid_of_arms
from experiments.harness.runs.spec import CAPTURED, ON_GPU, Training

TABLE = "table1"

SMOKE = Training(
    profile="smoke",
    dataset="cifar10",
    model="vit-micro",
    train_examples=64,
    test_examples=250,
    base_optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=0.05,
    epochs=4,
    warmup_epochs=1,
    batch_size=32,
)

CPU = replace(SMOKE, profile="cpu", train_examples=4096, test_examples=None, epochs=22, batch_size=128)

# Chosen by the grid, which tries a learning rate with eight seeds and a rho with two.
CPU_RHOS = {"sam": 0.000625, "msam": 0.000625}
CPU_RATES = (5e-4, 1e-3, 2e-3)
CPU_GRID = dict.fromkeys(CPU_RHOS, (0.0003, 0.000625, 0.00125, 0.0025, 0.005))

# Architecture, 200 epochs, batch 128, learning rate 1e-3, 5 epochs of warm-up and label smoothing 0.1 as in
# omihub777/ViT-CIFAR@0766c12 (91.0 % on CIFAR-10, one run), but with AdamW instead of Adam (weight decay 0.05 as in the
# cpu profile, since its 5e-5 is not a decoupled decay) and crop and flip instead of AutoAugment.
PAPER = replace(
    SMOKE,
    profile="paper",
    model="vit-small",
    train_examples=None,
    test_examples=None,
    augmentation="crop-flip",
    label_smoothing=0.1,
    learning_rate=1e-3,
    epochs=200,
    warmup_epochs=5,
    batch_size=128,
    **ON_GPU,
)

# SAM's rho: 0.2, the value of LOG-postech/Sassha for ViT-S/32 with AdamW on ImageNet; none is published for this
# setting. We do not know the paper's m and rho for mSAM. Until the grid below has run on a GPU, mSAM uses SAM's rho and
# micro-batches of 32. No ASAM rho is published for it either: ours are those of the gpu profile.
PAPER_RHOS = {"sam": 0.2, "msam": 0.2, "asam": 0.5, "masam": 0.5}
PAPER_GRID = {
    **dict.fromkeys(("sam", "msam"), (0.05, 0.1, 0.2, 0.4)),
    **dict.fromkeys(("asam", "masam"), (0.25, 0.5, 1.0, 2.0)),
}
DATA_SETS = ("cifar10", "cifar100")

# All of CIFAR-10 in minutes a run. The network has no BatchNorm, so SAM on micro-batches is SAM and has no row. All
# micro-batches take one pass, which is faster than the loop for a network of many small kernels (docs/gpu.md).
GPU = replace(
    CPU,
    profile="gpu",
    model="vit-tiny",
    train_examples=None,
    augmentation="crop-flip",
    warmup_epochs=5,
    epochs=40,
    batch_size=512,
    passes="vectorized",
    **CAPTURED,
)

# None of these is published for this setting: the grid, which has not run yet, is to choose.
GPU_RHOS = {"sam": 0.05, "msam": 0.05, "asam": 0.5, "masam": 0.5}
GPU_GRID = {
    **dict.fromkeys(("sam", "msam"), (0.0125, 0.025, 0.05, 0.1)),
    **dict.fromkeys(("asam", "masam"), (0.25, 0.5, 1.0, 2.0)),
}

RUNS = {
    "smoke": all_arms(SMOKE, micro_batches=4, rhos={"sam": 0.1, "msam": 0.1}),
    "cpu": all_arms(CPU, micro_batches=8, rhos=CPU_RHOS),
    "gpu": all_arms(GPU, micro_batches=8, rhos=GPU_RHOS),
    "paper": [
        cell
        for dataset in DATA_SETS
        for cell in all_arms(replace(PAPER, dataset=dataset), micro_batches=4, rhos=PAPER_RHOS)
    ],
}

TUNING = {
    "cpu": grid_of_arms(CPU, micro_batches=8, learning_rates=CPU_RATES, rhos=CPU_GRID, pairs=4),
    "gpu": grid_of_arms(GPU, micro_batches=8, learning_rates=(5e-4, 1e-3, 2e-3), rhos=GPU_GRID),
    "paper": [
        cell
        for dataset in DATA_SETS
        for cell in grid_of_arms(replace(PAPER, dataset=dataset), micro_batches=4, rhos=PAPER_GRID)
    ],
}
