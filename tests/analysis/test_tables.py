"""Table 1 of the fixture runs, every cell against a value worked out by hand."""

import itertools
from dataclasses import replace

import pytest
from scipy import stats

from analysis import cells as shared
from analysis.collect import collect
from analysis.columns import csv_text, parse
from analysis.document import latex_text, markdown_text
from analysis.exhibits.table1 import document_1, table_1
from analysis.frames import frame
from analysis.statistics import Interval
from tests.fixtures import make_runs
from tests.fixtures.make_runs import BASE, CELLS, CONTROL, LINEAR, MSAM, NEVER_RUN, ROOT, SAM, SGD, write_run


@pytest.fixture(scope="module")
def found():
    return collect(ROOT)


@pytest.fixture(scope="module")
def document(found):
    return document_1("table1", frame(found.finished), CELLS, 3, found.failures)


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


def test_golden_cells(document):
    assert document.cells.drop(columns=["dataset", "model"]).to_numpy().tolist() == GOLDEN
    assert list(document.cells["model"]) == ["resnet8"] * 4 + ["linear model (floor)", "wrn-10-1"]
    assert list(document.cells.columns) == [
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


def test_numbers_are_scipys(document):
    row = document.numbers.iloc[3]
    own = stats.ttest_1samp([65, 68, 66], 0)
    assert row["mean"] + row["half_width"] == pytest.approx(own.confidence_interval().high, abs=1e-5)
    paired = stats.ttest_rel([65, 68, 66], [60, 61, 62]).confidence_interval()
    assert row["over_base"] - row["over_base_half_width"] == pytest.approx(paired.low, abs=1e-5)
    assert row["over_base"] + row["over_base_half_width"] == pytest.approx(paired.high, abs=1e-5)
    assert row["wall_seconds"] == 30.0
    assert row["run_ids"].split() == [replace(MSAM, seed=seed).run_id for seed in range(3)]


def test_claims_and_footnotes(document):
    assert document.claims == (
        # 0, 1 and -1 over SGD: sd 1, half-width 4.3027 / sqrt(3).
        "resnet8, cifar10: SGD, m=4 micro-batches over SGD: +0.00 ± 2.48 (n=3): not separated; "
        "SAM over SGD: +2.50 ± 6.35 (n=2): not separated; "
        "mSAM, m=4 over SAM: +3.50 ± 6.35 (n=2): not separated; "
        # 5, 6 and 5 over the control: sd 0.5774, half-width 4.3027 * 0.5774 / sqrt(3).
        "over the control: +5.33 ± 1.43 (n=3): separated.",
    )
    assert document.notes[:2] == (
        "[1] 1 of 3 runs missing (seed 2 failed: Diverged: the loss of step 3 is not finite).",
        "[2] 2 of 3 runs missing (seed 1; seed 2).",
    )
    assert not any(note.startswith("Warning") for note in document.notes)


def test_origin_names_profile_machine_and_commit(document):
    assert document.origin == "Profile smoke, 3 seeds a cell; Invented CPU; commit 0123456789ab."


def test_markdown_holds_every_part(document):
    text = document.markdown()
    assert text.startswith("### Table 1: test accuracy\n\nProfile smoke")
    assert "| 66.33 ± 3.79 (3) " in text
    assert "- resnet8, cifar10: SGD, m=4 micro-batches over SGD" in text
    assert "\\[1\\] 1 of 3 runs missing" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {10}
    assert len(rows) == 2 + len(CELLS)


def test_latex_is_a_booktabs_tabular(document):
    text = document.latex()
    rows = text[text.index("\\midrule\n") + 9 : text.index("\\bottomrule")].splitlines()
    assert len(rows) == len(CELLS)
    assert {row.count("&") for row in rows} == {8}
    assert "66.33 $\\pm$ 3.79 (3)" in text
    assert "test accuracy \\%" in text
    assert "±" not in text


def test_csv_form_round_trips(document):
    assert csv_text(parse(csv_text(document.numbers))) == csv_text(document.numbers)


def test_terminal_is_one_narrow_table_a_block_with_the_committed_cells_beside(document):
    committed = document.numbers.assign(mean=50.0)
    text = document.terminal(committed)
    assert text.count("committed") == 3
    assert "50.00 ± 3.79 (3)" in text
    lines = [line for line in text.splitlines() if "SGD" in line and "±" in line and "over SGD" not in line]
    assert max(map(len, lines)) <= 140
    assert "committed" not in document.terminal()


def test_committed_cell_of_another_setting_is_not_shown(document):
    text = document.terminal(document.numbers.assign(rho=0.7, mean=50.0))
    assert "50.00" not in text


def test_nothing_run_yet():
    document = document_1("table1", frame([]), CELLS, 2)
    assert set(document.cells["test accuracy %"]) == {"not run"}
    assert document.origin.endswith("nothing has run yet.")
    assert document.claims == (
        "resnet8, cifar10: SGD, m=4 micro-batches over SGD: not run; SAM over SGD: not run; "
        "mSAM, m=4 over SAM: not run; over the control: not run.",
    )
    assert "not run" in document.markdown()


def test_only_the_expected_seeds_count(found):
    numbers = table_1(frame(found.finished), CELLS, 2)
    assert numbers["n"].tolist() == [2, 2, 2, 2, 1, 0]
    assert numbers["mean"].iloc[0] == 60.5


def test_run_without_its_score_is_missing(tmp_path):
    write_run(tmp_path, SGD, 0.6)
    write_run(tmp_path, replace(SGD, seed=1), 0.7).finish({"test_accuracy": "lost", "wall_seconds": 0.0})
    numbers = table_1(frame(collect(tmp_path).finished), [SGD], 2)
    assert (numbers["n"][0], numbers["mean"][0], numbers["missing_seeds"][0]) == (1, 60.0, "1")


def test_blocks_keep_to_themselves(tmp_path):
    other = [replace(cell, dataset="cifar100") for cell in (SGD, SAM)]
    accuracies = zip([SGD, SAM, *other], (0.6, 0.7, 0.2, 0.25), strict=True)
    for (cell, accuracy), seed in itertools.product(accuracies, range(2)):
        write_run(tmp_path, replace(cell, seed=seed), accuracy + seed / 100)
    numbers = table_1(frame(collect(tmp_path).finished), [SGD, other[0], SAM, other[1]], 2)
    assert numbers["dataset"].tolist() == ["cifar10", "cifar10", "cifar100", "cifar100"]
    assert numbers["over_base"].dropna().tolist() == pytest.approx([10.0, 5.0])


def test_first_sam_cell_is_the_reference():
    more = replace(SAM, rho=0.4)
    numbers = table_1(frame(collect(ROOT).finished), [SGD, SAM, more, MSAM], 2)
    assert numbers["over_sam_n"].tolist() == [0, 0, 0, 2]
    numbers = table_1(frame(collect(ROOT).finished), [SGD, more, SAM, MSAM], 2)
    assert numbers["over_sam_n"].tolist() == [0, 0, 0, 0]


def test_cells_that_would_read_alike_are_told_apart():
    longer = replace(SGD, epochs=4)
    numbers = table_1(frame([]), [SGD, CONTROL, longer], 1)
    assert numbers["label"].tolist() == ["SGD (epochs 2)", "SGD, m=4 micro-batches", "SGD (epochs 4)"]


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Interval(1.1, 0.6, 8), "+1.10 ± 0.60 (n=8): separated"),
        (Interval(-1.1, 0.6, 8), "-1.10 ± 0.60 (n=8): separated, the other way round"),
        (Interval(-0.1, 0.6, 8), "-0.10 ± 0.60 (n=8): not separated"),
        (Interval(0.5, float("nan"), 1), "+0.50 (n=1): one seed, no interval"),
        (Interval(float("nan"), float("nan"), 0), "not run"),
    ],
)
def test_verdict(difference, words):
    assert shared.verdict(difference) == words


def test_mixed_commits_dirt_data_and_machines_are_warned_of(tmp_path):
    write_run(tmp_path, SGD, 0.6)
    write_run(
        tmp_path,
        SAM,
        0.6,
        commit="fedcba9",
        dirty=True,
        data_checksum="other",
        torch_flags={"cpu_capability": "AVX512"},
    )
    table = frame(collect(tmp_path).finished)
    warnings = shared.warnings(table, table_1(table, CELLS, 1))
    assert warnings == [
        "Warning: these runs come from several commits: 0123456789ab (1 runs), fedcba9 (1 runs).",
        "Warning: 1 runs come from a tree with uncommitted changes, or outside git.",
        "Warning: the runs of resnet8 on cifar10 read data with different checksums.",
        "Times come from several machines (Invented CPU; Invented CPU (AVX512)): they do not compare.",
    ]
    alone = table_1(table, [SGD], 1)
    assert shared.warnings(table, alone) == []


HOSTILE = r"| *a* _b_ `c` <script>&amp; [x](y) \input{z} $1 ~ # ^ % {q}"


def test_hostile_text_of_a_record_is_escaped(tmp_path):
    make_runs.record_of(SGD, tmp_path).create(SGD)
    make_runs.record_of(SGD, tmp_path).fail(HOSTILE + "\n\n# heading")
    write_run(tmp_path, SAM, 0.5, cpu=HOSTILE, commit="a|b")
    found = collect(tmp_path)
    document = document_1("table1", frame(found.finished), CELLS, 1, found.failures)
    markdown, latex = document.markdown(), document.latex()
    escaped = r"\| \*a\* \_b\_ \`c\` \<script\>&amp;amp; \[x\](y) \\input\{z\} \$1 \~ # ^ % \{q\}"
    assert markdown.count(escaped) == 2
    assert "\n# heading" not in markdown
    assert "commit a\\|b" in markdown
    assert r"\textbackslash{}input\{z\} \$1 \textasciitilde{} \# \textasciicircum{} \% \{q\}" in latex
    assert r"\input" not in latex


def test_escapes_leave_plain_text_alone():
    text = "mSAM, m=4: +1.10 (n=3)"
    assert markdown_text(text) == latex_text(text) == text


def test_linear_and_unrun_cells_make_no_claims():
    assert shared.claims(table_1(frame(collect(ROOT).finished), [LINEAR, NEVER_RUN], 1)) == []


def test_pairing_is_by_seed_not_by_position(tmp_path):
    for seed, accuracy in ((0, 0.2), (1, 0.4), (2, 0.6)):
        write_run(tmp_path, replace(BASE, seed=seed), accuracy)
        if seed:
            write_run(tmp_path, replace(SAM, seed=seed), accuracy + 0.1)
    numbers = table_1(frame(collect(tmp_path).finished), [SGD, SAM], 3)
    row = numbers.iloc[1]
    assert (row["over_base"], row["over_base_half_width"], row["over_base_n"]) == (10.0, 0.0, 2)


def test_rounding_noise_is_no_loss(tmp_path):
    write_run(tmp_path, SGD, 0.1 + 0.2)  # a hair above 0.3
    write_run(tmp_path, SAM, 0.3)
    document = document_1("table1", frame(collect(tmp_path).finished), [SGD, SAM], 1)
    assert document.cells["over base"].tolist() == ["", "+0.00 (1)"]


def test_run_of_no_time_has_no_ratio(tmp_path):
    write_run(tmp_path, SGD, 0.5, seconds=0.0)
    document = document_1("table1", frame(collect(tmp_path).finished), [SGD], 1)
    assert document.cells["time"].tolist() == ["0.0 s"]
