"""Cells: differences in words, and warnings on rows that cannot be compared."""

import pytest

from analysis import cells
from analysis.collect import collect
from analysis.exhibits import table1
from analysis.frames import frame
from analysis.statistics import Interval
from experiments.harness.runs.grids import with_seeds
from tests.analysis.invented import study_run
from tests.fixtures.make_runs import CELLS, SAM, SGD, write_run


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Interval(1.1, 0.6, 8), "+1.10 ± 0.60 (n=8): significant (unadjusted)"),
        (Interval(-1.1, 0.6, 8), "-1.10 ± 0.60 (n=8): significant (unadjusted), and worse"),
        (Interval(-0.1, 0.6, 8), "-0.10 ± 0.60 (n=8): equivalent"),
        (Interval(-0.6, 0.7, 8), "-0.60 ± 0.70 (n=8): inconclusive"),
        (Interval(0.5, float("nan"), 1), "+0.50 (n=1): one seed, no interval"),
        (Interval(float("nan"), float("nan"), 0), "not run"),
    ],
)
def test_difference_in_words(difference, words):
    assert cells.difference_in_words(difference, margin=1.0) == words


def test_without_a_margin_nothing_is_equivalent():
    assert cells.difference_in_words(Interval(-0.1, 0.6, 8)).endswith(": inconclusive")


def numbers_of(accuracies):
    """Two rows of a table, plain training and SAM, with these accuracies by seed."""
    runs = [study_run(cell) for cell in with_seeds([SGD, SAM], len(accuracies["base"]))]
    for run in runs:
        run.summary["test_accuracy"] = accuracies[run.spec.method][run.spec.seed] / 100
    return table1.EXHIBIT.numbers(frame(runs), [SGD, SAM], len(accuracies["base"]))


def test_each_block_says_what_its_seeds_detect():
    """By hand: a standard deviation of 1 and four seeds, whose smallest detectable effect is 2.128 deviations."""
    table = numbers_of(
        {"base": [50.0] * 4, "sam": [50 - 3**0.5 / 2, 50 - 3**0.5 / 2, 50 + 3**0.5 / 2, 50 + 3**0.5 / 2]}
    )
    (line,) = cells.block_sentences(table, margin=1.0)
    assert line.endswith("The smallest difference that 4 seeds detect with 80 % power: 2.13 to 2.13.")
    (alone,) = cells.block_sentences(numbers_of({"base": [50.0], "sam": [51.0]}))
    assert "detect" not in alone


def test_the_differences_of_a_study_are_counted_as_one_family():
    (line,) = cells.family_sentence(numbers_of({"base": [50.0, 50.0], "sam": [51.0, 51.001]}))
    assert line.startswith("All differences above as one family (1): 1 significant unadjusted, 1 after Holm's")
    assert cells.family_sentence(numbers_of({"base": [50.0], "sam": [51.0]})) == []


def test_several_versions_of_the_training_code_are_a_warning(tmp_path):
    write_run(tmp_path, SGD, 0.6)
    write_run(tmp_path, SAM, 0.6, commit="fedcba9", code="0ther")
    table = frame(collect(tmp_path).finished)
    (warning,) = cells.warnings(table, table1.EXHIBIT.numbers(table, CELLS, 1))
    assert warning == "Warning: these runs come from several commits: 0123456789ab (1 runs), fedcba9 (1 runs)."


def test_mixed_commits_dirty_trees_data_and_machines_give_warnings(tmp_path):
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
    warnings = cells.warnings(table, table1.EXHIBIT.numbers(table, CELLS, 1))
    assert warnings == [
        "These runs have the same training code, at several commits: 0123456789ab (1 runs), fedcba9 (1 runs).",
        "Warning: 1 runs come from a tree with uncommitted changes, or outside git.",
        "Warning: the runs of resnet8 on cifar10 read data with different checksums.",
        "These runs come from several machines (Invented CPU; Invented CPU (AVX512)): times cannot be compared, and "
        "the same spec gives slightly different networks on each.",
    ]
    alone = table1.EXHIBIT.numbers(table, [SGD], 1)
    assert cells.warnings(table, alone) == []
