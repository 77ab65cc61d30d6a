"""Run folders: what counts as done, what is rejected by name, and who may write."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import FORMAT, Record, RunLocked, record_of
from tests.specs import BASE

SPEC = replace(BASE, model="linear")


@pytest.fixture
def record(tmp_path):
    record = record_of(SPEC, tmp_path)
    record.create(SPEC)
    return record


def test_round_trip(record):
    record.add_environment({"commit": "abc"})
    record.add_environment({"commit": "def"})
    record.append({"epoch": 1, "train_loss": 0.1 + 0.2})
    record.append({"epoch": 2, "train_loss": float("nan")})
    record.finish({"test_accuracy": 1 / 3, "note": "text"})
    again = Record(record.root, record.run_id)
    assert again.spec() == SPEC
    assert [session["commit"] for session in again.environments()] == ["abc", "def"]
    assert again.metrics() == [{"epoch": 1, "train_loss": 0.1 + 0.2}, {"epoch": 2, "train_loss": "nan"}]
    assert again.summary() == {"test_accuracy": 1 / 3, "note": "text"}


def test_a_run_without_a_summary_is_not_done(record):
    record.append({"epoch": 1})
    assert not record.done
    record.finish({})
    assert record.done


def test_an_interrupted_write_leaves_the_old_file(record, monkeypatch):
    record.finish({"test_accuracy": 0.5})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RecordError, match=r"summary\.json cannot be written \(disk full\)"):
        record.finish({"test_accuracy": 0.9})
    monkeypatch.undo()
    assert record.summary() == {"test_accuracy": 0.5}
    assert sorted(p.name for p in record.folder.iterdir()) == ["spec.json", "summary.json"]


def test_a_truncated_last_line_is_left_out_and_a_damaged_earlier_line_is_named(record):
    record.append({"epoch": 1})
    with open(record.folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "train_l')
    assert record.metrics() == [{"epoch": 1}]
    with open(record.folder / "metrics.jsonl", "a") as file:
        file.write('\n{"epoch": 3}\n')
    with pytest.raises(RecordError, match=r"metrics\.jsonl, line 2"):
        record.metrics()


def test_rewinding_drops_lines_after_the_checkpoint(record):
    for epoch in (1, 2, 3):
        record.append({"epoch": epoch})
    record.rewind(2)
    assert [line["epoch"] for line in record.metrics()] == [1, 2]


def test_a_newer_format_is_rejected(record):
    content = json.loads((record.folder / "spec.json").read_text())
    (record.folder / "spec.json").write_text(json.dumps({**content, "format": FORMAT + 1}))
    with pytest.raises(RecordError, match="newer version"):
        record.spec()
    with pytest.raises(RecordError, match="newer version"):
        record.create(SPEC)


def test_a_renamed_folder_is_rejected(record):
    record.folder.rename(record.folder.with_name("0123456789ab"))
    with pytest.raises(RecordError, match="renamed"):
        Record(record.root, "0123456789ab").spec()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff\xfe", b'{"format": 1, "spec": {"colour": "red"}}', b"[" * 100_000],
    ids=["empty", "list", "object", "bytes", "foreign", "deep"],
)
def test_foreign_files_are_rejected_by_name(record, content):
    (record.folder / "spec.json").write_bytes(content)
    with pytest.raises(RecordError, match=r"spec\.json"):
        record.spec()


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(RecordError, match="--results"):
        record_of(SPEC, tmp_path).create(SPEC)


def test_a_lock_keeps_other_processes_out_and_is_released_when_its_holder_dies(record):
    code = (
        "import sys, time; from pathlib import Path; from experiments.harness.runs.record import Record\n"
        f"with Record(Path({str(record.root)!r}), {record.run_id!r}).locked():\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert record.busy
        with pytest.raises(RunLocked), record.locked():
            pass
        holder.kill()
    assert not record.busy
    with record.locked():
        assert record.busy


def test_removing_a_run_leaves_only_the_lock(record):
    record.append({"epoch": 1})
    record.finish({})
    with record.locked():
        record.remove()
    assert [p.name for p in record.folder.iterdir()] == ["lock"]
