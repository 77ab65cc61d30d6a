"""Faults of disks, clocks, signals and foreign files, with real ones wherever possible."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.harness.runs.files import LARGEST_TEXT, RecordError
from experiments.harness.runs.record import Record, record_of, state_of
from experiments.harness.work.checkpoint import load_weights
from experiments.harness.work.session import Interrupted, Session
from experiments.harness.work.train import train
from tests import needs
from tests.commands import command
from tests.faults import inputs, soak

ROOT = Path(__file__).parents[2]
SPEC = replace(soak.SPEC, epochs=2)


def numbers(root: Path) -> tuple:
    return soak._numbers(SPEC, root)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The numbers of a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("uninterrupted")
    train(SPEC, Session(root))
    return numbers(root)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A results root with a run that was stopped before its sixth step, with two checkpoints."""
    root, stop = tmp_path_factory.mktemp("begun"), iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        train(SPEC, Session(root, stop=lambda: next(stop)), checkpoint_seconds=0)
    return root


@pytest.fixture
def stopped(begun, tmp_path):
    """The same run in a root of this test."""
    return record_of(SPEC, shutil.copytree(begun, tmp_path / "stopped"))


def complete(record: Record) -> list[int]:
    """Resume SPEC to its end; returns the steps that were reported."""
    steps = []
    train(SPEC, Session(record.root, report=lambda step, of: steps.append(step)))
    return steps


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    needs.require("mount")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.needs("mount")
def test_a_full_disk_is_reported_and_the_run_resumes_when_there_is_space(tmp_path, uninterrupted):
    disk = tmp_path / "disk"
    with small_disk(disk, 4):
        filler = disk / "filler"
        steps = []

        def fill(step: int, of: int) -> None:
            steps.append(step)
            if step == 5:
                with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))

        with pytest.raises(RecordError, match=r"No space left on device.*free space"):
            train(SPEC, Session(disk / "results", report=fill), checkpoint_seconds=0)
        assert steps[-1] == 5
        assert not list((disk / "results").rglob("summary.json"))
        filler.unlink()
        train(SPEC, Session(disk / "results", report=lambda step, of: steps.append(step)), checkpoint_seconds=0)
        assert steps[5] == 5, "it did not resume from the last checkpoint that was written"
        assert numbers(disk / "results") == uninterrupted
        assert not [p.name for p in record_of(SPEC, disk / "results").folder.iterdir() if p.name.startswith(".")]


@pytest.mark.needs("mount")
def test_a_read_only_results_folder_is_reported_before_training(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 4):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        done = command("experiments", "run", *soak.COMMAND, "--results", disk / "results")
    assert done.returncode == 2
    assert "Read-only file system" in done.stderr
    assert "--results" in done.stderr


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "bit": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(damage, stopped, uninterrupted, caplog):
    if DAMAGE[damage] is None:
        stopped.checkpoint.unlink()
    else:
        stopped.checkpoint.write_bytes(DAMAGE[damage](stopped.checkpoint.read_bytes()))
    assert complete(stopped)[0] == 5, "the last checkpoint was of step 5, the previous one of step 4"
    assert numbers(stopped.root) == uninterrupted
    assert ("resumes from the previous checkpoint" in caplog.text) == (damage != "gone")
    assert [p.name for p in stopped.folder.glob("checkpoint*")] == ["checkpoint.pt"]


def test_two_damaged_checkpoints_are_rejected_by_name(stopped):
    for path in (stopped.checkpoint, stopped.previous_checkpoint):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match=r"checkpoint\.pt cannot be read.*\n.*checkpoint\.previous\.pt.*delete it"):
        train(SPEC, Session(stopped.root))
    assert stopped.checkpoint.exists(), "no checkpoint is deleted"


def test_a_damaged_checkpoint_does_not_replace_the_previous_one(stopped):
    """After a second fault right after the first, the checkpoint that was resumed is still there."""
    stopped.checkpoint.write_bytes(b"damaged")
    stop = iter([False, True])
    with pytest.raises(Interrupted):
        train(SPEC, Session(stopped.root, stop=lambda: next(stop)), checkpoint_seconds=0)
    stopped.checkpoint.unlink()  # as if the process had died between its two renames
    assert complete(stopped)[0] == 5


def test_failures_to_write_the_summary_do_not_restart_a_run(stopped, uninterrupted, monkeypatch):
    def fail(record: Record, summary: dict) -> None:
        raise RecordError("no room")

    for _ in range(3):  # the weights are written, but not the summary
        with monkeypatch.context() as patch:
            patch.setattr(Record, "finish", fail)
            with pytest.raises(RecordError, match="no room"):
                train(SPEC, Session(stopped.root))
    assert complete(stopped)[0] == 6
    assert numbers(stopped.root) == uninterrupted


def test_an_unreadable_checkpoint_ends_the_attempt_and_is_kept(stopped):
    """The disk may be readable again later, so the checkpoint is neither deleted nor skipped."""
    content = stopped.checkpoint.read_bytes()
    stopped.checkpoint.unlink()
    stopped.checkpoint.mkdir()
    with pytest.raises(RecordError, match=r"checkpoint\.pt cannot be read"):
        train(SPEC, Session(stopped.root))
    stopped.checkpoint.rmdir()
    stopped.checkpoint.write_bytes(content)
    assert complete(stopped)[0] == 6


@pytest.mark.parametrize("kind", ["expanded", "meta", "sparse"])
def test_tensors_without_ordinary_storage_are_rejected(kind, record):
    import torch

    tensors = {"expanded": torch.zeros(1).expand(10**15), "meta": torch.zeros(3, device="meta")}
    tensor = tensors.get(kind, torch.eye(3).to_sparse())
    torch.save({"model": {"w": tensor}, "sum": "0" * 64}, record.checkpoint)
    with pytest.raises(RecordError, match="cannot be read"):
        load_weights(record)


def test_an_old_checkpoint_without_a_checksum_is_resumed(stopped):
    import torch

    content = torch.load(stopped.checkpoint, weights_only=True)
    del content["sum"]
    torch.save(content, stopped.checkpoint)
    assert complete(stopped)[0] == 6


def test_a_checkpoint_that_would_execute_code_is_rejected(stopped, tmp_path):
    import pickle

    import torch

    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    for path in (stopped.checkpoint, stopped.previous_checkpoint):
        torch.save({"progress": {}, "model": Trap()}, path)
    with pytest.raises(RecordError, match="cannot be read"):
        train(SPEC, Session(stopped.root))
    stopped.checkpoint.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(RecordError, match="cannot be read"):
        train(SPEC, Session(stopped.root))
    assert not (tmp_path / "executed").exists()


@pytest.mark.rare
def test_clocks_that_jump_change_no_number(tmp_path):
    """The system time jumps by years in both directions at each call; durations use the monotonic clock."""
    code = (
        "import itertools, sys, time\n"
        "jumps = itertools.cycle([-1e9, 1e9, 0.0])\n"
        "real = time.time\n"
        "time.time = lambda: real() + next(jumps)\n"
        "from pathlib import Path\n"
        "from experiments.harness.work.session import Session\n"
        "from experiments.harness.work.train import train\n"
        "from tests.faults.test_faults import SPEC\n"
        "train(SPEC, Session(Path(sys.argv[1])), checkpoint_seconds=0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "jumping")], cwd=ROOT, check=True)
    train(SPEC, Session(tmp_path / "steady"))
    assert numbers(tmp_path / "jumping") == numbers(tmp_path / "steady")
    assert 0 < record_of(SPEC, tmp_path / "jumping").summary()["wall_seconds"] < 600


def test_a_second_interrupt_ends_the_command_and_its_workers_immediately(tmp_path):
    """The worker is suspended and cannot stop by itself, so the command has to kill it."""
    words = [sys.executable, "-m", "experiments", "run", "linear_cifar", "--profile", "smoke", "--seeds", "1"]
    words += ["--set", "epochs=200000", "--results", str(tmp_path)]
    listening = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (a job in the background ignores it)
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listening) as process:
        while not any((tmp_path / "runs").glob("*/metrics.jsonl")):
            time.sleep(0.05)
        (folder,) = (tmp_path / "runs").iterdir()
        os.kill(holder_of(folder / "lock"), signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        while "Stopping" not in process.stderr.readline():
            assert process.poll() is None
        assert Record(tmp_path, folder.name).busy
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
    record = Record(tmp_path, folder.name)
    until = time.monotonic() + 120
    while record.busy:
        assert time.monotonic() < until, "a worker outlived the command"
        time.sleep(0.05)
    assert not record.done


def holder_of(lock: Path) -> int:
    """The process that holds the lock."""
    inode = str(lock.stat().st_ino)
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return next(int(fields[4]) for fields in lines if fields[1] == "FLOCK" and fields[5].split(":")[-1] == inode)


@pytest.mark.rare
def test_a_worker_out_of_memory_is_reported_and_the_others_go_on(tmp_path):
    """The pool's workers inherit a kernel limit on memory, which only the large run exceeds."""
    code = (
        "import resource, sys\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from experiments.harness.machine import pool\n"
        "from experiments.harness.runs.estimate import load_estimate\n"
        "from experiments.harness.runs.record import record_of\n"
        "from experiments.harness.work.session import Session\n"
        "from tests.faults.test_faults import SPEC\n"
        "if __name__ == '__main__':\n"
        "    root = Path(sys.argv[1])\n"
        "    large = replace(SPEC, model='resnet20', train_examples=16384, batch_size=16384, micro_batches=1)\n"
        "    small = [SPEC, replace(SPEC, seed=1)]\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (7 * 2**30, 7 * 2**30))\n"
        "    outcome = pool.run([large, *small], Session(root), pool.Limits(2), estimate=load_estimate(root))\n"
        "    assert set(outcome.trained) == set(small), outcome\n"
        "    assert 'memory' in outcome.failed[large], outcome.failed[large]\n"
        "    assert 'memory' in record_of(large, root).failure()\n"
    )
    script = tmp_path / "pool.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "results")], capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.fixture
def record(tmp_path):
    return inputs.whole(tmp_path / "results")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("summary.json", b'{"test_accuracy": NaN}', "NaN is not a number"),
        ("summary.json", b'{"a": 1, "a": 2}', "repeated"),
        ("summary.json", '{"a": 1}'.encode("utf-16"), "cannot be read"),
        ("spec.json", b"\xef\xbb\xbf{}", "not JSON"),
        ("env.json", b"[" * 50_000, "not JSON"),
        ("summary.json", b'{"wall_seconds": ' + b"9" * 400 + b"}", "400 digits"),
    ],
)
def test_files_that_are_not_strict_json_are_rejected_by_name(name, content, words, record):
    (record.folder / name).write_bytes(content)
    with pytest.raises(RecordError, match=rf"{name}.*{words}"):
        record.summary(), record.spec(), record.environments()


def test_a_line_of_ten_gigabytes_is_rejected_without_reading_it(record):
    path = record.folder / "metrics.jsonl"
    with open(path, "wb") as file:
        file.truncate(10 * 10**9)  # a sparse file, which takes no space
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecordError, match=r"metrics\.jsonl.*10000000000 bytes"):
        record.metrics()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST_TEXT // 1024


@pytest.mark.parametrize("name", ["spec.json", "summary.json", "env.json", "metrics.jsonl", "checkpoint.pt"])
def test_links_out_of_a_runs_folder_are_not_followed(name, record, tmp_path):
    target = tmp_path / "outside"
    shutil.copy(record.folder / name, target)
    before = target.read_bytes()
    (record.folder / name).unlink()
    (record.folder / name).symlink_to(target)
    with pytest.raises(RecordError, match=name.replace(".", r"\.")):
        record.spec(), record.summary(), record.environments(), record.metrics(), load_weights(record)
    with contextlib.suppress(OSError, RecordError):
        record.append({"epoch": 4})
    with contextlib.suppress(RecordError):
        record.add_environment({})
    record.write_checkpoint(b"other weights")
    record.finish({"test_accuracy": 1.0})
    assert target.read_bytes() == before


def test_a_folder_or_a_lock_that_is_a_link_is_rejected(record, tmp_path):
    outside = tmp_path / "outside"
    record.folder.rename(outside)
    record.folder.symlink_to(outside)
    with pytest.raises(RecordError, match="link"):
        record.spec()
    with pytest.raises(RecordError, match="is a symbolic link"):
        record.create(inputs.SPEC)
    assert state_of(inputs.SPEC, record.root)[0] == "damaged"
    record.folder.unlink()
    outside.rename(record.folder)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (record.folder / "lock").unlink(missing_ok=True)
    (record.folder / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), record.locked():
        pass
    record.folder.rename(outside)
    record.folder.symlink_to(outside)
    (outside / "lock").unlink()
    with pytest.raises(RecordError, match="is a symbolic link"), record.locked():
        pass
    assert not (outside / "lock").exists()
    assert victim.read_text() == "precious"


def test_a_record_cannot_send_control_characters_to_a_terminal(record):
    (record.folder / "summary.json").unlink()
    record.fail("\x1b[2Jgone \ud800")
    record.add_environment({"\x1b[2Jname": "\ud800"})
    words = state_of(inputs.SPEC, record.root)[1]
    assert "\\x1b[2Jgone \\ud800" in words
    done = command("experiments", "show", record.run_id, "--results", record.root)
    assert done.returncode == 0, done.stderr
    assert "\\x1b[2Jgone" in done.stdout
    assert "\\x1b[2Jname" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_pipe_is_rejected_without_blocking(record):
    (record.folder / "metrics.jsonl").unlink()
    os.mkfifo(record.folder / "metrics.jsonl")
    with pytest.raises(RecordError, match="not a regular file"):
        record.metrics()


@pytest.mark.parametrize("run_id", ["../outside", "a/b", "..", ""])
def test_a_path_is_not_a_run_id(run_id, tmp_path):
    with pytest.raises(RecordError, match="is not a run id"):
        Record(tmp_path, run_id)


def test_a_run_id_in_a_spec_file_is_not_used(record):
    content = json.loads((record.folder / "spec.json").read_text())
    (record.folder / "spec.json").write_text(json.dumps({**content, "run_id": "../../outside"}))
    assert record.spec() == inputs.SPEC, "the id is computed from the spec, not read"
