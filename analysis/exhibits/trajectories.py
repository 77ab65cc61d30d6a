"""The largest Hessian eigenvalue along training."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from analysis.arms import method_name
from analysis.cells import cells_in_order, claims, compared, to_significant, trained_anew, values
from analysis.document import Document, eigenvalue_columns, make_document, measure, percent, row_notes
from analysis.frames import Results
from analysis.plots import STYLE, add_legend, draw_band, ends_of, panels_of, row_of_axes, set_logarithmic
from analysis.statistics import mean_interval
from experiments.harness.spec import Spec

NOTE_TRAJECTORIES = (
    "Lambda 1 is the largest Hessian eigenvalue of the training loss on the first 256 training examples (all where "
    "there are fewer), in eval mode, relative tolerance 0.01: after the last epoch, and its greatest value among the "
    "epochs at which it was measured. Means ± half-width of the 95 % Student t interval (number of seeds); differences "
    "are paired by seed, and negative is flatter."
)


def trajectories_table(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """The largest eigenvalue of each cell after its last epoch, as `table_3` has that of Table 1's networks.

    Args:
        frame: one row a finished run.
        cells: specs at seed 0 that measure it along training; a row each, in blocks as those of `table_1`.
        seeds: the seeds 0, ..., seeds - 1 are expected and looked at.
    """
    numbers, runs = compared(frame, cells, seeds), frame.set_index("run_id")
    for name, factor in (("greatest_lambda_1", 1), ("test_accuracy", 100)):
        found = [mean_interval(factor * values(runs, cell, seeds, name)) for cell in cells_in_order(cells)]
        numbers[name] = [f.mean for f in found]
        numbers[f"{name}_half_width"] = [f.half_width for f in found]
    return to_significant(numbers)


def document_trajectories(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
) -> Document:
    """The largest eigenvalue after training and its greatest value on the way, ready to be written."""
    numbers = trajectories_table(frame, cells, seeds)
    marks, notes = row_notes(numbers, failures or {})
    rows = list(numbers.itertuples())
    text = pd.DataFrame(
        {
            "dataset": numbers["dataset"],
            "model": numbers["model"],
            "method": numbers["label"],
            "rho": [f"{row.rho:g}" if row.rho else "" for row in rows],
            **eigenvalue_columns(numbers, marks),
            "greatest on the way": measure(numbers, "greatest_lambda_1"),
            "test accuracy %": percent(numbers, "test_accuracy"),
        }
    )
    return make_document(
        (name, frame, cells, seeds),
        numbers,
        text,
        title=name,
        claims=claims(numbers, expected=-1),
        notes=(*notes, *trained_anew(frame, cells, seeds), NOTE_TRAJECTORIES),
    )


def trajectories(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """The largest Hessian eigenvalue by epoch, a panel a model."""
    panels = panels_of(cells)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 3.2), layout="constrained")
        for axes, (title, rows) in zip(row_of_axes(figure, len(panels)), panels.items(), strict=True):
            last = {method_name(c): draw_band(axes, results.curves, c, seeds, "lambda_1") for c in rows}
            axes.set(title=f"{title}{ends_of(last)}", xlabel="epoch", ylabel="lambda 1")
            set_logarithmic(axes)
            add_legend(axes)
    return figure
