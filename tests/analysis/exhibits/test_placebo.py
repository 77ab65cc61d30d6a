"""The placebo: the same cell at two sets of seeds, against Welch's formula."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis.collect import collect
from analysis.exhibits.placebo import EXHIBIT
from analysis.frames import frame
from analysis.publish import target
from experiments import placebo
from experiments.harness.runs import catalogue
from tests.analysis.invented import document
from tests.fixtures.make_runs import MSAM, write_run

LATE, EARLY = (50.0, 53.0, 51.0, 52.5), (49.0, 52.0, 51.5, 50.5)
CELL = replace(MSAM, seed=4)


def fill(root, late=LATE, early=EARLY):
    for first, accuracies in ((4, late), (0, early)):
        for number, accuracy in enumerate(accuracies):
            write_run(root, replace(MSAM, seed=first + number), accuracy / 100)
    return document("placebo", frame(collect(root).finished), [CELL], 4)


def test_the_difference_is_welchs(tmp_path):
    shown = fill(tmp_path)
    a, b = np.array(LATE), np.array(EARLY)
    errors = a.var(ddof=1) / 4, b.var(ddof=1) / 4
    degrees = sum(errors) ** 2 / sum(error**2 / 3 for error in errors)
    half_width = stats.t.ppf(0.975, degrees) * sum(errors) ** 0.5
    p = 2 * stats.t.sf((a.mean() - b.mean()) / sum(errors) ** 0.5, degrees)
    row = shown.numbers.iloc[0]
    expected = (a.mean() - b.mean(), half_width, p)
    assert (row["difference"], row["difference_half_width"], row["p"]) == pytest.approx(expected, abs=1e-6)
    assert list(shown.cells["seeds"]) == ["4 to 7", "0 to 3"]
    assert list(shown.cells["test accuracy %"].str[:5]) == ["51.62", "50.75"]
    assert shown.claims == (
        f"resnet8, cifar10, mSAM, m=4, seeds from 4 over seeds from 0: +0.88 ± {half_width:.2f} (n=4 and 4), "
        f"p {p:.2g}: not significant, where every significant difference is one by chance.",
    )
    assert EXHIBIT.claims == ()


def test_a_significant_difference_is_said_to_be_one_by_chance(tmp_path):
    (sentence,) = fill(tmp_path, late=[60.0, 60.1, 60.2, 60.3]).claims
    assert ": significant, where every significant difference is one by chance." in sentence


def test_without_the_runs_of_table_1_it_is_not_run(tmp_path):
    shown = fill(tmp_path, early=())
    assert list(shown.cells["test accuracy %"]) == ["51.62 ± 2.19 (4)", "not run"]
    assert "not run, because it needs both sets (4 and 0 runs are here)" in shown.claims[0]


def test_the_experiment_is_the_msam_of_table_1_at_seeds_that_table_1_does_not_have():
    (cell,) = placebo.RUNS["cpu"]
    reported = catalogue.cells("resnet_cifar", "cpu")
    assert replace(cell, seed=0) in reported
    assert cell.seed == placebo.FIRST == 16
    assert target("placebo", "cpu", seeds=16).runs[-1].seed == 31
