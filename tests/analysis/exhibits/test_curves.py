"""The figure of Table 1's training curves, from made-up runs."""

from dataclasses import replace

import pytest

from analysis.exhibit import Target
from analysis.exhibits import table1
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import all_arms
from tests.analysis.invented import results_of, study_run


@pytest.mark.parametrize("models", [1, 3])
def test_the_curves_of_six_arms_share_one_legend_that_fits(models):
    base = next(c for c in catalogue.cells("resnet_cifar", "smoke") if c.method == "base")
    rhos = dict.fromkeys(("sam", "shared", "msam"), 0.1)
    names = ("resnet8", "vit-micro", "wrn-10-1")[:models]
    cells = [c for model in names for c in all_arms(replace(base, model=model), micro_batches=4, rhos=rhos)]
    cells = [replace(c, base_optimizer="adamw", momentum=0.0) if c.model == "vit-micro" else c for c in cells]

    def run(spec):
        made = study_run(spec)
        lines = [{**line, "test_accuracy": 0.3 + 0.01 * line["epoch"]} for line in made.metrics]
        return replace(made, metrics=lines)

    figure = table1.curves(results_of(cells, 2, run), Target("table1", tuple(cells), 2))
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == len(set(labels)) == (6 if models == 1 else 9)
    assert {"SGD, twice the epochs", "SAM, m=4 micro-batches", "mSAM, m=4"} < set(labels)
    assert all(axes.get_legend() is None for axes in figure.axes)
    accuracy = figure.axes[2 * models]
    assert {tuple(line.get_ydata()) for line in accuracy.lines} == {(31.0, 32.0)}
    assert len(accuracy.lines) == 6
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
