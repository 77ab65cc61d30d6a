"""The largest Hessian eigenvalue along training."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis.arms import method_name
from analysis.cells import averages, cells_in_order, compared, mean_columns, significant
from analysis.document import eigenvalue_columns, measure, percent
from analysis.exhibit import Exhibit, Picture, Target, View
from analysis.frames import Results
from analysis.plots import add_legend, draw_band, ends_of, panels_of, row_of_panels, set_logarithmic
from analysis.scores import sentences
from experiments.harness.runs.spec import Run

NOTE = (
    "Lambda 1 is the largest Hessian eigenvalue of the training loss on the first 256 training examples (all where "
    "there are fewer), in eval mode, relative tolerance 0.01: after the last epoch, and its greatest value among the "
    "epochs at which it was measured. Means ± half-width of the 95 % Student t interval (number of seeds); differences "
    "are paired by seed, and negative is flatter."
)


def numbers(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """The largest eigenvalue of each cell after its last epoch, as Table 3 has that of Table 1's networks.

    Args:
        frame: one row a finished run.
        cells: specs at seed 0 that measure it along training; a row each, in blocks as those of Table 1.
        seeds: the seeds 0, ..., seeds - 1 are expected and looked at.
        varies: the fields that the table's experiments declare to vary.
    """
    table, runs = compared(frame, cells, seeds, varies), frame.set_index("run_id")
    for name, factor in (("greatest_lambda_1", 1), ("test_accuracy", 100)):
        found = averages(runs, cells_in_order(cells, varies), seeds, name, factor)
        table = table.join(pd.DataFrame(mean_columns(name, found)))
    return significant(table)


def text(view: View) -> pd.DataFrame:
    """The largest eigenvalue after training, and its greatest value on the way."""
    table = view.numbers
    return pd.DataFrame(
        {
            "dataset": table["dataset"],
            "model": table["model"],
            "method": table["label"],
            "rho": [f"{row.rho:g}" if row.rho else "" for row in view.rows],
            **eigenvalue_columns(table, view.marks),
            "greatest on the way": measure(table, "greatest_lambda_1"),
            "test accuracy %": percent(table, "test_accuracy"),
        }
    )


def by_epoch(results: Results, target: Target) -> Figure:
    """The largest Hessian eigenvalue by epoch, a panel a model."""
    panels = panels_of(target.cells)
    figure, row = row_of_panels(len(panels))
    for axes, (title, rows) in zip(row, panels.items(), strict=True):
        last = {method_name(c): draw_band(axes, results.curves, c, target.seeds, "lambda_1") for c in rows}
        axes.set(title=f"{title}{ends_of(last)}", xlabel="epoch", ylabel="lambda 1")
        set_logarithmic(axes)
        add_legend(axes)
    return figure


EXHIBIT = Exhibit(
    name="trajectories",
    title="Largest Hessian eigenvalue along training",
    shows=lambda cell: cell.flat["curvature_every"] > 0,
    numbers=numbers,
    text=text,
    sentences=lambda view: sentences(view, expected=-1),
    notes=lambda view: (NOTE,),
    figures=(
        Picture(
            "trajectories",
            "Largest Hessian eigenvalue along training; bands are 95 % intervals over seeds.",
            by_epoch,
            place=55,
        ),
    ),
    place=100,
)
