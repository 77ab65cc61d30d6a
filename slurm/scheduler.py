"""Questions to Slurm: its queue, the fates of jobs that left it, its limits. Standard library only."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from experiments.harness.runs.spec import SpecError

GONE = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "TIMEOUT"),
)
"""States of jobs that have ended for good; a job that is queued again after a preemption is PENDING."""


class SlurmError(SpecError):
    """Slurm is not there, does not answer, or refuses. The message says what to do."""


@dataclass(frozen=True)
class Job:
    """One job or array task, as Slurm has it."""

    id: str
    """"12", or "12_3" for a task of an array."""
    state: str
    name: str = ""
    reason: str = ""
    """Why it waits."""

    @property
    def active(self) -> bool:
        """Whether it waits, runs or ends; an array task that has ended stays known to Slurm for a while."""
        return self.state not in GONE

    @property
    def running(self) -> bool:
        """Whether its processes are there."""
        return self.state in ("RUNNING", "COMPLETING", "SUSPENDED")


def queue(users: Iterable[str]) -> dict[str, Job]:
    """These users' jobs that squeue knows, by id.

    Raises:
        SlurmError: if there is no squeue, or it does not answer.
    """
    whose = f"--user={','.join(sorted(set(users)))}"
    answer = _call(["squeue", "--noheader", "--array", whose, "--states=all", "--format=%i|%T|%j|%r"])
    jobs = (line.split("|", 3) for line in answer.splitlines() if line.strip())
    return {id_: Job(id_, state, name, reason) for id_, state, name, reason in jobs}


def fates(ids: Iterable[str]) -> dict[str, str]:
    """What accounting says became of jobs; nothing where there is no accounting."""
    arrays = sorted({id_.split("_")[0] for id_ in ids})
    if not arrays or shutil.which("sacct") is None:
        return {}
    try:
        answer = _call(["sacct", "--noheader", "--parsable2", "--format=JobID,State", "--jobs", ",".join(arrays)])
    except SlurmError:
        return {}
    found = {}
    for id_, _, state in (line.partition("|") for line in answer.splitlines()):
        if "." in id_ or not state:
            continue  # a step of a job
        array, _, tasks = id_.partition("_")
        for task in _expanded(tasks.strip("[]").partition("%")[0]) if tasks else [""]:
            found[f"{array}_{task}" if task else array] = state.split()[0]
    return found


def _expanded(tasks: str) -> list[str]:
    """Of "1,3-5": 1, 3, 4 and 5."""
    ends = [part.partition("-") for part in tasks.split(",")]
    return [str(task) for first, dash, last in ends for task in range(int(first), int(last if dash else first) + 1)]


def largest_array() -> int:
    """How many tasks an array may have; asking is also how to find out that there is a Slurm.

    Raises:
        SlurmError: if this machine has none, or it does not answer.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError("This machine has no Slurm (sbatch is not on the PATH).")
    try:
        config = _call(["scontrol", "show", "config"])
    except SlurmError as error:
        raise SlurmError(f"Slurm does not answer on this machine ({error})") from None
    found = [line.partition("=")[2] for line in config.splitlines() if line.startswith("MaxArraySize")]
    return max(1, int(found[0])) if found else 1001


def test_only(script: str) -> str:
    """What `sbatch --test-only` says to a script.

    Raises:
        SlurmError: with sbatch's own words, if it refuses.
    """
    with outside_of_any_job():
        return _call(["sbatch", "--test-only"], words="sbatch refuses these jobs", text=script).strip()


def cancel(ids: Sequence[str]) -> None:
    """Ask Slurm to end jobs; whichever it no longer knows are left out silently."""
    for first in range(0, len(ids), 200):
        _call(["scancel", "--quiet", *ids[first : first + 200]])


@contextmanager
def outside_of_any_job() -> Iterator[None]:
    """Hide from sbatch the job that this process runs in, whose variables it would take for flags.

    Outside of a job nothing is hidden: there SBATCH_ variables are the user's own wishes.
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
        raise SlurmError(f"{command[0]} cannot be run ({error.strerror}): go to a machine of the cluster.") from error
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} has not answered for a minute: try again when Slurm does.") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise SlurmError(f"{words or command[0] + ' failed'}: {said}")
    return done.stdout or done.stderr
