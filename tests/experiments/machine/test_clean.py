"""`clean` lists and removes what nothing needs any more, and no byte of a record."""

from dataclasses import replace

import pytest

from experiments.harness.machine.clean import remove, unneeded
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import curvature_of
from experiments.harness.runs.record import in_bytes, record_of
from experiments.harness.runs.spec import Curvature
from experiments.harness.work.session import Session
from experiments.harness.work.train import train
from tests.commands import command
from tests.specs import BASE

MEASURED = next(run for run in catalogue.runs("table3", "smoke") if isinstance(run, Curvature))
OTHER = replace(BASE, label_smoothing=0.1)


def finished(spec, root, weights=b"w" * 1000):
    record = record_of(spec, root)
    record.create(spec)
    record.append({"epoch": 1, "step": 1, "seconds": 1.0})
    if weights:
        record.write_checkpoint(weights)
    record.finish({"test_accuracy": 0.5})
    return record


def listed(root):
    return {one.path.relative_to(root / "runs").as_posix(): one.why for one in unneeded(root)}


def test_weights_are_needed_until_what_measures_them_is_done(tmp_path):
    network, other = finished(MEASURED.network, tmp_path), finished(OTHER, tmp_path)
    seventh = finished(replace(MEASURED.network, seed=7), tmp_path)
    assert listed(tmp_path) == {f"{other.run_id}/checkpoint.pt": "final weights"}
    finished(MEASURED, tmp_path, weights=b"")
    assert listed(tmp_path) == {f"{one.run_id}/checkpoint.pt": "final weights" for one in (network, other)}
    finished(replace(MEASURED, seed=7), tmp_path, weights=b"")
    assert f"{seventh.run_id}/checkpoint.pt" in listed(tmp_path)
    (own,) = curvature_of([OTHER], examples=8, rho=0.1)
    record_of(own, tmp_path).create(own)  # in no experiment, but begun here
    assert f"{other.run_id}/checkpoint.pt" not in listed(tmp_path)


def test_an_unfinished_run_keeps_its_checkpoints_and_loses_what_a_killed_process_left(tmp_path):
    record = record_of(OTHER, tmp_path)
    record.create(OTHER)
    record.write_checkpoint(b"1")
    record.write_checkpoint(b"2")
    left = record.folder / ".checkpoint.pt.12345"
    left.write_bytes(b"half")
    assert listed(tmp_path) == {f"{record.run_id}/{left.name}": "left by a process that was killed"}
    with record.locked():
        assert unneeded(tmp_path) == [], "it may be writing that file"
    assert remove(unneeded(tmp_path), tmp_path) == 4
    assert record.checkpoint.exists()
    assert record.previous_checkpoint.exists()


def test_removing_leaves_every_record_and_unreadable_folders_as_they_are(tmp_path):
    record = finished(OTHER, tmp_path)
    record.previous_checkpoint.write_bytes(b"p" * 10)
    damaged = finished(replace(OTHER, seed=1), tmp_path)
    (damaged.folder / "summary.json").write_text("{")
    away = tmp_path / "away"
    finished(replace(OTHER, seed=2), away)
    (tmp_path / "runs" / "linked").symlink_to(away / "runs" / replace(OTHER, seed=2).run_id)
    gone = {record.checkpoint, record.previous_checkpoint}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path not in gone}
    shown = command("experiments", "clean", "--results", tmp_path).stdout
    assert shown.splitlines() == [
        f"    10 B  {record.run_id}/checkpoint.previous.pt  checkpoint of a finished run: {OTHER.title}",
        f"  1.0 kB  {record.run_id}/checkpoint.pt  final weights: {OTHER.title}",
        "",
        "2 files, 1.0 kB. To remove them, give the same command with --remove.",
    ]
    assert all(path.exists() for path in gone)
    done = command("experiments", "clean", "--results", tmp_path, "--remove")
    assert done.stdout.endswith("\nRemoved 1.0 kB of 1.0 kB.\n"), done.stderr
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    assert after == before
    again = command("experiments", "clean", "--results", tmp_path).stdout
    assert again == f"{tmp_path} has nothing to remove.\n"


def test_a_run_without_its_weights_is_verified_by_its_lines_and_scores(tmp_path):
    from experiments.harness.machine.verify import verify

    spec = replace(BASE, model="linear", epochs=1, train_examples=32, test_examples=10)
    train(spec, Session(tmp_path))
    remove(unneeded(tmp_path), tmp_path)
    record = record_of(spec, tmp_path)
    assert not record.checkpoint.exists()
    assert verify(record, Session(tmp_path)) == []


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (45_200, "45 kB"), (2.14e6, "2.1 MB"), (9e10, "90 GB")],
)
def test_sizes_in_words(size, words):
    assert in_bytes(size) == words
