"""What cells show: differences in words, and what keeps a table's rows from being compared."""

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
        (Interval(1.1, 0.6, 8), "+1.10 ± 0.60 (n=8): separated"),
        (Interval(-1.1, 0.6, 8), "-1.10 ± 0.60 (n=8): separated, the other way round"),
        (Interval(-0.1, 0.6, 8), "-0.10 ± 0.60 (n=8): not separated"),
        (Interval(0.5, float("nan"), 1), "+0.50 (n=1): one seed, no interval"),
        (Interval(float("nan"), float("nan"), 0), "not run"),
    ],
)
def test_verdict(difference, words):
    assert cells.verdict(difference) == words


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
    warnings = cells.warnings(table, table1.EXHIBIT.numbers(table, CELLS, 1))
    assert warnings == [
        "Warning: these runs come from several commits: 0123456789ab (1 runs), fedcba9 (1 runs).",
        "Warning: 1 runs come from a tree with uncommitted changes, or outside git.",
        "Warning: the runs of resnet8 on cifar10 read data with different checksums.",
        "Times come from several machines (Invented CPU; Invented CPU (AVX512)): they do not compare.",
    ]
    alone = table1.EXHIBIT.numbers(table, [SGD], 1)
    assert cells.warnings(table, alone) == []
