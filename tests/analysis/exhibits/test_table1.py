"""Table 1 of the fixture runs: every cell against a value computed by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis.collect import collect
from analysis.columns import csv_text, parse
from analysis.exhibit import Target
from analysis.exhibits import table1
from analysis.frames import Results, frame
from analysis.two_way import two_way_interval
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import perturbed
from tests.analysis.invented import document
from tests.fixtures.make_runs import BASE, CELLS, CONTROL, LINEAR, MSAM, NEVER_RUN, ROOT, SAM, SGD, write_run


@pytest.fixture(scope="module")
def collected():
    return collect(ROOT)


@pytest.fixture(scope="module")
def shown(collected):
    return document("table1", frame(collected.finished), CELLS, 3, collected.states)


# t(0.975) is 4.3027 at two degrees of freedom and 12.7062 at one. For three values a, a+1, a+2 the
# half-width is 4.3027 / sqrt(3) = 2.48; for two values that differ by d it is 12.7062 * d / 2.
GOLDEN = [
    ["SGD", "", "61.00 ± 2.48 (3)", "", "", "71.00", "1.33 ± 2.48", ""],
    ["SGD, m=4 micro-batches", "", "61.00 ± 2.48 (3)", "+0.00 ± 2.48 (3)", "", "71.00", "1.33 ± 2.48", ""],
    # 62 and 64, and +2 and +3 over SGD.
    ["SAM", "0.1", "63.00 ± 12.71 (2) [1]", "+2.50 ± 6.35 (2)", "", "73.00", "0.83 ± 6.35", ""],
    # 65, 68, 66: mean 66 1/3, sd sqrt(7/3) = 1.5275; +5, +7, +4 over SGD has the same sd; +3, +4 over SAM.
    ["mSAM, m=4", "0.2", "66.33 ± 3.79 (3)", "+5.33 ± 3.79 (3)", "+3.50 ± 6.35 (2)", "76.33", "1.33 ± 2.48", ""],
    ["AdamW", "", "31.00 (1) [2]", "", "", "41.00", "0.333", ""],
    ["SGD", "", "not run", "", "", "", "", ""],
]


def test_golden_cells(shown):
    assert shown.cells.drop(columns=["dataset", "model"]).to_numpy().tolist() == GOLDEN
    assert list(shown.cells["model"]) == ["resnet8"] * 4 + ["linear model (floor)", "wrn-10-1"]
    assert list(shown.cells.columns) == [
        "dataset",
        "model",
        "method",
        "rho",
        "test accuracy %",
        "over base",
        "over SAM",
        "train %",
        "NLL",
        "ECE %",
    ]


def test_numbers_equal_scipys(shown):
    row = shown.numbers.iloc[3]
    own = stats.ttest_1samp([65, 68, 66], 0)
    assert row["mean"] + row["half_width"] == pytest.approx(own.confidence_interval().high, abs=1e-5)
    paired = stats.ttest_rel([65, 68, 66], [60, 61, 62]).confidence_interval()
    assert row["over_base"] - row["over_base_half_width"] == pytest.approx(paired.low, abs=1e-5)
    assert row["over_base"] + row["over_base_half_width"] == pytest.approx(paired.high, abs=1e-5)
    assert row["run_ids"].split() == [replace(MSAM, seed=seed).run_id for seed in range(3)]


def test_claims_and_footnotes(shown):
    assert shown.claims[0].startswith(
        # 0, 1 and -1 over SGD: sd 1, half-width 4.3027 / sqrt(3).
        "resnet8, cifar10: SGD, m=4 micro-batches over SGD: +0.00 ± 2.48 (n=3): inconclusive; "
        "SAM over SGD: +2.50 ± 6.35 (n=2): inconclusive; "
        "mSAM, m=4 over SAM: +3.50 ± 6.35 (n=2): inconclusive; "
        # 5, 6 and 5 over the control: sd 0.5774, half-width 4.3027 * 0.5774 / sqrt(3).
        "mSAM, m=4 over SGD, m=4 micro-batches: +5.33 ± 1.43 (n=3): significant (unadjusted)"
    )
    assert shown.notes[:2] == (
        "[1] 1 of 3 runs missing (seed 2 failed: Diverged: the loss of step 3 is not finite).",
        "[2] 2 of 3 runs missing (seed 1; seed 2).",
    )
    assert not any(note.startswith("Warning") for note in shown.notes)


def test_origin_names_profile_machine_and_commit(shown):
    assert shown.origin == "Profile smoke, 3 seeds per cell; Invented CPU; commit 0123456789ab."


def test_markdown_has_every_part(shown):
    text = shown.markdown()
    assert text.startswith("### Table 1: test accuracy\n\nProfile smoke")
    assert "| 66.33 ± 3.79 (3) " in text
    assert "- resnet8, cifar10: SGD, m=4 micro-batches over SGD" in text
    assert "\\[1\\] 1 of 3 runs missing" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {11}
    assert len(rows) == 2 + len(CELLS)


def test_latex_is_a_booktabs_tabular(shown):
    text = shown.latex()
    rows = text[text.index("\\midrule\n") + 9 : text.index("\\bottomrule")].splitlines()
    assert len(rows) == len(CELLS)
    assert {row.count("&") for row in rows} == {9}
    assert "66.33 $\\pm$ 3.79 (3)" in text
    assert "test accuracy \\%" in text
    assert "±" not in text


def test_csv_form_round_trips(shown):
    assert csv_text(parse(csv_text(shown.numbers))) == csv_text(shown.numbers)


def test_terminal_has_a_narrow_table_for_each_block_with_the_committed_cells(shown):
    committed = shown.numbers.assign(mean=50.0)
    text = shown.terminal(committed)
    assert text.count("committed") == 3
    assert "50.00 ± 3.79 (3)" in text
    lines = [line for line in text.splitlines() if "SGD" in line and "±" in line and "over SGD" not in line]
    assert max(map(len, lines)) <= 140
    assert "committed" not in shown.terminal()


def test_committed_cell_of_another_setting_is_not_shown(shown):
    text = shown.terminal(shown.numbers.assign(rho=0.7, mean=50.0))
    assert "50.00" not in text


def test_nothing_run_yet():
    shown = document("table1", frame([]), CELLS, 2)
    assert set(shown.cells["test accuracy %"]) == {"not run"}
    assert shown.origin.endswith("nothing has run yet.")
    assert shown.claims == (
        "resnet8, cifar10: SGD, m=4 micro-batches over SGD: not run; SAM over SGD: not run; "
        "mSAM, m=4 over SAM: not run; mSAM, m=4 over SGD, m=4 micro-batches: not run.",
    )
    assert "not run" in shown.markdown()


def test_only_the_expected_seeds_count(collected):
    numbers = table1.EXHIBIT.numbers(frame(collected.finished), CELLS, 2)
    assert numbers["n"].tolist() == [2, 2, 2, 2, 1, 0]
    assert numbers["mean"].iloc[0] == 60.5


def test_run_without_its_score_is_missing(tmp_path):
    write_run(tmp_path, SGD, 0.6)
    write_run(tmp_path, replace(SGD, seed=1), 0.7).finish({"test_accuracy": "lost", "wall_seconds": 0.0})
    numbers = table1.EXHIBIT.numbers(frame(collect(tmp_path).finished), [SGD], 2)
    assert (numbers["n"][0], numbers["mean"][0], numbers["missing_seeds"][0]) == (1, 60.0, "1")


def test_cells_are_compared_only_within_their_block(tmp_path):
    other = [replace(cell, dataset="cifar100") for cell in (SGD, SAM)]
    accuracies = zip([SGD, SAM, *other], (0.6, 0.7, 0.2, 0.25), strict=True)
    for (cell, accuracy), seed in itertools.product(accuracies, range(2)):
        write_run(tmp_path, replace(cell, seed=seed), accuracy + seed / 100)
    numbers = table1.EXHIBIT.numbers(frame(collect(tmp_path).finished), [SGD, other[0], SAM, other[1]], 2)
    assert numbers["dataset"].tolist() == ["cifar10", "cifar10", "cifar100", "cifar100"]
    assert numbers["over_base"].dropna().tolist() == pytest.approx([10.0, 5.0])


def test_without_an_equal_rho_the_first_sam_cell_is_the_reference():
    more = replace(SAM, rho=0.4)
    numbers = table1.EXHIBIT.numbers(frame(collect(ROOT).finished), [SGD, SAM, more, MSAM], 2)
    assert numbers["over_sam_n"].tolist() == [0, 0, 0, 2]
    numbers = table1.EXHIBIT.numbers(frame(collect(ROOT).finished), [SGD, more, SAM, MSAM], 2)
    assert numbers["over_sam_n"].tolist() == [0, 0, 0, 0]


def test_labels_of_equal_cells_show_their_differing_fields():
    longer = replace(SGD, epochs=6)
    numbers = table1.EXHIBIT.numbers(frame([]), [SGD, CONTROL, longer], 1)
    assert numbers["label"].tolist() == ["SGD (epochs 2)", "SGD, m=4 micro-batches", "SGD (epochs 6)"]


def test_linear_and_unrun_cells_make_no_claims():
    assert document("table1", frame(collect(ROOT).finished), [LINEAR, NEVER_RUN], 1).claims == ()


def test_pairing_is_by_seed_not_by_position(tmp_path):
    for seed, accuracy in ((0, 0.2), (1, 0.4), (2, 0.6)):
        write_run(tmp_path, replace(BASE, seed=seed), accuracy)
        if seed:
            write_run(tmp_path, replace(SAM, seed=seed), accuracy + 0.1)
    numbers = table1.EXHIBIT.numbers(frame(collect(tmp_path).finished), [SGD, SAM], 3)
    row = numbers.iloc[1]
    assert (row["over_base"], row["over_base_half_width"], row["over_base_n"]) == (10.0, 0.0, 2)


def test_rounding_noise_is_shown_as_plus_zero(tmp_path):
    write_run(tmp_path, SGD, 0.1 + 0.2)  # a hair above 0.3
    write_run(tmp_path, SAM, 0.3)
    shown = document("table1", frame(collect(tmp_path).finished), [SGD, SAM], 1)
    assert shown.cells["over base"].tolist() == ["", "+0.00 (1)"]


def with_loss(root, cell, losses, errors=()):
    for seed, loss in enumerate(losses):
        more = {"test_ece": errors[seed]} if errors else {}
        write_run(root, replace(cell, seed=seed), 0.5).finish({"test_accuracy": 0.5, "test_loss": loss, **more})


def test_nll_and_calibration_error_have_paired_differences(tmp_path):
    with_loss(tmp_path, SGD, (2.0, 2.5, 2.1), (0.30, 0.31, 0.35))
    with_loss(tmp_path, SAM, (1.8, 1.9, 2.0), (0.25, 0.20, 0.27))
    shown = document("table1", frame(collect(tmp_path).finished), [SGD, SAM], 3)
    row = shown.numbers.iloc[1]
    for name, a, b in (
        ("nll", (1.8, 1.9, 2.0), (2.0, 2.5, 2.1)),
        ("ece", (25.0, 20.0, 27.0), (30.0, 31.0, 35.0)),
    ):
        expected = stats.ttest_rel(a, b).confidence_interval()
        assert row[f"{name}_over_base"] - row[f"{name}_over_base_half_width"] == pytest.approx(expected.low, abs=1e-5)
        assert row[f"{name}_over_base"] + row[f"{name}_over_base_half_width"] == pytest.approx(expected.high, abs=1e-5)
        assert row[f"{name}_over_base_n"] == 3
    assert shown.cells["ECE %"].tolist() == ["32.00 ± 6.57", "24.00 ± 8.96"]
    sentences = [line for line in shown.claims if "test NLL" in line or "calibration" in line]
    assert len(sentences) == 2
    assert "SAM over SGD: -8.00 ± 7.45 (n=3): significant" in sentences[1]
    assert "worse" not in sentences[1]  # lower is better


def test_the_scale_of_each_block_is_said(shown):
    (line,) = [note for note in shown.notes if note.startswith("resnet8, cifar10: 64 training images")]
    assert line == (
        "resnet8, cifar10: 64 training images, 2 epochs (4 steps), mini-batches of 32, no augmentation, "
        "77,850 parameters, scored on 64 test images."
    )
    assert not any(note.startswith("wrn-10-1") for note in shown.notes)  # which has not run


GRID = [
    *(replace(SAM, rho=rho, holdout_examples=50, seed=100) for rho in (0.05, 0.1, 0.2)),
    *(replace(MSAM, rho=rho, holdout_examples=50, seed=100) for rho in (0.05, 0.1, 0.2)),
]


def chances(monkeypatch, root, grid):
    only = catalogue.Experiment(
        name="one", table="table1", summary="", runs={"smoke": [SGD, SAM, MSAM]}, tuning={"smoke": grid}
    )
    monkeypatch.setattr(catalogue, "catalogue", lambda: {"one": only})
    for cell in (SGD, SAM, MSAM):
        write_run(root, cell, 0.5)
    shown = document("table1", frame(collect(root).finished), [SGD, SAM, MSAM], 1)
    (line,) = [note for note in shown.notes if "held-out examples" in note]
    return line


def test_the_values_that_each_arm_tried_are_said_with_the_held_out_scores_of_their_neighbours(tmp_path, monkeypatch):
    for place, cell in enumerate(GRID):
        for seed in range(2):
            # The larger rho gains more by the second seed.
            write_run(tmp_path, replace(cell, seed=100 + seed), 0.40 + place % 3 * 0.01 + seed * (0.002 * (place % 3)))
    line = chances(monkeypatch, tmp_path, GRID)
    assert line.startswith(
        "resnet8, cifar10: each perturbed arm tried 3 settings on held-out examples (SAM and mSAM, m=4 tried rho 0.05, "
        "0.1 and 0.2)."
    )
    # Paired by seed, the leads are 1 and 1.2, so the standard error is 0.1.
    assert "with the standard error of the paired difference: " in line
    assert "SAM, rho 0.1: +1.10 over 0.05 (0.10, 2 seeds) and -1.10 over 0.2 (0.10, 2 seeds)" in line
    assert "mSAM, m=4, rho 0.2: +1.10 over 0.1 (0.10, 2 seeds)." in line


def test_unequal_tries_are_said_and_a_grid_that_has_not_run(tmp_path, monkeypatch):
    line = chances(monkeypatch, tmp_path, GRID[:-1])
    assert "the perturbed arms tried unequally many settings" in line
    assert "mSAM, m=4 tried rho 0.05 and 0.1" in line
    assert "mSAM, m=4, rho 0.2: not in the grid" in line
    line = chances(monkeypatch, tmp_path, GRID)
    assert line.endswith("The runs of the grid are not among these results.")


LABELS = np.random.default_rng(0).integers(10, size=64).astype(np.uint8)


def predictions_of(root, cells, seeds):
    """Write random predictions of each run, and their accuracy."""
    random, kept = np.random.default_rng(1), {}
    for cell, seed in itertools.product(cells, range(seeds)):
        spec = replace(cell, seed=seed)
        classes = np.where(random.random(64) < 0.3 + 0.2 * bool(cell.rho), LABELS, (LABELS + 1) % 10).astype(np.uint8)
        record = write_run(root, spec, float(np.mean(classes == LABELS)))
        np.savez(record.folder / "predictions.npz", test=classes, test_labels=LABELS)
        kept.setdefault(cell, []).append(classes)
    return kept


def test_two_way_intervals_stand_where_every_run_of_a_difference_has_predictions(tmp_path):
    kept = predictions_of(tmp_path, [SGD, SAM, MSAM], 3)
    (tmp_path / "runs" / replace(SGD, seed=2).run_id / "predictions.npz").unlink()
    results = Results.of(collect(tmp_path).finished)
    target = Target("table1", (SGD, SAM, MSAM), 3)
    shown = table1.EXHIBIT.document(target, results.runs, predictions=results.predictions)
    row = shown.numbers.iloc[2]
    expected = two_way_interval(kept[MSAM], kept[SAM], LABELS)
    assert (row["over_sam_two_way_low"], row["over_sam_two_way_high"]) == pytest.approx(expected, abs=1e-6)
    assert np.isnan(row["over_base_two_way_low"])
    text = f"mSAM, m=4 over SAM: {expected[0]:+.2f} to {expected[1]:+.2f}"
    assert f"resnet8, cifar10, two-way intervals over seeds and test images: {text}." in shown.claims
    assert any("draw seeds and test images together" in note for note in shown.notes)


def test_over_shared_is_a_column_where_there_is_that_arm(tmp_path):
    shared = perturbed(SGD, "shared", 4, 0.2)
    for number, cell in enumerate((SGD, shared, MSAM)):
        for seed in range(2):
            write_run(tmp_path, replace(cell, seed=seed), 0.5 + number / 50 + seed * number / 100)
    shown = document("table1", frame(collect(tmp_path).finished), [SGD, shared, MSAM], 2)
    assert shown.cells["over shared"].tolist() == ["", "", "+2.50 ± 6.35 (2)"]
    assert any("paper's idea" in note for note in shown.notes)
