"""Queries to Slurm: the queue, the final states of ended jobs, limits. Standard library only."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from experiments.harness.runs.spec import SpecError

ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "TIMEOUT"),
)
"""States of jobs that have ended for good; a job that is requeued after a preemption is PENDING."""


class SlurmError(SpecError):
    """Slurm is missing, does not answer, or rejects a request. The message says what to do."""


@dataclass(frozen=True)
class Job:
    """One job or array task, as Slurm lists it."""

    id: str
    """"12", or "12_3" for a task of an array."""
    state: str
    name: str = ""
    reason: str = ""
    """Why it is waiting."""

    @property
    def active(self) -> bool:
        """Whether it is waiting, running or completing; Slurm lists ended array tasks for a while."""
        return self.state not in ENDED

    @property
    def running(self) -> bool:
        """Whether its processes exist."""
        return self.state in ("RUNNING", "COMPLETING", "SUSPENDED")


def queue(users: Iterable[str]) -> dict[str, Job]:
    """These users' jobs in squeue, by id.

    Raises:
        SlurmError: if squeue is missing or does not answer.
    """
    user = f"--user={','.join(sorted(set(users)))}"
    output = _call(["squeue", "--noheader", "--array", user, "--states=all", "--format=%i|%T|%j|%r"])
    jobs = (line.split("|", 3) for line in output.splitlines() if line.strip())
    return {id_: Job(id_, state, name, reason) for id_, state, name, reason in jobs}


def final_states(ids: Iterable[str]) -> dict[str, str]:
    """The final states of jobs from accounting; empty if there is no accounting."""
    arrays = sorted({id_.split("_")[0] for id_ in ids})
    if not arrays or shutil.which("sacct") is None:
        return {}
    try:
        output = _call(["sacct", "--noheader", "--parsable2", "--format=JobID,State", "--jobs", ",".join(arrays)])
    except SlurmError:
        return {}
    states = {}
    for id_, _, state in (line.partition("|") for line in output.splitlines()):
        if "." in id_ or not state:
            continue  # a step of a job
        array, _, tasks = id_.partition("_")
        for task in _expanded(tasks.strip("[]").partition("%")[0]) if tasks else [""]:
            states[f"{array}_{task}" if task else array] = state.split()[0]
    return states


def _expanded(tasks: str) -> list[str]:
    """Expand "1,3-5" to 1, 3, 4 and 5."""
    ends = [part.partition("-") for part in tasks.split(",")]
    return [str(task) for first, dash, last in ends for task in range(int(first), int(last if dash else first) + 1)]


def largest_array() -> int:
    """Most tasks that an array may have. This call also checks that Slurm is available.

    Raises:
        SlurmError: if this machine has no Slurm, or it does not answer.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError("This machine has no Slurm (sbatch is not on the PATH).")
    try:
        config = _call(["scontrol", "show", "config"])
    except SlurmError as error:
        raise SlurmError(f"Slurm does not answer on this machine ({error})") from None
    sizes = [line.partition("=")[2] for line in config.splitlines() if line.startswith("MaxArraySize")]
    return max(1, int(sizes[0])) if sizes else 1001


def test_only(script: str) -> str:
    """The output of `sbatch --test-only` for a script.

    Raises:
        SlurmError: with sbatch's message, if it rejects the script.
    """
    with without_job_variables():
        return _call(["sbatch", "--test-only"], words="sbatch rejects these jobs", text=script).strip()


def cancel(ids: Sequence[str]) -> None:
    """Ask Slurm to cancel jobs; jobs that have already ended are ignored."""
    for first in range(0, len(ids), 200):
        _call(["scancel", "--quiet", *ids[first : first + 200]])


@contextmanager
def without_job_variables() -> Iterator[None]:
    """Hide the variables of the job that this process runs in, which sbatch would read as options.

    Outside a job nothing is hidden: there SBATCH_ variables are the user's own options.
    """
    prefixes = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_") if "SLURM_JOB_ID" in os.environ else ()
    hidden = {
        name: os.environ.pop(name) for name in list(os.environ) if name.startswith(prefixes) and name != "SLURM_CONF"
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def _call(command: Sequence[str], words: str = "", text: str | None = None) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run ({error.strerror}): use a machine of the cluster.") from error
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within a minute: try again when Slurm answers.") from None
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise SlurmError(f"{words or command[0] + ' failed'}: {message}")
    return done.stdout or done.stderr
