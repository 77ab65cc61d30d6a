"""The largest Hessian eigenvalue during training."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis.cells import averages, cells_in_order, mean_columns, rounded_relative
from analysis.document import SIGNIFICANCE_NOTE, measure, percent
from analysis.exhibit import Exhibit, Picture, Target, View
from analysis.flatness import eigenvalue_columns, eigenvalue_numbers, eigenvalue_sentences
from analysis.frames import Results
from analysis.plots import add_legend, draw_band, panels_of, row_of_panels, seeds_of, set_logarithmic
from experiments.harness.runs.spec import Run

NOTE = (
    "Lambda 1 is the largest Hessian eigenvalue of the training loss on the first 256 training examples (all if there "
    "are fewer), in eval mode, relative tolerance 0.01: after the last epoch, and its largest value among the measured "
    "epochs. Means ± half-width of the 95 % Student t interval (number of seeds); a ratio is the mean "
    "difference of natural logarithms, paired by seed; below 1 is flatter. " + SIGNIFICANCE_NOTE
)


def numbers(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """The largest eigenvalue of each cell after its last epoch, as in Table 3.

    Args:
        frame: one row for each finished run.
        cells: specs at seed 0 that measure it during training, one for each row, in blocks as in Table 1.
        seeds: the seeds 0, ..., seeds - 1 are expected and used.
        varies: the fields that the table's experiments declare to vary.
    """
    table, runs = eigenvalue_numbers(frame, cells, seeds, varies), frame.set_index("run_id")
    for name, factor in (("greatest_lambda_1", 1), ("test_accuracy", 100)):
        means = averages(runs, cells_in_order(cells, varies), seeds, name, factor)
        table = table.join(pd.DataFrame(mean_columns(name, means)))
    return rounded_relative(table)


def text(view: View) -> pd.DataFrame:
    """The largest eigenvalue after training, and its largest value during training."""
    table = view.numbers
    return pd.DataFrame(
        {
            "dataset": table["dataset"],
            "model": table["model"],
            "method": table["label"],
            "rho": [f"{row.rho:g}" if row.rho else "" for row in view.rows],
            **eigenvalue_columns(table, view.marks),
            "maximum during training": measure(table, "greatest_lambda_1"),
            "test accuracy %": percent(table, "test_accuracy"),
        }
    )


def by_epoch(results: Results, target: Target) -> Figure:
    """The largest Hessian eigenvalue by epoch, one panel for each model."""
    panels = panels_of(target.cells)
    figure, row = row_of_panels(len(panels))
    for axes, (title, rows) in zip(row, panels.items(), strict=True):
        last = {}
        for cell in rows:
            arm = target.arms[cell]
            last[arm.called(cell)] = draw_band(axes, results.curves, cell, target.seeds, "lambda_1", arm)
        axes.set(title=f"{title}{seeds_of(last.values())}", xlabel="epoch", ylabel="lambda 1")
        set_logarithmic(axes)
        add_legend(axes)
    return figure


EXHIBIT = Exhibit(
    name="trajectories",
    title="Largest Hessian eigenvalue during training",
    shows=lambda cell: cell.flat["curvature_every"] > 0,
    numbers=numbers,
    text=text,
    sentences=eigenvalue_sentences,
    notes=lambda view: (NOTE,),
    figures=(
        Picture(
            "trajectories",
            "Largest Hessian eigenvalue during training; bands are 95 % intervals over seeds.",
            by_epoch,
            place=55,
        ),
    ),
    place=100,
)
