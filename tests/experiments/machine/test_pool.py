"""Many runs at once, in real processes: numbers do not depend on the workers, and a failure affects only its run."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.harness.machine import pool
from experiments.harness.runs import catalogue
from experiments.harness.runs.estimate import load_estimate, work
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import Training, from_dict
from experiments.harness.work.session import Session
from tests.commands import command
from tests.specs import BASE, four_arms

ROOT = Path(__file__).parents[3]

SMALL = replace(BASE, train_examples=64, test_examples=50)
FOUR = four_arms(SMALL, sam_rho=0.1, msam_rho=0.1)
LONG = replace(SMALL, epochs=2000)

TIMES = {"wall_seconds", "step_seconds"}


def run(specs: list[Training], root: Path, jobs: int = 2) -> pool.Outcome:
    return pool.run(
        specs, Session(root, environment={"commit": "abc"}), pool.Limits(jobs), estimate=load_estimate(root)
    )


def scores(specs: list[Training], root: Path) -> list[dict]:
    return [{k: v for k, v in record_of(s, root).summary().items() if k not in TIMES} for s in specs]


@pytest.mark.rare
def test_the_number_of_workers_changes_no_number(tmp_path):
    one, two = run(FOUR, tmp_path / "1", jobs=1), run(FOUR, tmp_path / "2", jobs=2)
    assert set(one.trained) == set(two.trained) == set(FOUR)
    assert scores(FOUR, tmp_path / "1") == scores(FOUR, tmp_path / "2")


def test_a_failing_run_stops_no_other_run_and_is_reported_with_its_traceback(tmp_path, capfd):
    bad = replace(SMALL, learning_rate=1e20)
    outcome = run([bad, *FOUR], tmp_path)
    assert set(outcome.trained) == set(FOUR)
    assert list(outcome.failed) == [bad]
    assert "Traceback" in outcome.failed[bad]
    assert "diverged at step 2" in outcome.failed[bad]
    assert "diverged at step 2" in record_of(bad, tmp_path).failure()
    assert "FAILED" in capfd.readouterr().err


def run_and_signal_the_worker(number: signal.Signals, root: Path) -> pool.Outcome:
    def send() -> None:
        record = record_of(LONG, root)
        while not record.metrics():
            time.sleep(0.05)
        for process in list(pool.multiprocessing.process._children):
            os.kill(process.pid, number)

    sender = threading.Thread(target=send)
    sender.start()
    outcome = run([LONG], root)
    sender.join()
    return outcome


def test_a_killed_worker_is_reported_and_releases_its_run(tmp_path):
    outcome = run_and_signal_the_worker(signal.SIGKILL, tmp_path)
    assert "SIGKILL" in outcome.failed[LONG]
    assert "SIGKILL" in record_of(LONG, tmp_path).failure()
    assert not record_of(LONG, tmp_path).busy


def test_a_worker_stopped_by_a_signal_from_outside_is_reported(tmp_path):
    outcome = run_and_signal_the_worker(signal.SIGTERM, tmp_path)
    assert not outcome.interrupted
    assert "A signal from outside stopped this run" in outcome.failed[LONG]
    assert record_of(LONG, tmp_path).checkpoint.exists()


def cli(*arguments: str, root: Path) -> list[str]:
    return [sys.executable, "-m", "experiments", *arguments, "--profile", "smoke", "--results", str(root)]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.rare)])
def test_a_signal_stops_cleanly_and_the_same_command_resumes(number, tmp_path):
    arguments = ("run", "linear_cifar", "--seeds", "1", "--set", "epochs=20000")
    command = cli(*arguments, root=tmp_path)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        folders = tmp_path / "runs"
        while not any(folders.glob("*/metrics.jsonl")):
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 130, errors
    assert "same command resumes" in errors
    (folder,) = folders.iterdir()
    assert (folder / "checkpoint.pt").exists()
    epochs = len((folder / "metrics.jsonl").read_text().splitlines())
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while len((folder / "metrics.jsonl").read_text().splitlines()) <= epochs + 1:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    lines = [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, len(lines) + 1)), "the second command did not resume from the checkpoint"


def test_workers_stop_when_the_pool_is_killed(tmp_path):
    command = cli("run", "linear_cifar", "--seeds", "1", "--set", "epochs=200000", root=tmp_path)
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not any((tmp_path / "runs").glob("*/metrics.jsonl")):
            time.sleep(0.05)
        process.kill()
    (folder,) = (tmp_path / "runs").iterdir()
    record = record_of(from_dict(json.loads((folder / "spec.json").read_text())["spec"]), tmp_path)
    deadline = time.monotonic() + 120
    while record.busy:
        assert time.monotonic() < deadline, "the worker outlived the pool"
        time.sleep(0.1)
    assert record.checkpoint.exists()


@pytest.mark.rare
def test_two_commands_at_once_train_each_run_once(tmp_path):
    command = cli("run", "resnet_cifar", "--seeds", "1", root=tmp_path)
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in both]
    assert [code for _, code in ends] == [0, 0], ends
    epochs = {spec.run_id: spec.epochs for spec in catalogue.runs("resnet_cifar", "smoke", 1)}
    for folder in (tmp_path / "runs").iterdir():
        assert len((folder / "env.json").read_text().split('"commit"')) == 2, "trained twice"
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == epochs[folder.name]


def test_estimates_come_from_measured_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.harness.runs.estimate.DEFAULT_ROOT", tmp_path)
    assert load_estimate(tmp_path).seconds(SMALL) is None
    run(FOUR[:1], tmp_path)
    seconds = record_of(SMALL, tmp_path).summary()["wall_seconds"]
    estimate = load_estimate(tmp_path)
    assert estimate.seconds(replace(SMALL, seed=5)) == pytest.approx(seconds)
    assert estimate.seconds(FOUR[2]) == pytest.approx(2 * seconds)  # SAM: each example twice
    assert work(with_seeds([SMALL], 2)[1]) == 128
    assert estimate.seconds(replace(SMALL, model="wrn-10-1")) is None


def test_estimates_use_committed_times_if_there_are_no_local_ones(tmp_path):
    spec, _, other = catalogue.cells("resnet_cifar", "cpu")[:3]  # the second has twice the epochs
    row = {**{k: "" if v is None else v for k, v in spec.to_dict().items()}, "wall_seconds": 40.0}
    (tmp_path / "cpu").mkdir()
    with open(tmp_path / "cpu" / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*row])
        writer.writeheader()
        writer.writerows([row, {**row, "epochs": "many"}])
    assert load_estimate(tmp_path).seconds(spec) == pytest.approx(40)
    assert load_estimate(tmp_path).seconds(other) == pytest.approx(40), "of the same model"
    record = record_of(spec, tmp_path)
    record.create(spec)
    record.finish({"wall_seconds": 10.0})
    assert load_estimate(tmp_path).seconds(spec) == pytest.approx(10)


def test_runs_stop_with_a_checkpoint_when_the_time_is_over_and_none_begins(tmp_path):
    second = replace(LONG, seed=1)

    class UntilItTrains(pool.Limits):
        @property
        def over(self):
            return bool(record_of(LONG, tmp_path).metrics())

    outcome = pool.run([LONG, second], Session(tmp_path), UntilItTrains(1), estimate=load_estimate(tmp_path))
    assert (outcome.out_of_time, outcome.interrupted, outcome.failed, outcome.trained) == (True, False, {}, [])
    assert record_of(LONG, tmp_path).checkpoint.exists()
    assert not record_of(second, tmp_path).folder.exists()


def test_run_minutes_exits_with_75_until_nothing_is_left(tmp_path):
    words = ["experiments", "run", "linear_cifar", "--profile", "smoke", "--jobs", "1", "--results", tmp_path]
    stopped = command(*words, "--minutes", "1e-6")
    assert stopped.returncode == 75, stopped.stderr
    assert "2 runs are left. The same command resumes." in stopped.stderr
    assert command(*words, "--minutes", "0").returncode == 2
    assert command(*words, "--per-gpu", "0").returncode == 2
    assert command(*words, "--minutes", "9").returncode == 0
    assert all(record_of(spec, tmp_path).done for spec in catalogue.runs("linear_cifar", "smoke"))


def test_the_time_is_over_after_the_minutes_that_were_given(monkeypatch):
    limits = pool.limits("cpu", 2, 1, minutes=9, started=1000.0)
    for now, over in ((1000.0, False), (1539.9, False), (1540.0, True)):
        monkeypatch.setattr(pool.time, "monotonic", lambda now=now: now)
        assert limits.over is over
    assert not pool.limits("cpu", 2, 1, minutes=None, started=0.0).over


def test_runs_that_share_gpus_are_spread_over_them():
    assert [pool.Limits(4, per_gpu=2).gpu(slot) for slot in range(4)] == [0, 1, 0, 1]
    assert [pool.Limits(3).gpu(slot) for slot in range(3)] == [0, 1, 2]
    assert [pool.Limits(3, per_gpu=3).gpu(slot) for slot in range(3)] == [0, 0, 0]
