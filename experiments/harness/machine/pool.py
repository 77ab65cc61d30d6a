"""Runs many specs on the cores or GPUs of one machine: one process a run, with live progress.

A run has its process for itself, so that one that fails, runs out of memory or is killed takes no other with it.
Processes are forked from a server that has imported torch once and never computed anything.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from experiments.harness.machine.progress import Display
from experiments.harness.runs.estimate import Estimate
from experiments.harness.runs.facts import DATASETS, TextSet
from experiments.harness.runs.process import Flag, cores, library_settings
from experiments.harness.runs.record import RunLocked, record_of
from experiments.harness.runs.spec import Run, Timing
from experiments.harness.work.session import Interrupted, Session

REPORT_SECONDS = 0.5
"""Least time between a worker's reports of where it is."""

INTERRUPTED = 130
"""A worker's exit status when it was stopped and its checkpoint is written."""


@dataclass
class Outcome:
    """What became of the runs that `run` was given."""

    trained: list[Run] = field(default_factory=list)
    failed: dict[Run, str] = field(default_factory=dict)
    """Each with its traceback, or with how its process ended."""
    interrupted: bool = False


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    reports: Connection
    spec: Run
    slot: int
    fraction: float = 0.0
    failure: str | None = None
    silent: bool = False
    """It has closed its end of the pipe: only its process is left to wait for."""
    asked_to_stop: bool = False


def run(
    specs: Sequence[Run],
    session: Session,
    *,
    jobs: int,
    estimate: Estimate,
    redo: bool = False,
) -> Outcome:
    """Train the specs, `jobs` at a time, and show how far they are. Ctrl-C or SIGTERM stops all of them cleanly.

    Args:
        specs: Runs that are not done.
        session: Where records and data are; the workers' own `report` and `stop` take the place of its.
        jobs: Workers at a time; on GPUs, one for each.
        estimate: Seconds that each run is expected to take; weighs the progress bar.
        redo: Train them again: each keeps what it has until its own turn comes.

    Returns:
        What was trained, what failed and why.
    """
    context = multiprocessing.get_context("forkserver")
    texts = any(isinstance(DATASETS[spec.dataset], TextSet) for spec in specs)
    domains = ["experiments.harness.tasks.texts"] if texts else []
    domains += sorted({f"experiments.harness.{spec.module}" for spec in specs})
    context.set_forkserver_preload(["experiments.harness.machine.worker", *domains])
    workers: list[_Worker] = []
    waiting, outcome = list(specs), Outcome()
    display = Display(specs, estimate)
    with _stop_on_signals() as stopping, _worker_environment(specs), _killed_at_the_end(workers):
        while workers or (waiting and not stopping.is_set()):
            while waiting and len(workers) < _together(waiting[0], workers, jobs) and not stopping.is_set():
                taken = {worker.slot for worker in workers}
                slot = next(i for i in range(jobs) if i not in taken)
                workers.append(_start(context, waiting.pop(0), session, slot, redo))
            listening = [w.reports for w in workers if not w.silent]
            wait([*listening, *(w.process.sentinel for w in workers)], timeout=REPORT_SECONDS)
            for worker in list(workers):
                _receive(worker)
                if stopping.is_set() and not worker.asked_to_stop:
                    _ask_to_stop(worker)
                if not worker.process.is_alive():
                    _receive(worker)
                    workers.remove(worker)
                    _close(worker, outcome, session.root, stopping.is_set())
                    display.finished(worker.spec, worker.failure, session.root)
            display.update({w.spec: w.fraction for w in workers})
        outcome.interrupted = stopping.is_set()
    display.close()
    return outcome


def default_jobs(device: str) -> int:
    """One worker for each core this process may use, or for each GPU."""
    if device == "cpu":
        return cores()
    import torch

    return torch.cuda.device_count()


def _together(spec: Run, workers: Sequence[_Worker], jobs: int) -> int:
    """How many workers there may be with this run among them: what is timed has the machine for itself."""
    return 1 if any(isinstance(s, Timing) for s in (spec, *(w.spec for w in workers))) else jobs


def _start(context: Any, spec: Run, session: Session, slot: int, redo: bool) -> _Worker:
    receiver, sender = context.Pipe(duplex=False)
    # Not a daemon: those may not start loader processes.
    process = context.Process(target=_work, args=(sender, spec, session, slot, redo))
    process.start()
    sender.close()
    return _Worker(process, receiver, spec, slot)


def _work(reports: Connection, spec: Run, session: Session, slot: int, redo: bool) -> None:
    """In the worker: train one run, report its progress, and say in the exit status how it ended."""
    stopping = Flag()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stopping.set)
    if spec.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible_gpu(slot)
    from experiments.harness.work.execute import execute

    last = 0.0

    def report(step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            try:
                reports.send(step / steps)
            except OSError:  # the pool is gone, and with it the reader of this run's result
                stopping.set()

    session = replace(session, report=report, stop=stopping.is_set)
    try:
        while not stopping.is_set():
            try:
                execute(spec, session, redo=redo)
                return
            except RunLocked:  # another command trains it: wait for its result
                time.sleep(REPORT_SECONDS)
        sys.exit(INTERRUPTED)
    except Interrupted:
        sys.exit(INTERRUPTED)
    except Exception:
        reports.send(traceback.format_exc())
        sys.exit(1)


def _visible_gpu(slot: int) -> str:
    """The slot's GPU among those this process was given."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[slot] if given else str(slot)


def _receive(worker: _Worker) -> None:
    """Take in what the worker has sent: a fraction done, or a traceback."""
    try:
        while not worker.silent and worker.reports.poll():
            message = worker.reports.recv()
            if isinstance(message, str):
                worker.failure = message
            else:
                worker.fraction = message
    except (EOFError, OSError):
        worker.silent = True


def _close(worker: _Worker, outcome: Outcome, root: Path, stopping: bool) -> None:
    worker.process.join()
    worker.reports.close()
    code = worker.process.exitcode
    if code == 0:
        outcome.trained.append(worker.spec)
        return
    if (code == INTERRUPTED and stopping) or (worker.asked_to_stop and worker.failure is None):
        return  # the latter: stopped before it had begun to listen for signals
    if code == INTERRUPTED:
        outcome.failed[worker.spec] = (
            "A signal from outside stopped this run; its checkpoint is written. Run the same command again to "
            "resume it."
        )
        return
    if worker.failure is None:
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
        worker.failure = (
            f"The worker process ended early ({name}), possibly out of memory. "
            "Run the same command again to resume it from its last checkpoint."
        )
        record_of(worker.spec, root).fail(worker.failure)
    outcome.failed[worker.spec] = worker.failure


def _ask_to_stop(worker: _Worker) -> None:
    worker.asked_to_stop = True
    assert worker.process.pid is not None
    try:
        os.kill(worker.process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return


@contextmanager
def _stop_on_signals() -> Iterator[Flag]:
    """A flag that Ctrl-C or SIGTERM sets; a second Ctrl-C ends this process at once."""
    stopping = Flag()

    def stop(number: int, frame: Any) -> None:
        stopping.set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        os.write(2, b"\nStopping: each run writes its checkpoint (Ctrl-C again to drop them).\n")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _killed_at_the_end(workers: Sequence[_Worker]) -> Iterator[None]:
    """No worker outlives the block, even one that a second Ctrl-C ends."""
    try:
        yield
    finally:
        for worker in workers:
            worker.process.kill()


@contextmanager
def _worker_environment(specs: Sequence[Run]) -> Iterator[None]:
    """Set `library_settings` for the block, before the workers' server starts."""
    settings = library_settings(specs)
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
