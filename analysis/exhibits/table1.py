"""Table 1: test accuracy of each method, and the curves of its trainings."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from analysis.arms import method_name
from analysis.cells import (
    TUNED,
    blocks_of,
    cells_in_order,
    claims,
    compared,
    interval,
    run_ids,
    to_table,
    trained_anew,
    values,
)
from analysis.document import (
    SCORE_NOTE,
    Document,
    formatted,
    make_document,
    measure,
    percent,
    row_notes,
    score_text,
    signed,
    studied_columns,
)
from analysis.frames import Results
from analysis.plots import STYLE, add_legend, draw_band, ends_of, panels_of, set_logarithmic
from analysis.statistics import mean_interval
from experiments.harness.spec import Spec

NOTES_1 = (
    f"{SCORE_NOTE}; differences are in percentage points and paired by seed. Intervals are for one "
    "comparison at a time. Time is the mean for one run, other work of the machine included, and its ratio to the base "
    "optimizer's: Table 4 is what to compare costs by.",
    "The test accuracy is that of the last epoch, never of the best one.",
    "Seeds differ in initial weights and the order of batches. The images of a subset are the same for all seeds, and "
    "so are its wrong labels where there are some: intervals say nothing of other images.",
)

NOTE_SAME_RHO = "mSAM is compared with SAM at the same rho where there is one."

NOTE_MEASURED = (
    "Lambda 1 is the largest Hessian eigenvalue of the training loss, measured as in Table 3. Re-estimated: the test "
    "accuracy once BatchNorm's statistics have been averaged over one more epoch of mini-batches at the final weights."
)

LINEAR = "linear model (floor)"


def table_1(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """Test score of each cell, and its differences to the base optimizer and to SAM, paired by seed.

    Args:
        frame: one row a finished run, as `collect.frame` makes it.
        cells: specs at seed 0; a row each, gathered in blocks that share all but rho, m and tuned values. Curvature
            runs among them add to the rows of the networks that they measure.
        seeds: the seeds 0, ..., seeds - 1 are expected and looked at.

    Returns:
        One row a cell. The first base cell of a block is its reference, and the SAM cell of the same rho if there is
        one, else the first.
    """
    measured = {cell.trained: cell for cell in cells if cell.trained}
    cells = [cell for cell in cells if not cell.trained]
    numbers, runs = compared(frame, cells, seeds), frame.set_index("run_id")
    rows = []
    for block in blocks_of(cells, ("micro_batches", "seed", *TUNED)):
        base = next((cell for cell in block if cell.method == "base"), None)
        usual = mean_interval(values(runs, base, seeds, "wall_seconds")).mean if base else float("nan")
        for cell in block:
            seconds = mean_interval(values(runs, cell, seeds, "wall_seconds")).mean
            rows.append(
                {
                    "train_accuracy": mean_interval(100 * values(runs, cell, seeds, "train_accuracy")).mean,
                    "wall_seconds": seconds,
                    "relative_time": seconds / usual if usual else float("nan"),
                    **_measured(measured.get(cell), runs, seeds),
                }
            )
    numbers = numbers.join(to_table(rows))
    more = [" ".join(run_ids(measured[c], runs, seeds)) if c in measured else "" for c in cells_in_order(cells)]
    numbers["run_ids"] = [" ".join(filter(None, both)) for both in zip(numbers["run_ids"], more, strict=True)]
    return numbers


def _measured(cell: Spec | None, runs: pd.DataFrame, seeds: int) -> dict[str, float]:
    """Columns of the largest eigenvalue and the accuracy with BatchNorm estimated anew, if a curvature run was made."""
    if cell is None:
        return {}
    columns: dict[str, float] = {}
    for name, column, factor in (("lambda_1", "train_lambda_1", 1), ("reestimated", "test_reestimated_accuracy", 100)):
        found = mean_interval(factor * values(runs, cell, seeds, column))
        columns |= {name: found.mean, f"{name}_half_width": found.half_width, f"{name}_n": found.n}
    return columns


def document_1(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
) -> Document:
    """Table 1, or the part of it that one experiment fills, ready to be written."""
    numbers = table_1(frame, cells, seeds)
    marks, notes = row_notes(numbers, failures or {})
    rows = list(numbers.itertuples())
    text = pd.DataFrame(
        {
            "dataset": numbers["dataset"],
            "model": [LINEAR if row.model == "linear" else row.model for row in rows],
            "method": numbers["label"],
            **studied_columns(numbers),
            "rho": [f"{row.rho:g}" if row.rho else "" for row in rows],
            "test accuracy %": [score_text(row) + mark for row, mark in zip(rows, marks, strict=True)],
            "over base": [signed(interval(row, "over_base")) for row in rows],
            "over SAM": [signed(interval(row, "over_sam")) for row in rows],
            "train accuracy %": [formatted(row.train_accuracy, ".2f") for row in rows],
        }
    )
    several = numbers[numbers["method"] == "sam"].groupby("block")["rho"].nunique().gt(1).any()
    if measured := "lambda_1" in numbers:
        text["lambda 1"] = measure(numbers, "lambda_1")
        text["BatchNorm re-estimated %"] = percent(numbers, "reestimated")
    text["time"] = [_time(row) for row in rows]
    return make_document(
        (name, frame, [cell for cell in cells if cell.kind == "train"], seeds),
        numbers,
        text,
        title=f"{name}: test accuracy",
        claims=claims(numbers),
        notes=(
            *notes,
            *trained_anew(frame, cells, seeds),
            *NOTES_1,
            *([NOTE_SAME_RHO] if several else []),
            *([NOTE_MEASURED] if measured else []),
        ),
    )


def _time(row: Any) -> str:
    seconds = formatted(row.wall_seconds, ".0f" if row.wall_seconds >= 10 else ".1f")
    ratio = "" if pd.isna(row.relative_time) else f" (x{row.relative_time:.2f})"
    return f"{seconds} s{ratio}" if seconds else ""


def curves(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """Training loss above, and below how much it rises under the perturbations, by epoch: a column a model."""
    panels = {title: rows for title, rows in panels_of(cells).items() if len(rows) > 1 and rows[0].model != "linear"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(panels), 5), layout="constrained")
        losses, rises = figure.subplots(2, len(panels), squeeze=False)
        for top, bottom, (title, rows) in zip(losses, rises, panels.items(), strict=True):
            last = {method_name(c): draw_band(top, results.curves, c, seeds, "train_loss") for c in rows}
            for cell in rows:
                if cell.rho:
                    draw_band(bottom, results.curves, cell, seeds, "sharpness")
            top.set(title=f"{title}{ends_of(last)}", xlabel="epoch", ylabel="training loss")
            bottom.set(xlabel="epoch", ylabel="rise of the loss under e")
            for axes in (top, bottom):
                set_logarithmic(axes)
                add_legend(axes)
    return figure
