"""What runs inside a job: some runs one after the other, each through the one training loop.

Everything a run needs to go on lies in its record, so a job that is asked to stop writes checkpoints and asks Slurm to
queue it again; whatever else ends it (a node's failure, an administrator's requeue) is mended by the same restart.
Torch is not imported before the signals have their handlers.
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

PACKAGES = ("msam", "experiments", "slurm")
"""The code that jobs run: what a submission copies."""

RENDEZVOUS_SECONDS = 600
"""How long the ranks of a run wait for the last of them to start."""


class RunsFailed(Exception):
    """Some runs of the job failed; their tracebacks are above, and in their records."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The runs of one job. submitit pickles it at submission and calls it in every process of the job."""

    results: str
    data_root: str | None
    submitted: Mapping[str, Any]
    """Provenance from the submission: `provenance.checkout`."""
    code: str
    """Hash of all code that was submitted, which this process must have loaded."""
    runs: tuple[Mapping[str, Any], ...] = ()
    """The job's own, one after the other."""
    minutes: int = 0
    """The job's time limit."""

    def __call__(self) -> None:
        """Train the runs that are not done.

        Raises:
            RunsFailed: at the end, if any of them failed; the others have been trained.
        """
        # USR2 comes ahead of the time limit or of a preemption; TERM with scancel, or with a preemption on clusters
        # that send nothing else, and then Slurm itself queues the job again.
        requeue, ending, stepped = Flag(), Flag(), Flag()
        signal.signal(signal.SIGUSR2, requeue.set)
        signal.signal(signal.SIGTERM, ending.set)
        begun = time.monotonic()
        specs = [from_dict(fields) for fields in self.runs]
        if code_hash(folders=PACKAGES) != self.code:
            raise RunsFailed(f"{Path.cwd()} is no longer the code that was submitted: submit again.")
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
                late = time.monotonic() - begun > 60 * self.minutes - SIGNAL_SECONDS - 90
                if late and not stepped.is_set() and _rank() == 0:
                    words = f"not one step was made in {self.minutes} minutes: submit with more --minutes."
                    record_of(spec, session.root).fail(words)
                    raise RunsFailed(f"{spec.run_id}: {words}") from None
                _leave(requeue)
            except Exception as error:
                if spec.processes > 1:
                    raise  # the other ranks wait for this one: end the job
                print(f"FAILED {spec.run_id}", file=sys.stderr)
                traceback.print_exception(error)
                failed += 1
        if failed:
            raise RunsFailed(f"{failed} of {len(specs)} runs failed, with the errors above.")

    def _train(self, spec: Run, session: Session, requeue: Flag) -> None:
        """Carry out one run; if another process is at work on it, wait for its result."""
        from experiments.harness.work.execute import execute

        while True:
            try:
                return execute(spec, session)
            except RunLocked:
                if session.stop():
                    _leave(requeue)
                time.sleep(1)


def perform(work: Work) -> None:
    """What submitit calls."""
    work()


def _leave(requeue: Flag) -> None:
    """End this process: queued again if Slurm announced the end; as Slurm wishes if it is ending the job itself.

    Until Slurm ends it, or no longer counts the job as running: whoever leaves within the grace of a preemption
    would look finished, and would not be queued again. Rank 0 speaks for all; the others go when it goes.
    """
    job, first, queued = _job()["slurm_job"], _rank() == 0, False
    until = time.monotonic() + 900
    while time.monotonic() < until:
        if first and requeue.is_set() and not queued:  # another rank may have had the signal before this one
            queued = _asked(["scontrol", "requeue", job]) is not None
        state = _asked(["squeue", "--noheader", "--jobs", job, "--format=%T"]) if first else None
        if state not in (None, "RUNNING"):
            break
        time.sleep(1 if requeue.is_set() and not queued else random.uniform(1, 3))
    print("Queued again." if queued else "Ended by Slurm.", flush=True)
    sys.exit(128 + signal.SIGTERM)


def _asked(command: list[str]) -> str | None:
    """What a command of Slurm answers; None if it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _job() -> dict[str, Any]:
    """Which job this is, for the record."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return {
        "slurm_job": f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"],
        "slurm_nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        "requeues": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }


def _rank() -> int:
    return int(os.environ.get("SLURM_PROCID", 0))


def _join(spec: Run, results: Path) -> None:
    """Bring the job's processes together as the ranks of a run.

    Rank 0 takes a free port and writes it to a file of the shared folder for the others: nodes need not know each
    other's names, and two jobs on one node cannot meet.
    """
    import torch
    import torch.distributed as dist

    rank = _rank()
    job = _job()
    meeting = results / "slurm" / "ranks" / f"{job['slurm_job']}-{job['requeues']}.json"
    if rank == 0:
        host = os.environ.get("SLURM_LAUNCH_NODE_IPADDR") or socket.gethostname()
        store = dist.TCPStore(host, 0, spec.processes, is_master=True, wait_for_workers=False)
        meeting.parent.mkdir(parents=True, exist_ok=True)
        write_json(meeting, {"host": host, "port": store.port})
    else:
        until = time.monotonic() + RENDEZVOUS_SECONDS
        while not meeting.exists():
            if time.monotonic() > until:
                raise RunsFailed(f"Rank 0 has not written {meeting}: the results folder must be on a shared disk.")
            time.sleep(0.1)
        place = read_json(meeting)
        store = dist.TCPStore(place["host"], place["port"], spec.processes, is_master=False, wait_for_workers=False)
    if spec.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("SLURM_LOCALID", 0)))
    dist.init_process_group(
        "nccl" if spec.device == "cuda" else "gloo", store=store, rank=rank, world_size=spec.processes
    )
    dist.barrier()
    if rank == 0:
        meeting.unlink()  # a cluster may reuse job numbers
