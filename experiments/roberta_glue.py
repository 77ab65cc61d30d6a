"""RoBERTa on GLUE: AdamW, SAM and mSAM with their controls (the RoBERTa block of Table 2).

    python -m experiments run roberta_glue --profile paper

paper: RoBERTa-base on all tasks, from the hub; no GPU has run it yet. No smaller RoBERTa is available without the hub,
so the other profiles have no cells; `--set model=FOLDER` trains any local checkpoint.

Expected: not measured.
"""

from dataclasses import replace

from experiments import bert_glue
from experiments.harness.runs.grids import all_arms

TABLE = "table2"

# With the settings of BERT-base, so that both compare with Na et al. 2022.
PAPER = replace(bert_glue.PAPER, model="roberta-base")

RUNS = {
    "paper": [
        cell
        for task in bert_glue.paper_tasks(PAPER)
        for cell in all_arms(task, micro_batches=8, rhos=bert_glue.PAPER_RHOS)
    ]
}

TUNING = {"paper": bert_glue.paper_grid(PAPER)}
