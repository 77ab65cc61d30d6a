"""Table 3 and its figures: made-up runs against values computed by hand."""

from dataclasses import replace
from math import log
from statistics import mean

import numpy as np
import pytest

from analysis.exhibit import Target
from analysis.exhibits import table3
from analysis.flatness import as_ratio
from analysis.frames import Results
from analysis.statistics import Interval, mean_interval
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.methods import arms_of
from tests.analysis.invented import curvature_run, document, pictures, results_of, stability_run, study_run

CELLS = catalogue.cells("hessian", "smoke")
FOUR = ("base", "control", "sam", "msam")
RESNET = [cell for cell, arm in arms_of(CELLS).items() if cell.model == "resnet8" and arm.name in FOUR]
THEORY = catalogue.cells("theory", "smoke")


def all_results(seeds=2):
    runs = [curvature_run(spec) for spec in with_seeds(CELLS, seeds)]
    return Results.of([*runs, *(stability_run(spec) for spec in with_seeds(THEORY, seeds))])


def test_lambda_1_is_compared_by_its_logarithm_within_each_seed():
    results = results_of(RESNET, 2, curvature_run)
    numbers = table3.numbers(results.runs, RESNET, 2).set_index("method")
    assert numbers.loc["base", "mean"] == 100.5
    logs = [log(40 / 100), log(41 / 101)]
    assert numbers.loc["msam", "log_over_base"] == pytest.approx(mean(logs), rel=1e-5)
    # The 97.5 % quantile of t with one degree of freedom, times half the difference of the two.
    assert numbers.loc["msam", "log_over_base_half_width"] == pytest.approx(
        12.706205 * abs(logs[0] - logs[1]) / 2, rel=1e-4
    )
    assert numbers.loc["msam", "log_over_sam"] == pytest.approx(mean([log(40 / 60), log(41 / 61)]), rel=1e-5)
    assert numbers.loc["msam", "log_over_control_n"] == 2
    assert numbers.loc["sam", "test_lambda_1"] == 121
    assert numbers.loc["sam", "train_sharpness_m4"] == pytest.approx(0.2)
    assert numbers.loc["sam", "residual"] == pytest.approx(1e-4)


@pytest.mark.parametrize(("shift", "retrained"), [(0.0, False), (0.01, True)])
def test_networks_retrained_for_the_measurement_are_reported(shift, retrained):
    trained = {cell.network: study_run(cell.network) for cell in RESNET}
    measured = [curvature_run(cell) for cell in RESNET]
    for run in measured:
        run.summary["test_accuracy"] = trained[run.spec.network].summary["test_accuracy"] + shift
    notes = " ".join(document("hessian", Results.of([*trained.values(), *measured]).runs, RESNET, 1).notes)
    assert ("retrained" in notes) == ("4 of 4 networks were retrained" in notes) == retrained


def test_accuracy_with_reestimated_batchnorm_is_compared_where_there_is_batchnorm():
    cells = catalogue.cells("hessian", "smoke")
    runs = [curvature_run(cell) for cell in with_seeds(cells, 2)]
    for run in runs:
        if run.spec.model == "resnet8":
            gain = {"sam": 0.01, "msam": 0.03}.get(run.spec.method, 0.0)
            run.summary["test_reestimated_accuracy"] = 0.5 + gain + run.spec.seed / 100
    shown = document("hessian", Results.of(runs).runs, cells, 2)
    rows = shown.numbers.set_index(["model", "method"])
    assert rows.loc[("resnet8", "msam"), "reestimated"] == pytest.approx(53.5)
    assert rows.loc[("resnet8", "msam"), "reestimated_over_sam"] == pytest.approx(2.0)
    assert np.isnan(rows.loc[("vit-micro", "msam"), "reestimated"])
    (sentence,) = [claim for claim in shown.claims if "re-estimated" in claim]
    assert sentence.startswith("resnet8, cifar10, test accuracy with re-estimated BatchNorm: ")
    assert "mSAM, m=4 over SAM: +2.00 ± 0.00 (n=2)" in sentence
    assert "SGD, m=4 micro-batches over SGD: +0.00 ± 0.00 (n=2): equivalent" in sentence
    assert any(note.startswith("Re-estimated: ") for note in shown.notes)
    without = document("hessian", all_results().runs, cells, 2)
    assert not any("e-estimated" in text for text in (*without.claims, *without.notes))


def test_a_ratio_is_printed_with_the_ends_of_its_interval():
    assert as_ratio(Interval(log(0.62), log(0.70 / 0.62), 8)) == "x0.62 (0.55 to 0.70)"
    assert as_ratio(Interval(log(0.62), float("nan"), 1)) == "x0.62"
    assert as_ratio(Interval(log(30), log(300), 2)) == "x30 (0.10 to 9e+03)"
    shown = document("table3", results_of(RESNET, 2, curvature_run).runs, RESNET, 2).cells.set_index("method")
    assert shown.loc["mSAM, m=4", "ratio to SAM"] == "x0.67 (0.64 to 0.71)"
    assert shown.loc["SGD", "ratio to base"] == shown.loc["SAM", "ratio to SAM"] == ""


def test_a_flatter_minimum_has_the_expected_sign():
    frame = results_of(RESNET, 2, curvature_run).runs
    line, _ranks = document("table3", frame, RESNET, 2).claims
    assert "mSAM, m=4 over SAM: x0.67 (0.64 to 0.71), n=2, significantly flatter;" in line
    sharper = [curvature_run(spec, shift=100 if spec.method == "msam" else 0) for spec in with_seeds(RESNET, 2)]
    line, _ranks = document("table3", Results.of(sharper).runs, RESNET, 2).claims
    assert "mSAM, m=4 over SAM: x2.32 (2.19 to 2.47), n=2, significantly sharper" in line


def test_different_training_losses_are_shown_beside_flatness_and_named():
    def run(spec, further):
        made = curvature_run(spec)
        made.summary["train_loss"] = 0.1 + 0.01 * spec.seed + (further if spec.method == "msam" else 0)
        return made

    far, near = (document("table3", results_of(RESNET, 2, run, by).runs, RESNET, 2) for by in (0.4, 0.0))
    row = far.cells.set_index("method").loc["mSAM, m=4"]
    assert row[["training loss", "loss over base", "loss over SAM"]].tolist() == [
        "0.505 ± 0.064",
        "+0.400 ± 0.000 (2)",
        "+0.400 ± 0.000 (2)",
    ]
    (line,) = [claim for claim in set(far.claims) - set(near.claims) if "rank correlation" not in claim]
    assert line == (
        "resnet8, cifar10: the training losses differ, so a network may be flatter because it is farther from its "
        "minimum: mSAM, m=4 over SGD +0.400 ± 0.000 (2); mSAM, m=4 over SAM +0.400 ± 0.000 (2); "
        "mSAM, m=4 over SGD, m=4 micro-batches +0.400 ± 0.000 (2)."
    )


def test_flatness_is_ranked_against_accuracy_within_a_seed_by_each_measure():
    """By Spearman's formula for four arms: 1 - 6 (sum of squared rank differences) / (4 * 15)."""
    order = {"base": 1, "control": 2, "sam": 3, "msam": 4}

    def run(spec):
        made = curvature_run(spec)
        rank = order[spec.method]
        swapped = {3: 4, 4: 3}.get(rank, rank) if spec.seed else rank
        measures = {"train_lambda_1": 5 - rank, "test_lambda_1": swapped, "train_loss": rank}
        made.summary.update(measures, train_average_sharpness=0, test_accuracy=rank / 10 + spec.seed / 100)
        return made

    shown = document("table3", results_of(RESNET, 2, run).runs, RESNET, 2)
    (line,) = [claim for claim in shown.claims if "rank correlation" in claim]
    assert line.startswith("resnet8, cifar10: rank correlation of test accuracy with flatness within a seed")
    assert "n=2): lambda 1 -1.00 ± 0.00; lambda 1 on test data +0.90 ± 1.27;" in line  # 1 and 1 - 6 * 2 / 60
    assert line.endswith("; and, which is no flatness, the training loss +1.00 ± 0.00.")
    assert "average sharpness" not in line


def claim_on_sam(run):
    """The comparisons of mSAM with SAM."""
    claim = next(claim for claim in table3.EXHIBIT.claims if claim.text == "mSAM ends in flatter minima than SAM")
    runs = results_of(RESNET, 2, run).runs.set_index("run_id")
    return claim.evidence(Target("table3", tuple(RESNET), 2), runs, {})


def test_a_claim_is_tested_by_every_measure_on_a_log_scale_where_all_values_are_positive():
    found = {c.what: c for c in claim_on_sam(curvature_run)}
    begin = "mSAM, m=4 over SAM, "
    ratios = ["lambda 1", "lambda 1 on test data", "trace", "sharpness by ascent"]
    ratios += ["sharpness of m=4 micro-batches"]
    assert set(found) == {
        *(f"{begin}{words}, log of the ratio" for words in ratios),
        f"{begin}average sharpness, difference",
    }
    for words in ratios[:4]:
        one = found[f"{begin}{words}, log of the ratio"]
        assert one.difference.mean == pytest.approx(mean([log(40 / 60), log(41 / 61)]))
        assert one.family == "flatness"
    assert found[f"{begin}average sharpness, difference"].difference.mean == 0


def test_a_measure_with_a_value_of_zero_or_below_is_compared_by_its_differences():
    def run(spec):
        made = curvature_run(spec)
        made.summary["train_trace"] = {"msam": -1.0, "sam": 2.0}.get(spec.method, 1.0) + spec.seed
        return made

    traces = [c for c in claim_on_sam(run) if "trace" in c.what]
    assert [(c.what, c.difference.mean) for c in traces] == [("mSAM, m=4 over SAM, trace, difference", -3.0)]
    others = [c for c in claim_on_sam(run) if "lambda 1" in c.what]
    assert all(c.what.endswith("log of the ratio") for c in others)


def test_msam_is_compared_with_sam_over_the_same_micro_batches():
    msam = next(c for c in RESNET if c.method == "msam")
    cells = [*RESNET, replace(msam, shared=True, passes="loop")]
    results = results_of(cells, 2, curvature_run)
    shown = document("table3", results.runs, cells, 2)
    row = shown.cells.set_index("method").loc["mSAM, m=4"]
    assert row["ratio to shared"] == as_ratio(mean_interval([log(40 / 50), log(41 / 51)]))
    claim = next(claim for claim in table3.EXHIBIT.claims if "share one perturbation" in claim.text)
    found = claim.evidence(Target("table3", tuple(cells), 2), results.runs.set_index("run_id"), {})
    assert {c.what.partition(" over ")[2].partition(", lambda")[0] for c in found if "lambda" in c.what} == {
        "SAM, m=4 micro-batches"
    }


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
