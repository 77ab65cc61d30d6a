"""python -m analysis, as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest

from analysis.__main__ import Arguments, run
from analysis.publish import Refused
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import with_ranks
from experiments.harness.runs.record import record_of
from tests.commands import command
from tests.fixtures.make_runs import write_run

ROOT = Path(__file__).resolve().parents[2]

PROFILE = "smoke"

pytestmark = pytest.mark.usefixtures("sketches")  # not in other processes


def python(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def written(folder):
    return {p for p in folder.rglob("*") if p.is_file() and "runs" not in p.parts}


@pytest.fixture
def finished(tmp_path):
    """A results root with every run of Table 1's smoke profile finished, with invented numbers."""
    for spec in catalogue.runs("table1", PROFILE):
        write_run(tmp_path, spec, 0.5)
    return tmp_path


def test_torch_is_never_imported(finished):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['analysis', '--results', {str(finished)!r}, '--profile', {PROFILE!r}, '--publish']\n"
        "try:\n    runpy.run_module('analysis', run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "print('IMPORTED', sorted({'torch', 'torchvision', 'timm', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "IMPORTED ['pandas']", done.stderr
    assert (finished / PROFILE / "tables" / "table1.md").exists()


def test_help_imports_nothing_heavy():
    done = python("-X", "importtime", "-m", "analysis", "--help")
    assert done.returncode == 0
    assert "--from-committed" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert not {"pandas", "scipy", "numpy", "torch"} & imported


def test_publishing_with_missing_runs_prints_one_sentence_and_exits_with_2(tmp_path):
    done = command("analysis", "table1", "--results", tmp_path, "--profile", PROFILE, "--publish")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"`python -m experiments run table1 --profile {PROFILE}" in done.stderr
    assert written(tmp_path) == set()


def test_publishing_mixed_code_exits_with_2_and_writes_nothing(finished):
    write_run(finished, catalogue.runs("table1", PROFILE)[-1], 0.5, code="0ther")
    done = command("analysis", "--results", finished, "--profile", PROFILE, "--publish")
    assert done.returncode == 2
    assert "several versions of training code (" in done.stderr
    assert written(finished) == set()


def test_runs_under_way_are_shown_and_marked_and_count_for_nothing(finished):
    spec = catalogue.runs("resnet_cifar", PROFILE)[0]
    record = record_of(spec, finished)
    record.remove()
    record.create(spec)
    for epoch in (1, 2):
        record.append({"epoch": epoch, "train_loss": 1.5 / epoch, "test_accuracy": 0.25 * epoch, "step": epoch})
    text = run(Arguments(("table1",), profile=PROFILE, results=finished))
    local = finished / "local" / PROFILE
    assert f"1 of 2 runs missing (seed 0 under way, epoch 2 of {spec.epochs})" in text
    assert spec.run_id not in (local / "runs.csv").read_text()
    assert (local / "curves.csv").read_text().count(spec.run_id) == 2
    page = (local / "report.html").read_text()
    assert f"<td>{spec.title}</td><td>2 of {spec.epochs}</td><td>0.750</td><td>50.0</td>" in "".join(page.split("\n"))
    before = (local / "figures" / "curves.png").read_bytes()
    record.append({"epoch": 3, "train_loss": 0.1, "test_accuracy": 0.9, "step": 3})
    run(Arguments(("table1",), profile=PROFILE, results=finished))
    assert (local / "figures" / "curves.png").read_bytes() != before
    with pytest.raises(Refused, match="table1 lacks 1 of its"):
        run(Arguments(("table1",), profile=PROFILE, results=finished, publish=True))


def test_a_measurement_under_way_has_no_epochs_and_is_shown_too(finished):
    spec = next(run for run in catalogue.runs("table3", PROFILE) if run.kind == "curvature")
    record = record_of(spec, finished)
    record.create(spec)
    record.append({"step": 1, "steps": 9, "seconds": 1.0, "part": "train", "measure": "density"})
    run(Arguments(("table1", "table3"), profile=PROFILE, results=finished))
    page = "".join((finished / "local" / PROFILE / "report.html").read_text().split("\n"))
    assert f"<td>{spec.title}</td><td>1 measurements</td><td></td><td></td>" in page


def test_a_folder_without_any_of_the_runs_is_an_error(tmp_path):
    (tmp_path / "runs").mkdir()
    done = command("analysis", "table1", "--results", tmp_path, "--profile", PROFILE)
    assert done.returncode == 2
    count = len(catalogue.runs("table1", PROFILE))
    assert done.stderr == (
        f"{tmp_path}/runs has none of the {count} runs of table1 ({PROFILE}): make them with `python -m experiments "
        f"run table1 --profile {PROFILE} --results {tmp_path}`, or give the folder that holds runs/ with --results.\n"
    )
    assert written(tmp_path) == set()


def test_data_parallel_runs_fill_the_table_they_were_submitted_for(tmp_path):
    specs = catalogue.runs("resnet_cifar", PROFILE)
    for spec in with_ranks(specs, 2):
        write_run(tmp_path, spec, 0.25)
    arguments = ("resnet_cifar", "--results", tmp_path, "--profile", PROFILE)
    assert command("analysis", *arguments, "--gpus", "2").stdout.count("25.00 ± 0.00 (2)") == len(specs) / 2 == 6
    alone = command("analysis", *arguments).stdout
    assert alone.count("25.00 ± 0.00 (2)") == 3, "arms over micro-batches on two ranks are different runs"
    refused = command("analysis", *arguments, "--gpus", "2", "--publish")
    assert refused.returncode == 2
    assert "--gpus" in refused.stderr


def test_a_second_call_reads_no_runs_until_something_changes(finished, monkeypatch):
    arguments = Arguments(profile=PROFILE, results=finished)
    first = run(arguments)
    table = finished / "local" / PROFILE / "tables" / "table1.md"
    text = table.read_text()
    monkeypatch.setattr("analysis.collect.collect", lambda *_, **__: pytest.fail("runs were read again"))
    assert run(arguments) == first
    monkeypatch.undo()
    table.unlink()
    assert run(arguments) == first
    assert table.read_text() == text
    write_run(finished, catalogue.runs("table1", PROFILE)[0], 0.9)
    assert run(arguments) != first
    assert table.read_text() != text
    shown = run(Arguments(("resnet_cifar",), profile=PROFILE, results=finished))
    assert "wrn-10-1" not in shown, "other arguments"
