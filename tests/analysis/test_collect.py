"""Reading run folders, intact and damaged."""

import json
import shutil
from dataclasses import replace

import pytest

from analysis.collect import collect, finished_runs
from analysis.frames import Results, frame
from experiments.harness.runs.files import RecordError, write_json
from tests.fixtures import make_runs
from tests.fixtures.make_runs import LINEAR, MSAM, ROOT, SAM, SGD, write_run


def snapshot(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_fixtures_equal_the_output_of_their_script(tmp_path):
    make_runs.write_all(tmp_path)
    assert {p.relative_to(tmp_path): text for p, (text, _) in snapshot(tmp_path / "runs").items()} == {
        p.relative_to(ROOT): text for p, (text, _) in snapshot(ROOT / "runs").items()
    }


def test_collect_separates_finished_failed_and_started_runs():
    collected = collect(ROOT)
    assert len(collected.finished) == 12
    assert collected.problems == ()
    assert {u.spec: u.failure for u in collected.unfinished} == {
        replace(SAM, seed=2): "Diverged: the loss of step 3 is not finite",
        replace(LINEAR, seed=1): None,
    }
    assert collected.states == {replace(SAM, seed=2).run_id: "failed: Diverged: the loss of step 3 is not finite"}


def test_unreadable_folders_are_reported_and_left_unchanged(tmp_path):
    make_runs.write_all(tmp_path)
    runs = tmp_path / "runs"
    (runs / SGD.run_id / "spec.json").write_text("{ not json")
    newer = json.loads((runs / MSAM.run_id / "spec.json").read_text()) | {"format": 99}
    write_json(runs / MSAM.run_id / "spec.json", newer)
    shutil.move(runs / SAM.run_id, runs / "renamed")
    (runs / "foreign").mkdir()
    (runs / "foreign" / "holiday.txt").write_text("sun")
    (runs / "notes.txt").write_text("a file")
    (runs / LINEAR.run_id / "summary.json").write_text("[1, 2]")
    (runs / replace(SGD, seed=1).run_id / "metrics.jsonl").write_text('broken\n{"epoch": 1}\n')
    before = snapshot(tmp_path)

    collected = collect(tmp_path)

    assert snapshot(tmp_path) == before
    assert len(collected.finished) == 12 - 5
    problems = "\n".join(collected.problems)
    assert len(collected.problems) == 7
    assert f"{SGD.run_id}/spec.json is not JSON" in problems
    assert "newer version of this project (record format 99" in problems
    assert f"describes run {SAM.run_id}, not renamed" in problems
    assert "foreign/spec.json cannot be read" in problems
    assert "notes.txt is not a run folder" in problems
    assert f"{LINEAR.run_id}/summary.json does not hold a JSON object" in problems
    assert "metrics.jsonl, line 1, is damaged" in problems


def test_finished_run_without_environment_counts_and_is_reported(tmp_path):
    record = write_run(tmp_path, SGD, 0.5)
    (record.folder / "env.json").unlink()
    collected = collect(tmp_path)
    assert frame(collected.finished)["commit"].tolist() == ["unknown"]
    assert "its commit and machine are unknown" in collected.problems[0]


def test_folder_of_a_run_about_to_start_is_not_reported(tmp_path):
    (tmp_path / "runs" / "0123").mkdir(parents=True)
    (tmp_path / "runs" / "0123" / "lock").touch()
    (tmp_path / "runs" / ".hidden").touch()
    assert collect(tmp_path).problems == ()


def test_missing_root_is_an_error_and_missing_runs_are_not(tmp_path):
    with pytest.raises(RecordError, match=r"does not exist: give .*--results"):
        collect(tmp_path / "nowhere")
    assert collect(tmp_path).finished == ()


def test_curves_are_read_only_for_the_wanted_runs():
    full, partial = collect(ROOT), collect(ROOT, curves_of={SGD.run_id})
    assert Results.of(partial.finished).runs.equals(Results.of(full.finished).runs)
    lines = Results.of(partial.finished).curves
    assert set(lines["run_id"]) == {SGD.run_id}
    whole = Results.of(full.finished).curves
    assert len(lines) == (whole["run_id"] == SGD.run_id).sum() < len(whole)
    assert {run.spec.run_id for run in full.finished} == finished_runs(ROOT)
