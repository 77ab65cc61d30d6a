"""The table of the theory: made-up runs against values computed by hand."""

import pytest

from analysis.exhibits import theory
from analysis.frames import Results
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import with_seeds
from tests.analysis.invented import document, stability_run

THEORY = catalogue.cells("theory", "smoke")


def test_the_worst_seed_decides_whether_a_prediction_holds():
    runs = [
        stability_run(spec, 0.03 if spec.method == "msam" and spec.seed else 0.001) for spec in with_seeds(THEORY, 2)
    ]
    shown = document("theory", Results.of(runs).runs, THEORY, 2)
    assert "exact: the prediction does not hold to 2%; simulations deviate by up to 3.00%." in shown.claims
    numbers = theory.numbers(Results.of(runs).runs, THEORY, 2).set_index("method")
    assert numbers.loc["msam", "relative_error"] == pytest.approx(0.0155)
    shown = document("theory", Results.of([stability_run(s) for s in with_seeds(THEORY, 2)]).runs, THEORY, 2)
    assert shown.claims[0].startswith("exact: the prediction holds to 2%")
    assert "in 0 of 1 settings" in shown.claims[1], "all boundaries are equal here"


def test_the_terminal_shows_each_model_separately():
    cells = [cell for cell in catalogue.cells("theory", "cpu") if not cell.normalised][:20]
    models = {cell.model for cell in cells}
    shown = document("theory", Results.of([stability_run(s) for s in cells]).runs, cells, 1).terminal()
    assert models == {"regression", "two-layer"}
    assert all(f"{model}, interpolation" in shown for model in models)
