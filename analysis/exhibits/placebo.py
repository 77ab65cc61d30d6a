"""The placebo: one arm against itself at other seeds, unpaired."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from scipy import stats

from analysis.cells import identity, interval, rounded, scores
from analysis.document import SCORE_NOTE, score_text, signed
from analysis.exhibit import Exhibit, View
from analysis.statistics import CONFIDENCE, Interval
from experiments.harness.runs.methods import arm_of
from experiments.harness.runs.spec import Run

NOTES = (
    f"{SCORE_NOTE}. The two rows have the same settings and differ in nothing but their seeds, so there is no true "
    "difference. The difference is unpaired, with Welch's 95 % t interval, and counts for no claim and in no family.",
)


def numbers(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """Two rows for each cell: at its own seeds, with the difference to the other row, and at the seeds from 0 on.

    Args:
        frame: one row for each finished run.
        cells: cells whose first seed is `seeds` or higher.
        seeds: the number of seeds of each row.
        varies: ignored.
    """
    runs, rows = frame.set_index("run_id"), []
    for block, cell in enumerate(cells):
        sets = (cell, replace(cell, seed=0))
        values = [scores(one, runs, seeds).to_numpy() for one in sets]
        unknown = Interval(float("nan"), float("nan"), 0), float("nan")
        for one, (difference, p) in zip(sets, (welch(*values), unknown), strict=True):
            rows.append(
                {
                    "block": block,
                    "label": arm_of(one).called(one),
                    "first_seed": one.seed,
                    **identity(one, runs, seeds),
                    "difference": difference.mean,
                    "difference_half_width": difference.half_width,
                    "difference_n": difference.n,
                    "p": p,
                }
            )
    return rounded(pd.DataFrame(rows))


def welch(a: Any, b: Any) -> tuple[Interval, float]:
    """The mean of `a` minus that of `b`, with Welch's interval, the smaller number of values, and the p value."""
    n = min(len(a), len(b))
    if n < 2:
        return Interval(float(a.mean() - b.mean()) if n else float("nan"), float("nan"), n), float("nan")
    test = stats.ttest_ind(a, b, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return Interval(float(a.mean() - b.mean()), float(high - low) / 2, n), float(test.pvalue)


def text(view: View) -> pd.DataFrame:
    """The score at each set of seeds, and their difference."""
    rows, seeds = view.rows, view.target.seeds
    return pd.DataFrame(
        {
            "dataset": [row.dataset for row in rows],
            "model": [row.model for row in rows],
            "method": [row.label for row in rows],
            "seeds": [f"{row.first_seed} to {row.first_seed + seeds - 1}" for row in rows],
            "test accuracy %": [score_text(row) + mark for row, mark in zip(rows, view.marks, strict=True)],
            "difference": [signed(interval(row, "difference")) for row in rows],
        }
    )


def sentences(view: View) -> list[str]:
    """The difference of the two sets of seeds, with its interval and p value."""
    lines, rows = [], view.rows
    for mine, theirs in zip(rows[::2], rows[1::2], strict=True):
        difference = interval(mine, "difference")
        where = f"{mine.model}, {mine.dataset}, {mine.label}, seeds from {mine.first_seed} over seeds from 0"
        if difference.n < 2:
            lines.append(f"{where}: not run, because it needs both sets ({mine.n} and {theirs.n} runs are here).")
            continue
        size = f"{difference.mean:+z.2f} ± {difference.half_width:.2f} (n={mine.n} and {theirs.n}), p {mine.p:.2g}"
        chance = "" if difference.significant else "not "
        lines.append(f"{where}: {size}: {chance}significant, where every significant difference is one by chance.")
    return lines


EXHIBIT = Exhibit(
    name="placebo",
    title="Placebo: one arm against itself at other seeds",
    shows=lambda cell: cell.kind == "train",
    numbers=numbers,
    text=text,
    sentences=sentences,
    notes=lambda view: NOTES,
    place=70,
)
