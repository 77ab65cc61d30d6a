"""Table 1: test accuracy of each method, and the curves of its trainings."""

from functools import partial

from matplotlib.figure import Figure

from analysis import scores
from analysis.arms import method_name
from analysis.exhibit import Exhibit, Picture, Target
from analysis.frames import Results
from analysis.plots import add_legend, draw_band, ends_of, panels_of, set_logarithmic

COLUMNS = (*scores.COLUMNS,)
"""What stands behind the score and its differences. A further column is one more entry here, as in

    scores.mean_column("test loss", "test_loss")
"""


def curves(results: Results, target: Target) -> Figure:
    """Training loss above, and below how much it rises under the perturbations, by epoch: a column a model."""
    panels = {
        title: rows for title, rows in panels_of(target.cells).items() if len(rows) > 1 and rows[0].model != "linear"
    }
    figure = Figure(figsize=(3.4 * len(panels), 5), layout="constrained")
    losses, rises = figure.subplots(2, len(panels), squeeze=False)
    for top, bottom, (title, rows) in zip(losses, rises, panels.items(), strict=True):
        last = {method_name(c): draw_band(top, results.curves, c, target.seeds, "train_loss") for c in rows}
        for cell in rows:
            if cell.rho:
                draw_band(bottom, results.curves, cell, target.seeds, "sharpness")
        top.set(title=f"{title}{ends_of(last)}", xlabel="epoch", ylabel="training loss")
        bottom.set(xlabel="epoch", ylabel="rise of the loss under e")
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
            "Training loss, and its rise at the perturbed weights, by epoch; bands are 95 % intervals over seeds.",
            curves,
        ),
    ),
    place=10,
)
