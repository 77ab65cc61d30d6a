"""Table 1 of the fixture runs: every cell against a value computed by hand."""

import itertools
from dataclasses import replace

import pytest
from scipy import stats

from analysis.cells import block_sentences
from analysis.collect import collect
from analysis.columns import csv_text, parse
from analysis.exhibits import table1
from analysis.frames import frame
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
    ["SGD", "", "61.00 ± 2.48 (3)", "", "", "71.00", "12 s (x1.00)"],
    ["SGD, m=4 micro-batches", "", "61.00 ± 2.48 (3)", "+0.00 ± 2.48 (3)", "", "71.00", "15 s (x1.25)"],
    # 62 and 64, and +2 and +3 over SGD; the seconds are 23 and 24.
    ["SAM", "0.1", "63.00 ± 12.71 (2) [1]", "+2.50 ± 6.35 (2)", "", "73.00", "24 s (x1.96)"],
    # 65, 68, 66: mean 66 1/3, sd sqrt(7/3) = 1.5275; +5, +7, +4 over SGD has the same sd; +3, +4 over SAM.
    ["mSAM, m=4", "0.2", "66.33 ± 3.79 (3)", "+5.33 ± 3.79 (3)", "+3.50 ± 6.35 (2)", "76.33", "30 s (x2.50)"],
    ["AdamW", "", "31.00 (1) [2]", "", "", "41.00", "0.5 s (x1.00)"],
    ["SGD", "", "not run", "", "", "", ""],
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
        "train accuracy %",
        "time",
    ]


def test_numbers_equal_scipys(shown):
    row = shown.numbers.iloc[3]
    own = stats.ttest_1samp([65, 68, 66], 0)
    assert row["mean"] + row["half_width"] == pytest.approx(own.confidence_interval().high, abs=1e-5)
    paired = stats.ttest_rel([65, 68, 66], [60, 61, 62]).confidence_interval()
    assert row["over_base"] - row["over_base_half_width"] == pytest.approx(paired.low, abs=1e-5)
    assert row["over_base"] + row["over_base_half_width"] == pytest.approx(paired.high, abs=1e-5)
    assert row["wall_seconds"] == 30.0
    assert row["run_ids"].split() == [replace(MSAM, seed=seed).run_id for seed in range(3)]


def test_claims_and_footnotes(shown):
    assert shown.claims[0].startswith(
        # 0, 1 and -1 over SGD: sd 1, half-width 4.3027 / sqrt(3).
        "resnet8, cifar10: SGD, m=4 micro-batches over SGD: +0.00 ± 2.48 (n=3): inconclusive; "
        "SAM over SGD: +2.50 ± 6.35 (n=2): inconclusive; "
        "mSAM, m=4 over SAM: +3.50 ± 6.35 (n=2): inconclusive; "
        # 5, 6 and 5 over the control: sd 0.5774, half-width 4.3027 * 0.5774 / sqrt(3).
        "over the control: +5.33 ± 1.43 (n=3): significant (unadjusted)"
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
    assert {row.count("|") for row in rows} == {10}
    assert len(rows) == 2 + len(CELLS)


def test_latex_is_a_booktabs_tabular(shown):
    text = shown.latex()
    rows = text[text.index("\\midrule\n") + 9 : text.index("\\bottomrule")].splitlines()
    assert len(rows) == len(CELLS)
    assert {row.count("&") for row in rows} == {8}
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
        "mSAM, m=4 over SAM: not run; over the control: not run.",
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
    assert block_sentences(table1.EXHIBIT.numbers(frame(collect(ROOT).finished), [LINEAR, NEVER_RUN], 1)) == []


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


def test_run_of_zero_seconds_has_no_ratio(tmp_path):
    write_run(tmp_path, SGD, 0.5, seconds=0.0)
    shown = document("table1", frame(collect(tmp_path).finished), [SGD], 1)
    assert shown.cells["time"].tolist() == ["0.0 s"]
