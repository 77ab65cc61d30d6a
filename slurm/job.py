"""The code that runs inside a job: it trains some runs one after the other, with the usual training loop.

A run resumes from its record alone. So a job that is asked to stop writes checkpoints and asks Slurm to requeue it; a
restart after a node failure or an administrator's requeue works the same way. Signal handlers are set before torch is
imported.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.harness.runs.files import read_json, write_json
from experiments.harness.runs.process import Flag
from experiments.harness.runs.provenance import code_hash, machine
from experiments.harness.runs.record import RunLocked, record_of
from experiments.harness.runs.spec import Run, from_dict
from experiments.harness.work.session import Interrupted, Session
from slurm.resources import SIGNAL_SECONDS
from slurm.scheduler import state_of_job

PACKAGES = ("msam", "experiments", "slurm")
"""The code that jobs run, which a submission copies."""

START_SECONDS = 600
"""How long the ranks of a run wait for each other to start."""


class RunsFailed(Exception):
    """Some runs of the job failed; their tracebacks are in the log above and in their records."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The runs of one job. submitit pickles it at submission and calls it in every process of the job."""

    results: str
    data_root: str | None
    submitted: Mapping[str, Any]
    """Provenance from the submission: `provenance.checkout`."""
    code: str
    """Hash of the submitted code, which this process must have loaded."""
    runs: tuple[Mapping[str, Any], ...] = ()
    """The runs of this job, which it trains one after the other."""
    minutes: int = 0
    """The job's time limit."""

    def __call__(self) -> None:
        """Train the runs that are not done.

        Raises:
            RunsFailed: at the end, if any of them failed; the other runs are trained.
        """
        # USR2 comes before the time limit or a preemption. TERM comes with scancel, or with a preemption on clusters
        # that send no other signal; in that case Slurm itself requeues the job.
        requeue, ending, stepped = Flag(), Flag(), Flag()
        signal.signal(signal.SIGUSR2, requeue.set)
        signal.signal(signal.SIGTERM, ending.set)
        started = time.monotonic()
        specs = [from_dict(fields) for fields in self.runs]
        if code_hash(folders=PACKAGES) != self.code:
            raise RunsFailed(f"The code in {Path.cwd()} has changed since it was submitted: submit again.")
        if specs[0].processes > 1:
            _join(specs[0], Path(self.results))
        provenance = {**self.submitted, **machine(), **_job()}
        where = f"job {provenance['slurm_job']}, requeued {provenance['requeues']} times"
        print(f"{len(specs)} runs in {where}", flush=True)
        session = Session(
            Path(self.results),
            Path(self.data_root) if self.data_root else None,
            provenance,
            report=stepped.set,
            stop=lambda: requeue.is_set() or ending.is_set(),
        )
        failed = 0
        for spec in specs:
            print(f"{spec.run_id}  {spec.title}", flush=True)
            try:
                self._train(spec, session, requeue)
            except Interrupted as stopped:
                print(stopped, flush=True)
                late = time.monotonic() - started > 60 * self.minutes - SIGNAL_SECONDS - 90
                if late and not stepped.is_set() and _rank() == 0:
                    words = f"the run completed no step in {self.minutes} minutes: submit with more --minutes."
                    record_of(spec, session.root).fail(words)
                    raise RunsFailed(f"{spec.run_id}: {words}") from None
                _leave(requeue)
            except Exception as error:
                if spec.processes > 1:
                    raise  # the other ranks are waiting for this one, so end the job
                print(f"FAILED {spec.run_id}", file=sys.stderr)
                traceback.print_exception(error)
                failed += 1
        if failed:
            raise RunsFailed(f"{failed} of {len(specs)} runs failed; see the errors above.")

    def _train(self, spec: Run, session: Session, requeue: Flag) -> None:
        """Execute one run; if another process is working on it, wait for its result."""
        from experiments.harness.work.execute import execute

        while True:
            try:
                return execute(spec, session)
            except RunLocked:
                if session.stop():
                    _leave(requeue)
                time.sleep(1)


def perform(work: Work) -> None:
    """The function that submitit calls."""
    work()


def _leave(requeue: Flag) -> None:
    """End this process; first requeue the job if Slurm announced its end with USR2.

    The process waits until Slurm kills it or no longer lists the job as running. A job that exits within the grace
    period of a preemption counts as finished and is not requeued. Only rank 0 talks to Slurm; the others end with it.
    """
    job, first, queued = _job()["slurm_job"], _rank() == 0, False
    until = time.monotonic() + 900
    while time.monotonic() < until:
        if first and requeue.is_set() and not queued:  # rank 0 may get the signal later than another rank
            queued = _slurm_output(["scontrol", "requeue", job]) is not None
        state = state_of_job(job) if first else None
        if state not in (None, "RUNNING"):
            break
        time.sleep(1 if requeue.is_set() and not queued else random.uniform(1, 3))
    print("Requeued." if queued else "Ended by Slurm.", flush=True)
    sys.exit(128 + signal.SIGTERM)


def _slurm_output(command: list[str]) -> str | None:
    """The output of a Slurm command; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _job() -> dict[str, Any]:
    """The job's id, nodes and requeue count, for the record."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return {
        "slurm_job": f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"],
        "slurm_nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "requeues": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }


def _rank() -> int:
    return int(os.environ.get("SLURM_PROCID", 0))


def _join(spec: Run, results: Path) -> None:
    """Connect the job's processes as the ranks of a run.

    Rank 0 picks a free port and writes it to a file in the shared folder, which the other ranks read. So host names
    need not resolve, and two jobs on one node cannot use the same port.
    """
    import torch
    import torch.distributed as dist

    rank = _rank()
    job = _job()
    address_file = results / "slurm" / "ranks" / f"{job['slurm_job']}-{job['requeues']}.json"
    if rank == 0:
        host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or socket.gethostname()
        store = dist.TCPStore(host, 0, spec.processes, is_master=True, wait_for_workers=False)
        address_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(address_file, {"host": host, "port": store.port})
    else:
        until = time.monotonic() + START_SECONDS
        while not address_file.exists():
            if time.monotonic() > until:
                raise RunsFailed(f"Rank 0 has not written {address_file}: the results folder must be on a shared disk.")
            time.sleep(0.1)
        place = read_json(address_file)
        store = dist.TCPStore(place["host"], place["port"], spec.processes, is_master=False, wait_for_workers=False)
    if spec.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("SLURM_LOCALID", 0)))
    dist.init_process_group(
        "nccl" if spec.device == "cuda" else "gloo", store=store, rank=rank, world_size=spec.processes
    )
    dist.barrier()
    if rank == 0:
        address_file.unlink()  # Slurm may reuse job ids
