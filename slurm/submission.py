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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.harness.runs.estimate import Estimate
from experiments.harness.runs.files import RecordError, read_json, write_json
from experiments.harness.runs.process import library_settings
from experiments.harness.runs.provenance import ROOT, code_hash
from experiments.harness.runs.record import record_of, state_of
from experiments.harness.runs.spec import Run
from slurm import scheduler
from slurm.job import PACKAGES, Work, perform
from slurm.resources import SIGNAL_SECONDS, Resources, resources
from slurm.scheduler import Job, SlurmError
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


@dataclass(frozen=True)
class Place:
    """Where a run was submitted to last."""

    job: str
    folder: Path
    alone: bool
    """Whether the job has no other run."""
    cancelled: bool = False

    @property
    def log(self) -> Path:
        """What the job's first process has printed."""
        return self.folder / f"{self.job}_0_log.out"


@dataclass(frozen=True)
class Standing:
    """How a run stands, on the disk and in the queue."""

    spec: Run
    state: str
    """done, running, queued, failed, cancelled, lost (it was submitted; there is neither record nor job), begun, not
    begun, damaged; submitted where the queue cannot be asked."""
    words: str
    place: Place | None

    @property
    def waiting(self) -> bool:
        """Whether something is still to come without a new submission."""
        return self.state in ("running", "queued", "submitted")


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
    found: Sequence[Array],
    root: Path,
    site: Site,
    *,
    code: Path,
    submitted: Mapping[str, Any],
    data_root: str | None = None,
    parallelism: int | None = None,
) -> tuple[Path, list[str]]:
    """Hand jobs to Slurm; returns when they are queued.

    Args:
        found: The jobs.
        root: The results root, on a disk that all nodes see.
        site: The cluster's facts.
        code: The code that they run, from `snapshot`.
        submitted: Provenance of this submission, for the records.
        data_root: A folder to look for data in first.
        parallelism: How many jobs may run at a time; left out, as many as Slurm likes.

    Returns:
        The submission's folder, and the ids of its arrays.

    Raises:
        SlurmError: in sbatch's own words, if it refuses; arrays before that one stay queued.
    """
    folder = _folder(root)
    told: dict[str, Any] = {
        "user": getpass.getuser(),
        "arrays": [
            {
                "name": f"msam-{folder.name}-{number}",
                "ids": None,
                "runs": [[spec.run_id for spec in job] for job in array.jobs],
            }
            for number, array in enumerate(found)
        ],
    }
    write_json(folder / "submission.json", told)
    queued: list[str] = []
    for array, entry in zip(found, told["arrays"], strict=True):
        after = f"afterany:{queued[-1]}" if queued and parallelism else None
        executor = _executor(array, folder, site, code, entry["name"], parallelism, after)
        try:
            with scheduler.outside_of_any_job():
                jobs = executor.map_array(perform, _work(array, root, data_root, submitted, code.name))
        except Exception as error:
            raise _refusal(error, queued, folder, entry["name"]) from error
        entry["ids"] = [job.job_id for job in jobs]
        queued.append(jobs[0].job_id.split("_")[0])
        write_json(folder / "submission.json", told)
    return folder, queued


def script(array: Array, root: Path, site: Site, parallelism: int | None = None) -> str:
    """The sbatch script of an array, as `submit` would write it."""
    executor = _executor(array, root / "slurm" / "dry-run", site, root / "slurm" / "code", "msam", parallelism, None)
    if len(array.jobs) > 1:
        executor.parameters["map_count"] = len(array.jobs)
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def standings(specs: Sequence[Run], root: Path, need_queue: bool = False) -> list[Standing]:
    """How each run stands. The queue is asked before the disk is read: a job may end in between.

    Raises:
        SlurmError: if `need_queue` and the queue cannot be asked; else what only it knows is "submitted".
    """
    told = {path.parent: read_json(path) for path in sorted((root / "slurm").glob("*/submission.json"))}
    try:
        queue = scheduler.queue([getpass.getuser(), *(str(one.get("user")) for one in told.values())])
    except SlurmError as error:
        if need_queue:
            raise
        queue = None
        if told:
            log.warning("%s", error)
    places = _places(told, queue or {})
    mine = [places[spec.run_id] for spec in specs if spec.run_id in places]
    gone = [p.job for p in mine if queue is not None and p.job not in queue]
    fates = scheduler.fates(gone)
    return [_standing(spec, root, places.get(spec.run_id), queue, fates) for spec in specs]


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


def _executor(
    array: Array, folder: Path, site: Site, code: Path, name: str, parallelism: int | None, after: str | None
) -> Any:
    """submitit's executor with everything that sbatch is told."""
    from submitit import SlurmExecutor

    class Anywhere(SlurmExecutor):
        """For scripts too where there is no Slurm."""

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
        dependency=after,
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


def _work(array: Array, root: Path, data_root: str | None, submitted: Mapping[str, Any], code: str) -> list[Work]:
    rest = (str(root), data_root, array.size.minutes, dict(submitted), code)
    return [Work(tuple(spec.to_dict() for spec in job), *rest) for job in array.jobs]


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
        return SlurmError(f"{words} Some jobs may be queued all the same: python -m slurm status tells which.")
    if queued:
        return SlurmError(f"{words} Queued before that: {' '.join(queued)}.")
    shutil.rmtree(folder)
    return SlurmError(f"{words} Nothing was submitted.")


def _places(submissions: Mapping[Path, Mapping[str, Any]], queue: Mapping[str, Job]) -> dict[str, Place]:
    """Where each run was submitted to last."""
    places: dict[str, Place] = {}
    by_name: dict[str, list[str]] = {}
    for job in queue.values():
        by_name.setdefault(job.name, []).append(job.id)
    for folder, told in submissions.items():
        try:
            cancelled = _cancelled(folder)
            for array in told["arrays"]:
                ids = array["ids"] or _by_index(by_name.get(array["name"], []), len(array["runs"]))
                for job, runs in zip(ids, array["runs"], strict=True):
                    if job:  # else sbatch refused it, or never came to it
                        places |= dict.fromkeys(runs, Place(job, folder, len(runs) == 1, job in cancelled))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{folder} is damaged ({error!r}): move it away.") from error
    return places


def note_cancelled(places: Sequence[Place]) -> None:
    """Write down that jobs were cancelled: Slurm forgets those that never began."""
    for folder in dict.fromkeys(place.folder for place in places):
        ids = {place.job for place in places if place.folder == folder}
        write_json(folder / "cancelled.json", {"ids": sorted(_cancelled(folder) | ids)})


def _cancelled(folder: Path) -> set[str]:
    path = folder / "cancelled.json"
    return set(read_json(path)["ids"]) if path.exists() else set()


def _by_index(ids: Sequence[str], count: int) -> list[str | None]:
    """The ids of an array's tasks by their number, where submitting was cut off before they were written down."""
    found: list[str | None] = [None] * count
    for id_ in ids:
        index = int(id_.partition("_")[2] or 0)
        if index < count:
            found[index] = id_
    return found


def _standing(
    spec: Run, root: Path, place: Place | None, queue: Mapping[str, Job] | None, fates: Mapping[str, str]
) -> Standing:
    state, words = state_of(spec, root)
    if place is None or state in ("done", "running", "damaged"):
        return Standing(spec, state, words, place)
    failed = state == "failed" and _failed_since(spec, root, place)
    if queue is None and failed:
        return Standing(spec, "failed", words, place)
    if queue is None:
        return Standing(spec, "submitted", f": in job {place.job}; the queue cannot be asked from here{words}", place)
    job = queue.get(place.job)
    if job is not None and job.active:
        if not job.running:
            return Standing(spec, "queued", f": job {job.id}, {job.reason or job.state}", place)
        if not place.alone and failed:
            return Standing(spec, "failed", words, place)
        if place.alone or _worked_on_by(spec, root, job.id):
            return Standing(spec, "running", words, place)
        return Standing(spec, "queued", f": job {job.id} trains its other runs first", place)
    if state == "failed":
        return Standing(spec, state, words, place)
    fate = job.state if job else fates.get(place.job)
    if place.cancelled or fate == "CANCELLED":
        return Standing(spec, "cancelled", f": job {place.job}{words}", place)
    how = f"ended: {fate}" if fate else "left the queue without a word"
    return Standing(spec, "lost", f": job {place.job} {how}. Submit again to go on{words}", place)


def _failed_since(spec: Run, root: Path, place: Place) -> bool:
    """Whether the failure on the disk is of this submission or of a later attempt, not of an earlier one."""
    try:
        failure = record_of(spec, root).folder / "failure.json"
        return failure.stat().st_mtime >= (place.folder / "submission.json").stat().st_mtime
    except OSError:
        return False


def _worked_on_by(spec: Run, root: Path, job: str) -> bool:
    """Whether a job of several runs has come to this one."""
    try:
        return record_of(spec, root).environments()[-1].get("slurm_job") == job
    except (IndexError, RecordError):
        return False
