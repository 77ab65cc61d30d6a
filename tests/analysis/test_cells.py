"""Cells: warnings on rows that cannot be compared."""

from analysis import cells
from analysis.collect import collect
from analysis.exhibits import table1
from analysis.frames import frame
from tests.fixtures.make_runs import CELLS, SAM, SESSION, SGD, write_run


def test_several_versions_of_the_training_code_are_a_warning(tmp_path):
    write_run(tmp_path, SGD, 0.6)
    write_run(tmp_path, SAM, 0.6, commit="fedcba9", code="0ther")
    table = frame(collect(tmp_path).finished)
    (warning,) = cells.warnings(table, table1.EXHIBIT.numbers(table, CELLS, 1))
    assert warning == "Warning: these runs come from several commits: 0123456789ab (1 runs), fedcba9 (1 runs)."


def test_a_resumed_run_counts_at_each_of_its_commits(tmp_path):
    write_run(tmp_path, SGD, 0.6)
    write_run(tmp_path, SAM, 0.6).add_environment({**SESSION, "commit": "fedcba9"})
    table = frame(collect(tmp_path).finished)
    (line,) = cells.warnings(table, table1.EXHIBIT.numbers(table, CELLS, 1))
    assert line.endswith(": 0123456789ab (2 runs), fedcba9 (1 runs); a resumed run counts at each of its commits.")


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
