"""How each run stands: by its record, by what was submitted, and by what Slurm's queue says of it."""

import getpass
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.harness.runs.files import RecordError, read_json, write_json
from experiments.harness.runs.record import record_of, state_of
from experiments.harness.runs.spec import Run
from slurm import scheduler
from slurm.scheduler import Job, SlurmError

log = logging.getLogger(__name__)


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


def standings(specs: Sequence[Run], root: Path, need_queue: bool = False) -> list[Standing]:
    """How each run stands. The queue is asked before the disk is read: a job may end in between.

    Raises:
        SlurmError: if `need_queue` and the queue cannot be asked; else what only it knows is "submitted".
    """
    submitted = {path.parent: read_json(path) for path in sorted((root / "slurm").glob("*/submission.json"))}
    try:
        queue = scheduler.queue([getpass.getuser(), *(str(one.get("user")) for one in submitted.values())])
    except SlurmError as error:
        if need_queue:
            raise
        queue = None
        if submitted:
            log.warning("%s", error)
    places = _places(submitted, queue or {})
    mine = [places[spec.run_id] for spec in specs if spec.run_id in places]
    gone = [p.job for p in mine if queue is not None and p.job not in queue]
    fates = scheduler.fates(gone)
    return [_standing(spec, root, places.get(spec.run_id), queue, fates) for spec in specs]


def note_cancelled(places: Sequence[Place]) -> None:
    """Write down that jobs were cancelled: Slurm forgets those that never began."""
    for folder in dict.fromkeys(place.folder for place in places):
        ids = {place.job for place in places if place.folder == folder}
        write_json(folder / "cancelled.json", {"ids": sorted(_cancelled(folder) | ids)})


def _places(submissions: Mapping[Path, Mapping[str, Any]], queue: Mapping[str, Job]) -> dict[str, Place]:
    """Where each run was submitted to last."""
    places: dict[str, Place] = {}
    by_name: dict[str, list[str]] = {}
    for job in queue.values():
        by_name.setdefault(job.name, []).append(job.id)
    for folder, submission in submissions.items():
        try:
            cancelled = _cancelled(folder)
            for array in submission["arrays"]:
                ids = array["ids"] or _by_index(by_name.get(array["name"], []), len(array["runs"]))
                for job, runs in zip(ids, array["runs"], strict=True):
                    if job:  # else sbatch refused it, or never came to it
                        places |= dict.fromkeys(runs, Place(job, folder, len(runs) == 1, job in cancelled))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{folder} is damaged ({error!r}): move it away.") from error
    return places


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
    how = f"ended: {fate}" if fate else "left the queue without a trace"
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
