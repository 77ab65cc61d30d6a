"""Cells: differences in words, and warnings on rows that cannot be compared."""

import pytest

from analysis import cells
from analysis.collect import collect
from analysis.exhibits import table1
from analysis.frames import frame
from analysis.statistics import Interval
from tests.fixtures.make_runs import CELLS, SAM, SGD, write_run


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Interval(1.1, 0.6, 8), "+1.10 ± 0.60 (n=8): significant"),
        (Interval(-1.1, 0.6, 8), "-1.10 ± 0.60 (n=8): significant, with the opposite sign"),
        (Interval(-0.1, 0.6, 8), "-0.10 ± 0.60 (n=8): not significant"),
        (Interval(0.5, float("nan"), 1), "+0.50 (n=1): one seed, no interval"),
        (Interval(float("nan"), float("nan"), 0), "not run"),
    ],
)
def test_difference_in_words(difference, words):
    assert cells.difference_in_words(difference) == words


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
        "Warning: these runs come from several commits: 0123456789ab (1 runs), fedcba9 (1 runs).",
        "Warning: 1 runs come from a tree with uncommitted changes, or outside git.",
        "Warning: the runs of resnet8 on cifar10 read data with different checksums.",
        "Times come from several machines (Invented CPU; Invented CPU (AVX512)) and cannot be compared.",
    ]
    alone = table1.EXHIBIT.numbers(table, [SGD], 1)
    assert cells.warnings(table, alone) == []
