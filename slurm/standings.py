"""The state of each run, from its record, the submissions and Slurm's queue."""

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
    """The last submission of a run."""

    job: str
    folder: Path
    alone: bool
    """Whether it is the job's only run."""
    cancelled: bool = False

    @property
    def log(self) -> Path:
        """The log of the job's first process."""
        return self.folder / f"{self.job}_0_log.out"


@dataclass(frozen=True)
class Standing:
    """The state of a run on disk and in the queue."""

    spec: Run
    state: str
    """done, running, queued, failed, cancelled, lost (submitted, but there is neither record nor job), started, not
    started or damaged; "submitted" if the queue cannot be queried."""
    words: str
    place: Place | None

    @property
    def waiting(self) -> bool:
        """Whether the run is still going to be trained without a new submission."""
        return self.state in ("running", "queued", "submitted")


def standings(specs: Sequence[Run], root: Path, need_queue: bool = False) -> list[Standing]:
    """The state of each run. The queue is queried before the disk is read, since a job may end in between.

    Raises:
        SlurmError: if `need_queue` and the queue cannot be queried; otherwise such runs are "submitted".
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
    final_states = scheduler.final_states(gone)
    return [_standing(spec, root, places.get(spec.run_id), queue, final_states) for spec in specs]


def note_cancelled(places: Sequence[Place]) -> None:
    """Record that jobs were cancelled, since Slurm forgets jobs that never started."""
    for folder in dict.fromkeys(place.folder for place in places):
        ids = {place.job for place in places if place.folder == folder}
        write_json(folder / "cancelled.json", {"ids": sorted(_cancelled(folder) | ids)})


def _places(submissions: Mapping[Path, Mapping[str, Any]], queue: Mapping[str, Job]) -> dict[str, Place]:
    """The last submission of each run."""
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
                    if job:  # otherwise sbatch rejected it, or it was not reached
                        places |= dict.fromkeys(runs, Place(job, folder, len(runs) == 1, job in cancelled))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecordError(f"{folder} is damaged ({error!r}): move it away.") from error
    return places


def _cancelled(folder: Path) -> set[str]:
    path = folder / "cancelled.json"
    return set(read_json(path)["ids"]) if path.exists() else set()


def _by_index(ids: Sequence[str], count: int) -> list[str | None]:
    """The ids of an array's tasks by index, for a submission that was interrupted before it recorded them."""
    ordered: list[str | None] = [None] * count
    for id_ in ids:
        index = int(id_.partition("_")[2] or 0)
        if index < count:
            ordered[index] = id_
    return ordered


def _standing(
    spec: Run, root: Path, place: Place | None, queue: Mapping[str, Job] | None, final_states: Mapping[str, str]
) -> Standing:
    state, words = state_of(spec, root)
    if place is None or state in ("done", "running", "damaged"):
        return Standing(spec, state, words, place)
    failed = state == "failed" and _failed_since(spec, root, place)
    if queue is None and failed:
        return Standing(spec, "failed", words, place)
    if queue is None:
        return Standing(spec, "submitted", f": in job {place.job}; the queue cannot be queried here{words}", place)
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
    final_state = job.state if job else final_states.get(place.job)
    if place.cancelled or final_state == "CANCELLED":
        return Standing(spec, "cancelled", f": job {place.job}{words}", place)
    how = f"ended: {final_state}" if final_state else "left the queue, and its final state is unknown"
    return Standing(spec, "lost", f": job {place.job} {how}. Submit again to resume{words}", place)


def _failed_since(spec: Run, root: Path, place: Place) -> bool:
    """Whether the recorded failure is from this submission or a later attempt, not from an earlier one."""
    try:
        failure = record_of(spec, root).folder / "failure.json"
        return failure.stat().st_mtime >= (place.folder / "submission.json").stat().st_mtime
    except OSError:
        return False


def _worked_on_by(spec: Run, root: Path, job: str) -> bool:
    """Whether a job with several runs has reached this one."""
    try:
        return record_of(spec, root).environments()[-1].get("slurm_job") == job
    except (IndexError, RecordError):
        return False
