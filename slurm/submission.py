"""From runs to jobs and back: what is submitted, what lies on the disk about it, and how each run stands.

results/slurm/<name>/submission.json   which run is in which job; written before sbatch and again with the ids
results/slurm/<name>/*_log.out         one log for each process of a job
results/slurm/code/<hash>/             the training code as it was submitted, once for each state of it
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
"""Of the results folder's disk, without which nothing is submitted."""

PROBE_MEGABYTES = 4
"""Written and removed again before submitting."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Array:
    """Jobs of one size, submitted together."""

    jobs: tuple[tuple[Run, ...], ...]
    """The runs of each job, which it trains one after the other."""
    size: Resources
    """Of one process."""
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """Processes of each job."""
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
    """Pack runs into jobs of equal needs, and those into arrays of at most `largest` jobs.

    Those of most ranks come first: what a cluster may refuse is refused before anything is queued.

    Raises:
        SlurmError: if the ranks of a run do not divide among the nodes.
    """
    groups: dict[tuple, list[tuple[Run, Resources]]] = {}
    for spec in specs:
        size = resources(spec, estimate, minutes)
        if spec.processes % nodes and spec.processes > 1:
            raise SlurmError(f"nodes is {nodes}, but must divide the {spec.processes} ranks of {spec.title}.")
        groups.setdefault((replace(size, minutes=0), spec.processes, spec.threads), []).append((spec, size))
    found = []
    for group in sorted(groups.values(), key=lambda group: -group[0][0].processes):
        jobs = [
            tuple(spec for spec, _ in group[first : first + runs_per_job])
            for first in range(0, len(group), runs_per_job)
        ]
        size = replace(group[0][1], minutes=runs_per_job * max(size.minutes for _, size in group))
        for first in range(0, len(jobs), largest):
            several = jobs[0][0].processes > 1
            found.append(Array(tuple(jobs[first : first + largest]), size, nodes if several else 1))
    return found


def submit(
    chosen: Sequence[Array], work: Work, site: Site, *, code: Path, parallelism: int | None = None
) -> tuple[Path, list[str]]:
    """Hand jobs to Slurm; returns when they are queued.

    Args:
        chosen: The jobs.
        work: What the jobs have in common; the results root on a disk that all nodes see.
        site: The cluster's facts.
        code: The code that they run, from `snapshot`.
        parallelism: How many jobs may run at a time; left out, as many as Slurm likes.

    Returns:
        The submission's folder, and the ids of its arrays.

    Raises:
        SlurmError: in sbatch's own words, if it refuses; arrays before that one stay queued.
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
            with scheduler.outside_of_any_job():
                jobs = executor.map_array(perform, _works(array, work))
        except Exception as error:
            raise _refusal(error, queued, folder, entry["name"]) from error
        entry["ids"] = [job.job_id for job in jobs]
        queued.append(jobs[0].job_id.split("_")[0])
        write_json(folder / "submission.json", content)
    return folder, queued


def script(array: Array, root: Path, site: Site, parallelism: int | None = None) -> str:
    """The sbatch script of an array, as `submit` would write it."""
    executor = _executor(array, root / "slurm" / "dry-run", site, root / "slurm" / "code", "msam", parallelism)
    if len(array.jobs) > 1:
        executor.parameters["map_count"] = len(array.jobs)
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold the results root for one submission at a time, so that two commands do not submit the same runs.

    Raises:
        SlurmError: if it cannot be written, or its disk is nearly full.
    """
    folder = root / "slurm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")  # noqa: SIM115 (closed below)
        free = shutil.disk_usage(folder).free
        with open(folder / "room", "wb") as probe:  # a quota shows only when it is reached
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
                f"The disk of {root} has {free / 2**20:.0f} MB free, but {FREE_MEGABYTES} MB are asked for before "
                "anything is submitted: free some, or choose another results folder with --results."
            )
        yield


def snapshot(root: Path) -> Path:
    """Copy the code that jobs run, unless it lies there already, so that they run what was submitted.

    Raises:
        SlurmError: if the code is being edited meanwhile.
    """
    name = code_hash(folders=PACKAGES)
    folder = root / "slurm" / "code" / name
    if folder.is_dir() and code_hash(folder, PACKAGES) != name:  # purged in parts, or edited
        folder.rename(folder.with_name(f"{name}-damaged-{secrets.token_hex(2)}"))
    if not folder.is_dir():
        with _made_whole(folder) as temporary:
            for package in PACKAGES:
                shutil.copytree(ROOT / package, temporary / package, ignore=shutil.ignore_patterns("__pycache__"))
            if code_hash(temporary, PACKAGES) != name:
                raise SlurmError("The code was changed while it was copied: submit again.")
    return folder


@contextmanager
def _made_whole(folder: Path) -> Iterator[Path]:
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
    """submitit's executor with everything that sbatch is given."""
    from submitit import SlurmExecutor

    class Anywhere(SlurmExecutor):
        """Writes scripts without Slurm too."""

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
        # One dead rank ends its job, and none is ended for finishing before the first. Since 22.05 srun does not take
        # --cpus-per-task over from sbatch.
        srun_args=["--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={size.cpus}"],
        additional_parameters={"chdir": str(code), "requeue": True, "signal": f"USR2@{SIGNAL_SECONDS}"}
        | ({"exclusive": True} if size.exclusive else {}),
        wckey=None,
        **site.gpus(size.gpus * on_node),
        **site.flags,
    )
    return executor


def _works(array: Array, work: Work) -> list[Work]:
    runs = (tuple(spec.to_dict() for spec in job) for job in array.jobs)
    return [replace(work, runs=each, minutes=array.size.minutes) for each in runs]


def _refusal(error: Exception, queued: Sequence[str], folder: Path, name: str) -> SlurmError:
    """sbatch's own words, and what is queued all the same; the folder stays unless that is certainly nothing."""
    said = [line for line in str(error).splitlines() if line.startswith("sbatch: ")] or [f"{error}".strip()]
    words = f"{' '.join(said).rstrip('.')}."
    try:
        jobs = scheduler.queue([getpass.getuser()]).values()
        accepted = any(job.active and job.name == name for job in jobs)  # a refused one may be there, FAILED
    except SlurmError:
        accepted = True
    if accepted:
        return SlurmError(f"{words} Some jobs may be queued all the same: python -m slurm status shows which.")
    if queued:
        return SlurmError(f"{words} Queued before that: {' '.join(queued)}.")
    shutil.rmtree(folder)
    return SlurmError(f"{words} Nothing was submitted.")
