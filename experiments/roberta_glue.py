"""RoBERTa on GLUE: AdamW, AdamW over micro-batches, SAM and mSAM (the RoBERTa block of Table 2).

    python -m experiments run roberta_glue --profile paper

paper: RoBERTa-base on all tasks, from the hub; no GPU has run it yet. No smaller RoBERTa is available without the hub,
so the other profiles have no cells; `--set model=FOLDER` trains any local checkpoint.

Expected: not measured.
"""

from dataclasses import replace

from experiments.harness.runs.facts import GLUE_GRIDS
from experiments.harness.runs.grids import four_methods, tuning_grid
from experiments.harness.runs.spec import ON_GPU, Training

TABLE = "table2"

# Liu et al. 2019 (RoBERTa, section 5.1 and table 10): batch 16 or 32, learning rate 1e-5 to 3e-5, 10 epochs, warm-up
# over the first 6 %, linear decay, weight decay 0.1. Clipping at 1.0 is ours: theirs is 0 (none).
PAPER = Training(
    profile="paper",
    dataset="sst2",
    model="roberta-base",
    base_optimizer="adamw",
    learning_rate=2e-5,
    weight_decay=0.1,
    decay="matrices",
    schedule="linear",
    warmup_epochs=0.6,
    clip_norm=1.0,
    epochs=10,
    batch_size=32,
    max_length=128,
    **ON_GPU,
)

# rho as in bert_glue.py: we do not know the paper's m and rho for mSAM, and the grid below has not run yet.
RUNS = {
    "paper": [
        cell
        for task in GLUE_GRIDS
        for cell in four_methods(replace(PAPER, dataset=task), micro_batches=8, sam_rho=0.01, msam_rho=0.01)
    ]
}

TUNING = {
    "paper": [
        cell
        for task, (examples, holdout) in GLUE_GRIDS.items()
        for cell in tuning_grid(
            replace(PAPER, dataset=task, train_examples=examples),
            micro_batches=(2, 4, 8),
            rhos=(1e-4, 1e-3, 1e-2, 1e-1),
            learning_rates=(1e-5, 2e-5, 3e-5),
            holdout_examples=holdout,
        )
    ]
}
