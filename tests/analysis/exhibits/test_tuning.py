"""The grid's table: the choice, its place in the grid, and whether the table uses it."""

from dataclasses import replace

import pytest

from analysis.collect import collect
from analysis.exhibits.tuning import choices, numbers
from analysis.frames import frame
from experiments.harness.runs.grids import GRID_SEED, grid_of_arms, with_seeds
from experiments.harness.runs.spec import SpecError
from tests.analysis.invented import document
from tests.fixtures.make_runs import BASE, MSAM, SAM, SGD, write_run

GRID = replace(BASE, holdout_examples=50)
RATES = {0.05: (0.50, 0.54), 0.1: (0.60, 0.62), 0.2: (0.55, 0.57)}
RHOS = {0.05: (0.60, 0.60), 0.1: (0.61, 0.61), 0.4: (0.62, 0.64)}
RATE_CELLS = [replace(GRID, learning_rate=rate) for rate in RATES]
RHO_CELLS = [replace(GRID, micro_batches=4, rho=rho) for rho in RHOS]
CELLS = [*RHO_CELLS, *reversed(RATE_CELLS)]


@pytest.fixture
def table(tmp_path):
    for cells, scores in ((RATE_CELLS, RATES), (RHO_CELLS, RHOS)):
        for cell, pair in zip(cells, scores.values(), strict=True):
            for seed, score in enumerate(pair):
                write_run(tmp_path, replace(cell, seed=seed), score)
    write_run(tmp_path, SGD, 0.99)  # scored on the test set, so not part of the grid
    return frame(collect(tmp_path).finished)


def test_best_mean_is_chosen_and_its_place_is_reported(table):
    shown = document("table1-tuning", table, CELLS, 2, used=[SGD, SAM, MSAM])
    columns = ["method", "learning rate", "rho", "held-out accuracy %", "choice"]
    # t(0.975, 1 degree) = 12.7062; half-width = 12.7062 * difference / 2.
    assert shown.cells[columns].to_numpy().tolist() == [
        ["mSAM, m=4", "0.1", "0.05", "60.00 ± 0.00 (2)", ""],
        ["mSAM, m=4", "0.1", "0.1", "61.00 ± 0.00 (2)", ""],
        ["mSAM, m=4", "0.1", "0.4", "63.00 ± 12.71 (2)", "chosen (at the edge: high rho)"],
        ["SGD", "0.05", "", "52.00 ± 25.41 (2)", ""],
        ["SGD", "0.1", "", "61.00 ± 12.71 (2)", "chosen"],
        ["SGD", "0.2", "", "56.00 ± 12.71 (2)", ""],
    ]
    assert shown.claims == (
        "resnet8, cifar10, mSAM, m=4: rho 0.4, at the edge of its grid (high rho). The table uses rho 0.2 instead.",
        "resnet8, cifar10, SGD: learning rate 0.1, in the interior of its grid.",
    )
    assert shown.title == "The grid of Table 1: held-out accuracy"
    assert "12.71 (2)" in shown.markdown()


def test_further_pairs_of_seeds_count_in_the_same_row(tmp_path):
    """The first pair alone would choose another learning rate."""
    grid = grid_of_arms(BASE, micro_batches=4, rhos={}, learning_rates=(0.1, 0.2), pairs=2, holdout_examples=50)
    scores = {0.1: (0.60, 0.62, 0.60, 0.62), 0.2: (0.63, 0.63, 0.55, 0.55)}
    for run in with_seeds(grid, 2):
        write_run(tmp_path, run, scores[run.learning_rate][run.seed - GRID_SEED])
    origin = document("table1-tuning", frame(collect(tmp_path).finished), grid, 2).origin
    assert origin.startswith("Profile smoke, 2 to 4 seeds per cell; ")
    table = numbers(frame(collect(tmp_path).finished), grid, 2)
    assert table[["learning_rate", "n", "mean", "chosen"]].to_numpy().tolist() == [
        [0.1, 4, pytest.approx(61.0), True],
        [0.2, 4, pytest.approx(59.0), False],
    ]


def test_of_equal_means_the_largest_value_is_chosen(tmp_path):
    """Both means are 56.1 %; as floating-point numbers the first is larger by one bit."""
    grid = grid_of_arms(BASE, micro_batches=4, rhos={"msam": (0.1, 0.2, 0.4)}, holdout_examples=50)
    scores = {0.1: (0.560, 0.562), 0.2: (0.558, 0.564), 0.4: (0.5, 0.5)}
    for run in with_seeds(grid, 2):
        write_run(tmp_path, run, scores[run.rho][run.seed - GRID_SEED])
    table = numbers(frame(collect(tmp_path).finished), grid, 2)
    assert table["chosen"].tolist() == [False, True, False]


def test_incomplete_grid_chooses_nothing(table):
    removed = replace(RATE_CELLS[0], seed=1).run_id
    grid = numbers(table[table["run_id"] != removed], RATE_CELLS, 2)
    assert grid["chosen"].tolist() == [False] * 3
    assert grid["best"].tolist() == [False, True, False]
    assert choices(grid, RATE_CELLS) == ["resnet8, cifar10, SGD: undecided because runs are missing."]
    shown = document("table1-tuning", table[table["run_id"] != removed], RATE_CELLS, 2)
    assert shown.cells["choice"].tolist() == ["", "best so far", ""]
    assert shown.notes[0] == "[1] 1 of 2 runs missing (seed 1)."


def test_grid_of_two_dimensions_has_edges_in_both():
    cells = [replace(GRID, learning_rate=a, rho=b) for a in (0.1, 0.2, 0.3) for b in (0.1, 0.2, 0.3)]
    grid = numbers(frame([]), cells, 1)
    edges = {(row.learning_rate, row.rho): row.edge for row in grid.itertuples()}
    assert edges[0.2, 0.2] == "interior"
    assert edges[0.1, 0.2] == "low learning rate"
    assert edges[0.3, 0.1] == "high learning rate, low rho"


def test_single_value_is_marked_as_the_only_one(table):
    grid = numbers(table, RATE_CELLS[:1], 2)
    assert grid["edge"].tolist() == ["only value"]


def test_grid_scored_on_the_test_set_is_rejected():
    with pytest.raises(SpecError, match="give it holdout_examples"):
        numbers(frame([]), [SGD], 1)
