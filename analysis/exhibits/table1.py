"""Table 1: test accuracy of each method, and its training curves."""

from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis import scores
from analysis.exhibit import Exhibit, Picture, Target
from analysis.frames import Results
from analysis.plots import add_legend, draw_band, draw_under_way, panels_of, seeds_of, set_logarithmic
from analysis.statistics import Interval
from experiments.harness.runs.spec import in_percent

COLUMNS = (*scores.COLUMNS,)
"""The columns after the score and its differences. To add a column, add an entry, such as

    scores.mean_column("test loss", "test_loss")
"""


def curves(results: Results, target: Target) -> Figure:
    """By epoch, one column for each model: training loss, its rise under the perturbation and, if recorded, accuracy.

    Bands are over the seeds of finished runs; a dotted line is one run that is not finished.
    """
    panels = {
        title: rows for title, rows in panels_of(target.cells).items() if len(rows) > 1 and rows[0].model != "linear"
    }
    finished, under_way = (_in_percent(curves) for curves in (results.curves, results.under_way))
    scored = any(c.score in curves for curves in (finished, under_way) for c in target.cells)
    figure = Figure(figsize=(3.4 * len(panels), 7.5 if scored else 5), layout="constrained")
    grid = figure.subplots(2 + scored, len(panels), squeeze=False)
    for column, (title, rows) in zip(grid.T, panels.items(), strict=True):
        last: dict[str, Interval] = {}
        for cell in rows:
            about: dict[str, Any] = {"cell": cell, "seeds": target.seeds, "arm": target.arms[cell]}
            for axes, measure in zip(column, ("train_loss", "sharpness", cell.score), strict=False):
                if measure != "sharpness" or cell.rho:
                    end = draw_band(axes, finished, column=measure, **about)
                    draw_under_way(axes, under_way, column=measure, **about)
                    last.setdefault(target.arms[cell].called(cell), end)
        column[0].set(title=f"{title}{seeds_of(last.values())}")
        for axes, words in zip(column, ("training loss", "rise of the loss", "accuracy % (first 1,000)"), strict=False):
            axes.set(xlabel="epoch", ylabel=words)
            if "accuracy" not in words:
                set_logarithmic(axes)
            add_legend(axes)
    return figure


def _in_percent(curves: pd.DataFrame) -> pd.DataFrame:
    return curves.assign(**{name: 100 * curves[name] for name in curves if in_percent(str(name))})


EXHIBIT = Exhibit(
    name="table1",
    title="Table 1: test accuracy",
    part="{name}: test accuracy",
    shows=scores.shows,
    numbers=partial(scores.numbers, columns=COLUMNS),
    text=partial(scores.text, columns=COLUMNS),
    sentences=scores.sentences,
    notes=scores.notes,
    claims=scores.CLAIMS,
    figures=(
        Picture(
            "curves",
            "Training loss and its rise at the perturbed weights, by epoch; bands are 95 % intervals over seeds.",
            curves,
        ),
    ),
    place=10,
)
