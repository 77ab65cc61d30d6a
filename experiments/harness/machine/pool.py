"""Runs many specs on the cores or GPUs of one machine: one process per run, with live progress.

Each run has a separate process, so a run that fails, runs out of memory or is killed does not affect the others.
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
from experiments.harness.runs.spec import Run, SpecError, Timing
from experiments.harness.work.session import Interrupted, Session

REPORT_SECONDS = 0.5
"""Shortest time between a worker's progress reports."""

INTERRUPTED = 130
"""Exit status of a worker that was stopped after it wrote its checkpoint."""


@dataclass
class Outcome:
    """The outcome of all runs of a pool."""

    trained: list[Run] = field(default_factory=list)
    failed: dict[Run, str] = field(default_factory=dict)
    """Each failed run with its traceback, or with how its process ended."""
    interrupted: bool = False
    out_of_time: bool = False
    """Whether runs were stopped, or not started, because the time was over."""


@dataclass(frozen=True)
class Limits:
    """How much of the machine the runs of a pool may use."""

    jobs: int
    """Number of workers."""
    per_gpu: int = 1
    """Number of workers that share each GPU."""
    ends: float | None = None
    """When all runs are asked to stop, as `time.monotonic` counts."""

    def gpu(self, slot: int) -> int:
        """The GPU of a worker: the first runs go to different ones."""
        return slot % -(-self.jobs // self.per_gpu)

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return self.ends is not None and time.monotonic() >= self.ends


def limits(device: str, jobs: int | None, per_gpu: int, minutes: float | None, started: float) -> Limits:
    """The limits that a command line asks for.

    Args:
        device: The device of the runs.
        jobs: Number of workers; None: one per core, or `per_gpu` per GPU.
        per_gpu: Number of workers that share each GPU.
        minutes: How long the command may take; None: as long as it needs.
        started: When the command started, as `time.monotonic` counts.

    Raises:
        SpecError: for values that make no sense, or more workers than the GPUs take.
    """
    if minutes is not None and not minutes > 0:
        raise SpecError(f"minutes is {minutes:g}, but must be greater than 0.")
    if per_gpu < 1:
        raise SpecError(f"per_gpu is {per_gpu}, but must be 1 or more.")
    most = default_jobs(device, per_gpu)
    if device == "cuda" and (jobs or 0) > most:
        raise SpecError(f"jobs is {jobs}, but must be at most {most}, the GPUs times per_gpu.")
    return Limits(jobs or most, per_gpu, None if minutes is None else started + 60 * minutes)


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    reports: Connection
    spec: Run
    slot: int
    fraction: float = 0.0
    failure: str | None = None
    pipe_closed: bool = False
    """Whether the worker has closed its end of the pipe, so that only its process is left to wait for."""
    asked_to_stop: bool = False


def run(
    specs: Sequence[Run],
    session: Session,
    limits: Limits,
    *,
    estimate: Estimate,
    redo: bool = False,
) -> Outcome:
    """Train the specs, several at a time, and show progress. Ctrl-C or SIGTERM stops all of them cleanly.

    Args:
        specs: Runs that are not done.
        session: The folders of records and data; workers replace its `report` and `stop`.
        limits: Number of workers, and how long they may work.
        estimate: Expected seconds of each run, for the progress bar.
        redo: Retrain the specs; each keeps its old result until it restarts.

    Returns:
        Which runs were trained, and which failed and why.
    """
    context = multiprocessing.get_context("forkserver")
    texts = any(isinstance(DATASETS[spec.dataset], TextSet) for spec in specs)
    domains = ["experiments.harness.tasks.texts"] if texts else []
    domains += sorted({f"experiments.harness.{spec.module}" for spec in specs})
    context.set_forkserver_preload(["experiments.harness.machine.worker", *domains])
    workers: list[_Worker] = []
    waiting, outcome = list(specs), Outcome()
    display = Display(specs, estimate, limits.jobs)
    with _stop_on_signals() as stopping, _worker_environment(specs), _killed_at_the_end(workers):
        while workers or (waiting and not stopping.is_set()):
            if limits.over and not stopping.is_set():
                outcome.out_of_time = True
                stopping.set()
            while waiting and len(workers) < _max_workers(waiting[0], workers, limits.jobs) and not stopping.is_set():
                taken = {worker.slot for worker in workers}
                slot = next(i for i in range(limits.jobs) if i not in taken)
                workers.append(_start(context, waiting.pop(0), session, (slot, limits.gpu(slot)), redo))
            listening = [w.reports for w in workers if not w.pipe_closed]
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
        outcome.interrupted = stopping.is_set() and not outcome.out_of_time
    display.close()
    return outcome


def default_jobs(device: str, per_gpu: int = 1) -> int:
    """One worker per core that this process may use, or `per_gpu` per GPU."""
    if device == "cpu":
        return cores()
    import torch

    return per_gpu * torch.cuda.device_count()


def _max_workers(spec: Run, workers: Sequence[_Worker], jobs: int) -> int:
    """The most workers at a time if this run is one of them: a timing run needs the machine to itself."""
    return 1 if any(isinstance(s, Timing) for s in (spec, *(w.spec for w in workers))) else jobs


def _start(context: Any, spec: Run, session: Session, place: tuple[int, int], redo: bool) -> _Worker:
    slot, gpu = place
    receiver, sender = context.Pipe(duplex=False)
    # Not a daemon process, because daemons may not start loader processes.
    process = context.Process(target=_work, args=(sender, spec, session, gpu, redo))
    process.start()
    sender.close()
    return _Worker(process, receiver, spec, slot)


def _work(reports: Connection, spec: Run, session: Session, gpu: int, redo: bool) -> None:
    """In the worker: train one run and report its progress; the exit status says how it ended."""
    stopping = Flag()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stopping.set)
    if spec.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible_gpu(gpu)
    from experiments.harness.work.execute import execute

    last = 0.0

    def report(step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            try:
                reports.send(step / steps)
            except OSError:  # the pool has died, so nobody waits for this run
                stopping.set()

    session = replace(session, report=report, stop=stopping.is_set)
    try:
        while not stopping.is_set():
            try:
                execute(spec, session, redo=redo)
                return
            except RunLocked:  # another command is training it: wait for the result
                time.sleep(REPORT_SECONDS)
        sys.exit(INTERRUPTED)
    except Interrupted:
        sys.exit(INTERRUPTED)
    except Exception:
        reports.send(traceback.format_exc())
        sys.exit(1)


def _visible_gpu(gpu: int) -> str:
    """The name of a GPU, counted among those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[gpu] if visible else str(gpu)


def _receive(worker: _Worker) -> None:
    """Read the worker's messages: the fraction done, or a traceback."""
    try:
        while not worker.pipe_closed and worker.reports.poll():
            message = worker.reports.recv()
            if isinstance(message, str):
                worker.failure = message
            else:
                worker.fraction = message
    except (EOFError, OSError):
        worker.pipe_closed = True


def _close(worker: _Worker, outcome: Outcome, root: Path, stopping: bool) -> None:
    worker.process.join()
    worker.reports.close()
    code = worker.process.exitcode
    if code == 0:
        outcome.trained.append(worker.spec)
        return
    if (code == INTERRUPTED and stopping) or (worker.asked_to_stop and worker.failure is None):
        return  # the second case: stopped before its signal handlers were set
    if code == INTERRUPTED:
        outcome.failed[worker.spec] = (
            "A signal from outside stopped this run after its checkpoint. Run the same command again to resume it."
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
        os.write(2, b"\nStopping: each run writes its checkpoint (Ctrl-C again to stop without checkpoints).\n")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _killed_at_the_end(workers: Sequence[_Worker]) -> Iterator[None]:
    """Kill the remaining workers when the block ends, even if a second Ctrl-C ends it."""
    try:
        yield
    finally:
        for worker in workers:
            worker.process.kill()


@contextmanager
def _worker_environment(specs: Sequence[Run]) -> Iterator[None]:
    """Set `library_settings` within the block, before the fork server starts."""
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
