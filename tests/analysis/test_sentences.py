"""The comparisons printed under a table: differences in words, and what each is named after."""

from dataclasses import replace

import pytest

from analysis import sentences
from analysis.exhibit import Target, View
from analysis.exhibits import exhibit_of, table1
from analysis.frames import frame
from analysis.statistics import Interval
from experiments.harness.runs.grids import perturbed, with_seeds
from tests.analysis.invented import document, results_of, study_run
from tests.fixtures.make_runs import SAM, SGD


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
    assert sentences.difference_in_words(difference, margin=1.0) == words


def test_without_a_margin_nothing_is_equivalent():
    assert sentences.difference_in_words(Interval(-0.1, 0.6, 8)).endswith(": inconclusive")


def view_of(accuracies):
    """A table of two rows, plain training and SAM, with these accuracies by seed."""
    runs = [study_run(cell) for cell in with_seeds([SGD, SAM], len(accuracies["base"]))]
    for run in runs:
        run.summary["test_accuracy"] = accuracies[run.spec.method][run.spec.seed] / 100
    target, table = Target("table1", (SGD, SAM), len(accuracies["base"])), frame(runs)
    return View(target, table, table1.EXHIBIT.numbers(table, target.cells, target.seeds))


def test_each_block_says_what_its_seeds_detect():
    """By hand: a standard deviation of 1 and four seeds, whose smallest detectable effect is 2.128 deviations."""
    view = view_of({"base": [50.0] * 4, "sam": [50 - 3**0.5 / 2, 50 - 3**0.5 / 2, 50 + 3**0.5 / 2, 50 + 3**0.5 / 2]})
    (line,) = sentences.block_sentences(view, margin=1.0)
    assert line.endswith("The smallest difference that 4 seeds detect with 80 % power: 2.13 to 2.13.")
    (alone,) = sentences.block_sentences(view_of({"base": [50.0], "sam": [51.0]}))
    assert "detect" not in alone


def test_the_differences_of_a_study_are_counted_as_one_family():
    (line,) = sentences.family_sentence(view_of({"base": [50.0, 50.0], "sam": [51.0, 51.001]}))
    assert "as one family (1): 1 significant unadjusted, 1 after Holm's" in line
    assert sentences.family_sentence(view_of({"base": [50.0], "sam": [51.0]})) == []


def test_a_comparison_names_the_very_row_that_it_is_made_with():
    """With several m in a block, mSAM at m=4 is compared with the control and SAM on micro-batches of m=4."""
    cells = [SGD, SAM]
    for m in (2, 4):
        rho = 0.1 if m == 2 else 0.4
        cells += [replace(SGD, micro_batches=m), perturbed(SGD, "shared", m, rho), perturbed(SGD, "msam", m, 0.1)]
    results = results_of(cells, 2, study_run)
    target = Target("micro_batches", tuple(cells), 2)
    view = View(target, results.runs, exhibit_of("micro_batches").numbers(results.runs, target.cells, 2, ()))
    ((_, pairs),) = sentences.claimed_by_block(view)
    named = {(row.label, other): label for row, other, label in pairs}
    assert named["mSAM, m=4", "shared"] == "SAM, m=4 micro-batches"
    assert named["mSAM, m=2", "shared"] == "SAM, m=2 micro-batches"
    assert named["mSAM, m=4", "control"] == "SGD, m=4 micro-batches"
    assert named["mSAM, m=4", "sam"] == "SAM"
    means = {row.label: row.mean for row in view.rows}
    for row, other, label in pairs:
        assert getattr(row, f"over_{other}") == pytest.approx(row.mean - means[label])


@pytest.mark.parametrize(("rho", "words"), [(0.1, "idea."), (0.4, "idea, and in their rho (mSAM, m=4).")])
def test_a_comparison_at_different_rhos_says_so(rho, words):
    cells = [SGD, SAM, perturbed(SGD, "shared", 4, rho), perturbed(SGD, "msam", 4, 0.1)]
    notes = document("micro_batches", results_of(cells, 2, study_run).runs, cells, 2).notes
    (note,) = [note for note in notes if note.startswith("Over shared: ")]
    assert note.endswith("who shares a perturbation, which is the paper's " + words)
