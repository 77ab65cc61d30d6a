"""Table 1: test accuracy of each method, and its training curves."""

from functools import partial

from matplotlib.figure import Figure

from analysis import scores
from analysis.exhibit import Exhibit, Picture, Target
from analysis.frames import Results
from analysis.plots import add_legend, draw_band, ends_of, panels_of, set_logarithmic

COLUMNS = (*scores.COLUMNS,)
"""The columns after the score and its differences. To add a column, add an entry, such as

    scores.mean_column("test loss", "test_loss")
"""


def curves(results: Results, target: Target) -> Figure:
    """Training loss (top) and its rise under the perturbation (bottom) by epoch, one column for each model."""
    panels = {
        title: rows for title, rows in panels_of(target.cells).items() if len(rows) > 1 and rows[0].model != "linear"
    }
    figure = Figure(figsize=(3.4 * len(panels), 5), layout="constrained")
    losses, rises = figure.subplots(2, len(panels), squeeze=False)
    for top, bottom, (title, rows) in zip(losses, rises, panels.items(), strict=True):
        last = {}
        for cell in rows:
            draw = partial(draw_band, curves=results.curves, cell=cell, seeds=target.seeds, arm=target.arms[cell])
            last[target.arms[cell].called(cell)] = draw(top, column="train_loss")
            if cell.rho:
                draw(bottom, column="sharpness")
        top.set(title=f"{title}{ends_of(last)}", xlabel="epoch", ylabel="training loss")
        bottom.set(xlabel="epoch", ylabel="rise of the loss")
        for axes in (top, bottom):
            set_logarithmic(axes)
            add_legend(axes)
    return figure


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
