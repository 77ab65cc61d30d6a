"""A linear model on the same images: the floor that every family of Table 1 has to beat.

    python -m experiments run linear_cifar --profile cpu

Softmax regression on the pixels, trained with AdamW; a grid on held-out images chose the learning rate. The two rows
use the training subsets of the ResNets (1,024 images) and of the ViT (4,096).

Expected (n=16, +- 95 %): 32.1 +- 0.2 and 36.2 +- 0.1; 1 and 4 seconds per run on one core of an AMD EPYC.
"""

from dataclasses import replace

from experiments.harness.runs.grids import grid_of_arms
from experiments.harness.runs.spec import Training

TABLE = "table1"

SMOKE = Training(
    profile="smoke",
    dataset="cifar10",
    model="linear",
    train_examples=64,
    test_examples=250,
    base_optimizer="adamw",
    learning_rate=1e-3,
    epochs=4,
    batch_size=32,
)

SMALL = replace(
    SMOKE,
    profile="cpu",
    train_examples=1024,
    test_examples=None,
    epochs=20,
    batch_size=128,
    learning_rate=3e-4,
)
LARGE = replace(SMALL, train_examples=4096)

RUNS = {"smoke": [SMOKE], "cpu": [SMALL, LARGE]}

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
TUNING = {
    "cpu": [c for base in (SMALL, LARGE) for c in grid_of_arms(base, micro_batches=1, learning_rates=RATES, rhos={})]
}
