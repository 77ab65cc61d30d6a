"""Table 3, the theory's table and the figures: from made-up runs, by hand."""

from dataclasses import replace

import pytest

from analysis.collect import Run
from analysis.document import significant
from analysis.exhibits.studies import pages
from analysis.exhibits.table3 import document_3, table_3
from analysis.exhibits.theory import document_theory, theory_table
from analysis.frames import Results
from analysis.publish import publish, redraw, target
from analysis.statistics import Interval
from experiments.harness import catalogue
from experiments.harness.spec import with_seeds

CELLS = catalogue.cells("hessian", "smoke")
RESNET = [cell for cell in CELLS if cell.model == "resnet8"]
THEORY = catalogue.cells("theory", "smoke")
SESSION = {"commit": "a" * 40, "dirty": False, "code": "c" * 16, "cpu": "a processor"}
LAMBDA = {"base": 100.0, "control": 90.0, "sam": 60.0, "msam": 40.0}


def curvature(spec, shift=0.0):
    """A run whose lambda 1 is its method's, and one more for each seed."""
    value = LAMBDA[spec.method] + spec.seed + shift
    summary = {"train_lambda_1": value, "test_lambda_1": 2 * value, "train_lambda_ratio": 3.0, "train_trace": 5 * value}
    summary |= {"test_accuracy": 0.5 - value / 1000}
    summary |= {"train_ascent_sharpness": value / 1e4, "train_average_sharpness": 1e-4, "train_residual": 1e-4}
    for m in (2**k for k in range(9)):  # so many columns that adding them one by one would warn
        summary |= {f"train_penalty_m{m}": m**0.5, f"train_squared_m{m}": float(m), f"train_sharpness_m{m}": 0.05 * m}
    density = {"density_nodes": [0.0, value], "density_weights": [0.9, 0.1]}
    slices = {"slice_positions": [round(-1 + 0.1 * i, 1) for i in range(21)], "slice_losses": [1.0] * 21}
    slices["plane_losses"] = [1.0 + 0.01 * i for i in range(121)]
    lines = [{"part": "train", "measure": "density", **density}, {"part": "train", "measure": "slices", **slices}]
    return Run(spec, {**summary, "wall_seconds": 1.0}, lines, [SESSION])


def stability(spec, error=0.001):
    found = {"predicted_sharpness": 20.0, "stable_sharpness": 20 * (1 + error), "relative_error": error}
    return Run(spec, {**found, "wall_seconds": 1.0}, [], [SESSION])


def all_results(seeds=2):
    runs = [curvature(spec) for spec in with_seeds(CELLS, seeds)] + [stability(s) for s in with_seeds(THEORY, seeds)]
    return Results.of(runs)


def test_lambda_1_is_compared_within_each_seed():
    results = Results.of([curvature(spec) for spec in with_seeds(RESNET, 2)])
    numbers = table_3(results.runs, RESNET, 2).set_index("method")
    assert numbers.loc["base", "mean"] == 100.5
    assert (numbers.loc["msam", "over_base"], numbers.loc["msam", "over_base_half_width"]) == (-60, 0)
    assert numbers.loc["msam", "over_sam"] == -20
    assert numbers.loc["msam", "over_control"] == -50
    assert numbers.loc["sam", "test_lambda_1"] == 121
    assert numbers.loc["sam", "train_sharpness_m4"] == pytest.approx(0.2)
    assert numbers.loc["sam", "residual"] == pytest.approx(1e-4)


def test_flatter_is_what_the_claim_expects():
    frame = Results.of([curvature(spec) for spec in with_seeds(RESNET, 2)]).runs
    (line,) = document_3("table3", frame, RESNET, 2).claims
    assert "SAM over SGD: -40.00 ± 0.00 (n=2): separated; mSAM, m=4 over SAM: -20.00 ± 0.00 (n=2): separated" in line
    sharper = [curvature(spec, shift=100 if spec.method == "msam" else 0) for spec in with_seeds(RESNET, 2)]
    (line,) = document_3("table3", Results.of(sharper).runs, RESNET, 2).claims
    assert "mSAM, m=4 over SAM: +80.00 ± 0.00 (n=2): separated, the other way round" in line


def test_what_was_not_measured_says_so():
    results = Results.of([curvature(spec) for spec in with_seeds(RESNET[:2], 2)])
    document = document_3("table3", results.runs, RESNET, 2)
    assert list(document.cells["lambda 1"]).count("not run") == 2
    assert "over SAM: not run" in document.claims[0]
    document = document_3("table3", Results.of([]).runs, RESNET, 2)
    assert set(document.cells["lambda 1"]) == {"not run"}


def test_the_forms_agree_and_say_where_the_numbers_are_from():
    document = document_3("table3", all_results().runs, CELLS, 2)
    files = document.files()
    assert "100 ± 6 (2)" in files["table3.md"]
    assert r"100 $\pm$ 6 (2)" in files["table3.tex"]
    assert "first 16 training" in files["table3.md"]
    assert "rho=0.05" in files["table3.md"]
    assert "aaaaaaaaaaaa" in document.origin


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Interval(123.456, 7.89, 3), "123 ± 8 (3)"),
        (Interval(0.01234, 0.00056, 3), "0.0123 ± 0.0006 (3)"),
        (Interval(1.5, 20.0, 2), "1.5 ± 20.0 (2)"),
        (Interval(12.34, float("nan"), 1), "12.3 (1)"),
        (Interval(float("nan"), float("nan"), 0), "not run"),
    ],
)
def test_three_significant_digits(found, told):
    assert significant(found) == told


def test_a_prediction_holds_or_does_not_by_its_worst_seed():
    runs = [stability(spec, 0.03 if spec.method == "msam" and spec.seed else 0.001) for spec in with_seeds(THEORY, 2)]
    document = document_theory("theory", Results.of(runs).runs, THEORY, 2)
    assert "exact: the prediction does not hold to 2%; what was simulated is up to 3.00% off." in document.claims
    numbers = theory_table(Results.of(runs).runs, THEORY, 2).set_index("method")
    assert numbers.loc["msam", "relative_error"] == pytest.approx(0.0155)
    document = document_theory("theory", Results.of([stability(s) for s in with_seeds(THEORY, 2)]).runs, THEORY, 2)
    assert document.claims[0].startswith("exact: the prediction holds to 2%")
    assert "in 0 of 1 settings" in document.claims[1], "all boundaries were made equal"


def test_a_terminal_shows_each_model_of_the_theory_by_itself():
    cells = [cell for cell in catalogue.cells("theory", "cpu") if not cell.normalised][:20]
    models = {cell.model for cell in cells}
    shown = document_theory("theory", Results.of([stability(s) for s in cells]).runs, cells, 1).terminal()
    assert models == {"regression", "two-layer"}
    assert all(f"{model}, interpolation" in shown for model in models)


def test_other_numbers_give_other_pictures():
    results = all_results()
    found = pages(results, {"table3": (CELLS, 2), "theory": (THEORY, 2)})
    forms = [
        f"figures/{name}.{form}" for name in ("theory", "flatness", "spectra", "slices") for form in ("pdf", "png")
    ]
    assert sorted(found) == sorted(forms)
    stability_alone = pages(results, {"theory": (THEORY, 2)})
    assert list(stability_alone) == ["figures/theory.pdf", "figures/theory.png"]
    assert stability_alone["figures/theory.png"] != found["figures/theory.png"]
    nothing = pages(Results.of([]), {"theory": (THEORY, 2)})
    assert nothing["figures/theory.png"] != stability_alone["figures/theory.png"]


def test_published_tables_and_figures_are_drawn_again_to_the_byte(tmp_path):
    results, folder = all_results(), tmp_path / "smoke"
    publish(folder, "smoke", [target("table3", "smoke"), target("theory", "smoke")], results)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert {path.name for path in before} >= {"table3.md", "theory.md", "theory.pdf", "spectra.png"}
    for path in folder.glob("*/*.*"):
        path.unlink()
    redraw(folder, "smoke")
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_other_cells_leave_the_table_alone():
    other = replace(RESNET[0], measured_rho=0.1)
    results = Results.of([curvature(RESNET[0]), curvature(other, shift=50)])
    assert table_3(results.runs, RESNET[:1], 1)["mean"].tolist() == [100.0]
