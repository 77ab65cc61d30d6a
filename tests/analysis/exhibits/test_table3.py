"""Table 3 and its figures: made-up runs against values computed by hand."""

from dataclasses import replace

import pytest

from analysis.exhibit import Target
from analysis.exhibits import table3
from analysis.frames import Results
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import with_seeds
from tests.analysis.invented import curvature_run, document, pictures, results_of, stability_run

CELLS = catalogue.cells("hessian", "smoke")
RESNET = [cell for cell in CELLS if cell.model == "resnet8"]
THEORY = catalogue.cells("theory", "smoke")


def all_results(seeds=2):
    runs = [curvature_run(spec) for spec in with_seeds(CELLS, seeds)]
    return Results.of([*runs, *(stability_run(spec) for spec in with_seeds(THEORY, seeds))])


def test_lambda_1_is_compared_within_each_seed():
    results = results_of(RESNET, 2, curvature_run)
    numbers = table3.numbers(results.runs, RESNET, 2).set_index("method")
    assert numbers.loc["base", "mean"] == 100.5
    assert (numbers.loc["msam", "over_base"], numbers.loc["msam", "over_base_half_width"]) == (-60, 0)
    assert numbers.loc["msam", "over_sam"] == -20
    assert numbers.loc["msam", "over_control"] == -50
    assert numbers.loc["sam", "test_lambda_1"] == 121
    assert numbers.loc["sam", "train_sharpness_m4"] == pytest.approx(0.2)
    assert numbers.loc["sam", "residual"] == pytest.approx(1e-4)


def test_a_flatter_minimum_has_the_expected_sign():
    frame = results_of(RESNET, 2, curvature_run).runs
    (line,) = document("table3", frame, RESNET, 2).claims
    assert (
        "SAM over SGD: -40.00 ± 0.00 (n=2): significant; mSAM, m=4 over SAM: -20.00 ± 0.00 (n=2): significant;" in line
    )
    sharper = [curvature_run(spec, shift=100 if spec.method == "msam" else 0) for spec in with_seeds(RESNET, 2)]
    (line,) = document("table3", Results.of(sharper).runs, RESNET, 2).claims
    assert "mSAM, m=4 over SAM: +80.00 ± 0.00 (n=2): significant, with the opposite sign" in line


def test_unmeasured_cells_show_not_run():
    results = results_of(RESNET[:2], 2, curvature_run)
    shown = document("table3", results.runs, RESNET, 2)
    assert list(shown.cells["lambda 1"]).count("not run") == 2
    assert "over SAM: not run" in shown.claims[0]
    shown = document("table3", Results.of([]).runs, RESNET, 2)
    assert set(shown.cells["lambda 1"]) == {"not run"}


def test_the_formats_agree_and_name_the_commit():
    shown = document("table3", all_results().runs, CELLS, 2)
    files = shown.files()
    assert "100 ± 6 (2)" in files["table3.md"]
    assert r"100 $\pm$ 6 (2)" in files["table3.tex"]
    assert "first 16 training" in files["table3.md"]
    assert "rho=0.05" in files["table3.md"]
    assert "aaaaaaaaaaaa" in shown.origin


@pytest.mark.usefixtures("sketches")
def test_different_numbers_give_different_pictures():
    results = all_results()
    flat, stability = Target("table3", tuple(CELLS), 2), Target("theory", tuple(THEORY), 2)
    all_pictures = pictures(results, flat, stability)
    forms = [
        f"figures/{name}.{form}" for name in ("theory", "flatness", "spectra", "slices") for form in ("pdf", "png")
    ]
    assert sorted(all_pictures) == sorted(forms)
    stability_alone = pictures(results, stability)
    assert list(stability_alone) == ["figures/theory.pdf", "figures/theory.png"]
    assert stability_alone["figures/theory.png"] != all_pictures["figures/theory.png"]
    empty = pictures(Results.of([]), stability)
    assert empty["figures/theory.png"] != stability_alone["figures/theory.png"]


def test_runs_of_other_cells_do_not_change_the_table():
    other = replace(RESNET[0], measured_rho=0.1)
    results = Results.of([curvature_run(RESNET[0]), curvature_run(other, shift=50)])
    assert table3.numbers(results.runs, RESNET[:1], 1)["mean"].tolist() == [100.0]
