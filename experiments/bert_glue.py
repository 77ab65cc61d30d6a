"""BERT on GLUE: AdamW, SAM and mSAM with their controls (the BERT block of Table 2).

    python -m experiments run bert_glue --profile cpu --data-root FOLDER
    python -m experiments run bert_glue-tuning --profile cpu     # the grid that chose learning rate and rho

cpu: MiniLM on 640 movie snippets, which come from PyPI, and on 800 sentences of SST-2, if FOLDER has GLUE. MiniLM is a
BERT of 6 layers and width 384 that was tuned as a sentence encoder, so its rows do not compare with BERT-base's. Rows
whose data is unavailable stay "not run". paper: BERT-base on all tasks, from the hub; no GPU has run it yet.

Expected (n=8, +- 95 %), snippets and SST-2: 78.2 +- 1.0 and 78.3 +- 0.9 by AdamW, 78.6 +- 0.7 and 81.0 +- 0.8 for
twice the epochs, 78.5 +- 0.9 and 78.4 +- 0.6 (control), 78.3 +- 0.7 and 78.3 +- 0.7 (SAM), 78.8 +- 0.7 and 78.4 +- 0.6
(mSAM); majority 50 and 51. One to three minutes a run on one core of an AMD EPYC (AVX2).
"""

from dataclasses import replace

from experiments.harness.runs.facts import GLUE_GRIDS
from experiments.harness.runs.grids import all_arms, grid_of_arms
from experiments.harness.runs.spec import CAPTURED, ON_GPU, Training

TABLE = "table2"

SMOKE = Training(
    profile="smoke",
    dataset="snippets",
    model="minilm",
    train_examples=32,
    test_examples=32,
    base_optimizer="adamw",
    learning_rate=1e-4,
    weight_decay=0.01,
    decay="matrices",
    schedule="linear",
    warmup_epochs=0.2,
    clip_norm=1.0,
    epochs=1,
    batch_size=16,
    max_length=64,
)

CPU = replace(SMOKE, profile="cpu", train_examples=640, test_examples=None, epochs=2, max_length=48)
SETS = {
    "snippets": replace(CPU, test_examples=1000, learning_rate=2e-4),
    "sst2": replace(CPU, dataset="sst2", train_examples=800, learning_rate=5e-5),
}

# Chosen by the grid, which tries a learning rate with four seeds and a rho with two. The network has no BatchNorm, so
# SAM on micro-batches is SAM and has no row.
CPU_RHOS = {
    "snippets": {"sam": 0.01, "msam": 0.003},
    "sst2": {"sam": 0.01, "msam": 0.01},
}
CPU_RATES = {
    "snippets": (1e-4, 2e-4, 4e-4),
    "sst2": (2.5e-5, 5e-5, 1e-4, 2e-4),
}
CPU_GRID = {
    "snippets": (0.001, 0.003, 0.01, 0.03, 0.06),
    "sst2": (0.001, 0.003, 0.01, 0.03, 0.06),
}

# Na, Mehta and Strubell 2022 (arXiv 2205.12694): rho 0.05, batch 32, 128 tokens, learning rate 2e-5 with linear decay
# and no warm-up, no weight decay, 10 epochs for the tasks in LONG and 3 for the others. They report the best checkpoint
# on the development set, we the last epoch. Clipping at 1.0, the default of transformers' Trainer, is ours.
LONG = ("rte", "mrpc", "cola", "stsb")
PAPER = replace(
    SMOKE,
    profile="paper",
    model="bert-base-uncased",
    train_examples=None,
    test_examples=None,
    learning_rate=2e-5,
    weight_decay=0.0,
    epochs=3,
    warmup_epochs=0,
    batch_size=32,
    max_length=128,
    **ON_GPU,
)

# MiniLM on whole tasks of GLUE, in minutes a run: all texts have one length, so that a step is captured, and all
# micro-batches take one pass. Pairs of sentences that are long get 128 tokens, the others 64.
GPU = replace(
    SMOKE,
    profile="gpu",
    dataset="cola",
    train_examples=None,
    test_examples=None,
    learning_rate=5e-5,
    epochs=3,
    warmup_epochs=0.3,
    batch_size=32,
    padding="max_length",
    passes="vectorized",
    **CAPTURED,
)
GPU_TASKS = [replace(GPU, dataset=task) for task in ("cola", "sst2", "stsb")]
GPU_TASKS += [replace(GPU, dataset=task, max_length=128) for task in ("mrpc", "rte")]


def paper_tasks(base: Training) -> list[Training]:
    """The base optimizer's cell of each task."""
    return [replace(base, dataset=task, epochs=10 if task in LONG else 3) for task in GLUE_GRIDS]


# mSAM's m is ours; its rho, and ASAM's, are to be chosen by the grid, which has not run yet.
PAPER_RHOS = {"sam": 0.05, "msam": 0.05, "asam": 0.1, "masam": 0.1}
PAPER_GRID = {
    **dict.fromkeys(("sam", "msam"), (1e-3, 1e-2, 5e-2, 1e-1)),
    **dict.fromkeys(("asam", "masam"), (1e-2, 1e-1, 5e-1, 1.0)),
}


def paper_grid(base: Training) -> list[Training]:
    """The grid of all tasks, of which the largest train on a part."""
    return [
        cell
        for task in paper_tasks(base)
        for cell in grid_of_arms(
            replace(task, train_examples=GLUE_GRIDS[task.dataset][0]),
            micro_batches=8,
            rhos=PAPER_GRID,
            holdout_examples=GLUE_GRIDS[task.dataset][1],
        )
    ]


RUNS = {
    "smoke": all_arms(SMOKE, micro_batches=4, rhos={"sam": 0.01, "msam": 0.01}),
    "cpu": [cell for name, base in SETS.items() for cell in all_arms(base, micro_batches=4, rhos=CPU_RHOS[name])],
    "gpu": [
        cell
        for task in GPU_TASKS
        for cell in all_arms(task, micro_batches=8, rhos={"sam": 0.01, "msam": 0.01, "asam": 0.1, "masam": 0.1})
    ],
    "paper": [cell for task in paper_tasks(PAPER) for cell in all_arms(task, micro_batches=8, rhos=PAPER_RHOS)],
}

TUNING = {
    "cpu": [
        cell
        for name, base in SETS.items()
        for cell in grid_of_arms(
            base,
            micro_batches=4,
            learning_rates=CPU_RATES[name],
            rhos=dict.fromkeys(("sam", "msam"), CPU_GRID[name]),
            pairs=2,
            holdout_examples=1000,
        )
    ],
    "gpu": [
        cell
        for task in GPU_TASKS
        for cell in grid_of_arms(
            task,
            micro_batches=8,
            learning_rates=(2e-5, 5e-5, 1e-4),
            rhos={
                **dict.fromkeys(("sam", "msam"), (1e-3, 1e-2, 5e-2)),
                **dict.fromkeys(("asam", "masam"), (1e-2, 1e-1, 5e-1)),
            },
            holdout_examples=GLUE_GRIDS[task.dataset][1],
        )
    ],
    "paper": paper_grid(PAPER),
}
