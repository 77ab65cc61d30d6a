"""Queries to Slurm: the queue, the final states of ended jobs, limits. Standard library only.

Sites print more than what was asked for: banners, or a line for each cluster where SLURM_CLUSTERS names several. So
every query asks for a marker in each line. Other lines are ignored, and logged unless they only name a cluster.
"""

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from experiments.harness.runs.files import printable
from experiments.harness.runs.spec import SpecError

log = logging.getLogger(__name__)

MARK = "|msam-job|"
"""What begins a line of squeue, and what separates the fields of sacct."""

JOB_NAME = "msam-"
"""How the names of this project's jobs begin."""

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
    output = _call(["squeue", "--noheader", "--array", user, "--states=all", f"--format={MARK}%i|%T|%j|%r"])
    jobs: dict[str, Job] = {}
    for line in output.splitlines():
        parts = line.strip().removeprefix(MARK).split("|", 3)
        ids = _task_ids(parts[0]) if line.strip().startswith(MARK) and len(parts) == 4 else []
        if not ids:
            _show_unread("squeue", line)
        for id_ in ids:  # clusters number their jobs separately, so another cluster may have a job of this id
            if not (id_ in jobs and jobs[id_].name.startswith(JOB_NAME)):
                jobs[id_] = Job(id_, parts[1].split()[0] if parts[1].strip() else "", *parts[2:])
    return jobs


def state_of_job(job: str) -> str | None:
    """The state of one job in squeue, empty if it is not listed; None if squeue cannot be queried."""
    try:
        output = _call(["squeue", "--noheader", "--jobs", job, f"--format={MARK}%T"])
    except SlurmError:
        return None
    states = [line.strip().removeprefix(MARK) for line in output.splitlines() if line.strip().startswith(MARK)]
    return states[0] if states else ""


def final_states(ids: Iterable[str]) -> dict[str, str]:
    """The final states of jobs from accounting; empty if there is no accounting."""
    arrays = sorted({id_.split("_")[0] for id_ in ids})
    if not arrays or shutil.which("sacct") is None:
        return {}
    try:
        what = ("--parsable2", f"--delimiter={MARK}", "--format=JobID,State", "--jobs", ",".join(arrays))
        output = _call(["sacct", "--noheader", *what])
    except SlurmError:
        return {}
    states: dict[str, str] = {}
    for line in output.splitlines():
        id_, mark, state = line.strip().partition(MARK)
        if mark and "." in id_:
            continue  # a step of a job
        ids = _task_ids(id_) if mark and state.split() else []
        if not ids:
            _show_unread("sacct", line)
        states |= dict.fromkeys(ids, state.split()[0].rstrip("+") if ids else "")
    return states


def _task_ids(listed: str) -> list[str]:
    """The ids that Slurm lists as one: "12", "12_3", or "12_[1,3-5,10-20:5%2]"; empty for anything else."""
    match = re.fullmatch(r"(\d+)(?:_(?:(\d+)|\[([\d,:-]+)(?:%\d+)?\]))?", listed.strip())
    if match is None:
        return []
    array, task, tasks = match.groups()
    if tasks is None:
        return [array if task is None else f"{array}_{task}"]
    numbers: list[int] = []
    for part in tasks.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if bounds is None:
            return []
        first, last, step = bounds.groups()
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return [f"{array}_{number}" for number in numbers]


def _show_unread(command: str, line: str) -> None:
    if line.strip() and not line.startswith("CLUSTER:"):
        log.warning("%s printed a line that is no job, which is ignored: %s", command, printable(line.strip()[:200]))


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
    sizes = [int(size) for size in re.findall(r"^MaxArraySize\s*=\s*(\d+)\s*$", config, re.MULTILINE)]
    return max(1, min(sizes, default=1001))


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
        environment = {**os.environ, "SLURM_BITSTR_LEN": "0"}  # array tasks are listed without an ellipsis
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, env=environment)
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run ({error.strerror}): use a machine of the cluster.") from error
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within a minute: try again when Slurm answers.") from None
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise SlurmError(f"{words or command[0] + ' failed'}: {message}")
    return done.stdout or done.stderr
