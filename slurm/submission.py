"""Packs runs into jobs and submits them, with a record of each submission on disk.

results/slurm/<name>/submission.json   which run is in which job; written before sbatch, and again with the job ids
results/slurm/<name>/*_log.out         one log per process of a job
results/slurm/code/<hash>/             the submitted code, once per version
"""

import fcntl
import getpass
import logging
import math
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.harness.runs.estimate import Estimate
from experiments.harness.runs.files import write_json
from experiments.harness.runs.process import library_settings
from experiments.harness.runs.provenance import ROOT, code_hash
from experiments.harness.runs.spec import Run
from slurm import scheduler
from slurm.job import PACKAGES, Work, perform
from slurm.resources import SIGNAL_SECONDS, Resources, resources
from slurm.scheduler import SlurmError
from slurm.site import Site

FREE_MEGABYTES = 200
"""Free space on the results folder's disk that a submission needs."""

PROBE_MEGABYTES = 4
"""Size of a file that is written and removed before a submission, to detect a full quota."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Array:
    """Jobs of equal size, submitted together."""

    jobs: tuple[tuple[Run, ...], ...]
    """The runs of each job, which it trains one after the other."""
    size: Resources
    """Resources of one process."""
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """Number of processes of each job."""
        return self.jobs[0][0].processes


def arrays(
    specs: Sequence[Run],
    estimate: Estimate,
    *,
    largest: int = 1001,
    runs_per_job: int = 1,
    nodes: int = 1,
    minutes: int | None = None,
) -> list[Array]:
    """Pack runs into jobs with equal resources, and jobs into arrays of at most `largest` jobs.

    Jobs with the most ranks come first, so a cluster rejects what it cannot run before anything is queued.

    Raises:
        SlurmError: if the ranks of a run cannot be divided equally among the nodes.
    """
    groups: dict[tuple, list[tuple[Run, Resources]]] = {}
    for spec in specs:
        size = resources(spec, estimate, minutes)
        if spec.processes % nodes and spec.processes > 1:
            raise SlurmError(f"nodes is {nodes}, but must divide the {spec.processes} ranks of {spec.title}.")
        groups.setdefault((replace(size, minutes=0), spec.processes, spec.threads), []).append((spec, size))
    packed = []
    for group in sorted(groups.values(), key=lambda group: -group[0][0].processes):
        jobs = [
            tuple(spec for spec, _ in group[first : first + runs_per_job])
            for first in range(0, len(group), runs_per_job)
        ]
        size = replace(group[0][1], minutes=runs_per_job * max(size.minutes for _, size in group))
        for first in range(0, len(jobs), largest):
            several = jobs[0][0].processes > 1
            packed.append(Array(tuple(jobs[first : first + largest]), size, nodes if several else 1))
    return packed


def submit(
    chosen: Sequence[Array], work: Work, site: Site, *, code: Path, parallelism: int | None = None
) -> tuple[Path, list[str]]:
    """Submit jobs to Slurm; returns when they are queued.

    Args:
        chosen: The jobs.
        work: What the jobs share; its results root must be on a disk that all nodes can access.
        site: The cluster's settings.
        code: The code that they run, from `snapshot`.
        parallelism: Most jobs to run at a time; None: no limit.

    Returns:
        The submission's folder, and the ids of its arrays.

    Raises:
        SlurmError: with sbatch's message, if it rejects an array; arrays before that one stay queued.
    """
    folder = _folder(Path(work.results))
    content: dict[str, Any] = {
        "user": getpass.getuser(),
        "arrays": [
            {
                "name": f"msam-{folder.name}-{number}",
                "ids": None,
                "runs": [[spec.run_id for spec in job] for job in array.jobs],
            }
            for number, array in enumerate(chosen)
        ],
    }
    write_json(folder / "submission.json", content)
    queued: list[str] = []
    for array, entry in zip(chosen, content["arrays"], strict=True):
        after = f"afterany:{queued[-1]}" if queued and parallelism else None
        executor = _executor(array, folder, site, code, entry["name"], parallelism)
        executor.update_parameters(dependency=after)
        try:
            with scheduler.without_job_variables():
                jobs = executor.map_array(perform, _work_of(array, work))
        except Exception as error:
            raise _submission_error(error, queued, folder, entry["name"]) from error
        entry["ids"] = [job.job_id for job in jobs]
        queued.append(jobs[0].job_id.split("_")[0])
        write_json(folder / "submission.json", content)
    return folder, queued


def script(array: Array, root: Path, site: Site, parallelism: int | None = None) -> str:
    """The sbatch script that `submit` would write for an array."""
    executor = _executor(array, root / "slurm" / "dry-run", site, root / "slurm" / "code", "msam", parallelism)
    if len(array.jobs) > 1:
        executor.parameters["map_count"] = len(array.jobs)
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Lock the results root during a submission, so that two commands do not submit the same runs.

    Raises:
        SlurmError: if it cannot be written, or its disk is nearly full.
    """
    folder = root / "slurm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")  # noqa: SIM115 (closed below)
        free = shutil.disk_usage(folder).free
        with open(folder / "room", "wb") as probe:  # a full quota shows only on writing
            probe.write(bytes(PROBE_MEGABYTES * 2**20))
        (folder / "room").unlink()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise SlurmError(
            f"{error.filename or folder} cannot be written ({error.strerror}): choose another results folder, on a "
            "disk that all nodes see, with --results."
        ) from error
    with file:
        if free < FREE_MEGABYTES * 2**20:
            raise SlurmError(
                f"The disk of {root} has {free / 2**20:.0f} MB free, but a submission needs {FREE_MEGABYTES} MB: free "
                "some space, or choose another results folder with --results."
            )
        yield


def snapshot(root: Path) -> Path:
    """Copy the code unless this version is already there, so that jobs run the code as it was submitted.

    Raises:
        SlurmError: if the code changes during the copy.
    """
    name = code_hash(folders=PACKAGES)
    folder = root / "slurm" / "code" / name
    if folder.is_dir() and code_hash(folder, PACKAGES) != name:  # partly purged, or edited
        folder.rename(folder.with_name(f"{name}-damaged-{secrets.token_hex(2)}"))
    if not folder.is_dir():
        with _atomic_folder(folder) as temporary:
            for package in PACKAGES:
                shutil.copytree(ROOT / package, temporary / package, ignore=shutil.ignore_patterns("__pycache__"))
            if code_hash(temporary, PACKAGES) != name:
                raise SlurmError("The code changed while it was copied: submit again.")
    return folder


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _folder(root: Path) -> Path:
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = root / "slurm" / name
    folder.mkdir(parents=True)
    return folder


def _executor(array: Array, folder: Path, site: Site, code: Path, name: str, parallelism: int | None) -> Any:
    """submitit's executor with all options for sbatch."""
    from submitit import SlurmExecutor

    class Anywhere(SlurmExecutor):
        """Writes scripts even without Slurm."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    size, on_node = array.size, array.ranks // array.nodes
    settings = library_settings([spec for job in array.jobs for spec in job])
    executor = Anywhere(folder, python=shlex.quote(sys.executable))
    executor.update_parameters(
        job_name=name,
        time=size.minutes,
        nodes=array.nodes,
        ntasks_per_node=on_node,
        cpus_per_task=size.cpus,
        mem=f"{math.ceil(1024 * size.memory_gb * on_node)}MB",
        signal_delay_s=SIGNAL_SECONDS,
        array_parallelism=parallelism or len(array.jobs),
        stderr_to_stdout=True,
        setup=[
            *site.lines,
            *(f"export {name}={value}" for name, value in settings.items()),
            "unset SUBMITIT_PREEMPT_SIGNAL",
        ],
        # A rank that dies ends its job, but a rank that finishes early does not. Since 22.05, srun does not inherit
        # --cpus-per-task from sbatch.
        srun_args=["--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={size.cpus}"],
        additional_parameters={"chdir": str(code), "requeue": True, "signal": f"USR2@{SIGNAL_SECONDS}"}
        | ({"exclusive": True} if size.exclusive else {}),
        wckey=None,
        **site.gpus(size.gpus * on_node),
        **site.flags,
    )
    return executor


def _work_of(array: Array, work: Work) -> list[Work]:
    runs = (tuple(spec.to_dict() for spec in job) for job in array.jobs)
    return [replace(work, runs=each, minutes=array.size.minutes) for each in runs]


def _submission_error(error: Exception, queued: Sequence[str], folder: Path, name: str) -> SlurmError:
    """sbatch's message, and which jobs are queued; the folder is removed only if certainly none are."""
    lines = [line for line in str(error).splitlines() if line.startswith("sbatch: ")] or [f"{error}".strip()]
    words = f"{' '.join(lines).rstrip('.')}."
    try:
        jobs = scheduler.queue([getpass.getuser()]).values()
        accepted = any(job.active and job.name == name for job in jobs)  # a rejected job may be listed as FAILED
    except SlurmError:
        accepted = True
    if accepted:
        return SlurmError(f"{words} Some jobs may still be queued: python -m slurm status shows which.")
    if queued:
        return SlurmError(f"{words} Already queued: {' '.join(queued)}.")
    shutil.rmtree(folder)
    return SlurmError(f"{words} Nothing was submitted.")
