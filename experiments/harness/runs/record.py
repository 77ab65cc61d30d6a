"""A run's record, which is its folder: created, appended to, checkpointed, finished and read back.

    results/runs/<run_id>/
        spec.json         the spec and the format of the record
        env.json          one entry for each session that worked on the run: commit, command, versions, machine
        metrics.jsonl     one line per epoch, flushed
        checkpoint.pt     the state to resume from, replaced atomically; once the run is done, only the weights
        checkpoint.previous.pt    the checkpoint before it, until the run is done
        predictions.npz   what the trained network predicts for the scored examples, and their labels
        summary.json      flat numbers and strings, written last: a run without it is not done
        failure.json      why the last attempt failed; removed by the next attempt

The folder is the only state. Standard library only, so that records can be read without importing torch.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.harness.runs import provenance
from experiments.harness.runs.files import (
    RecordError,
    finite,
    no_link,
    parse_object,
    printable,
    read_bytes,
    read_json,
    read_text,
    replacing,
    write_errors,
    write_json,
    write_text,
)
from experiments.harness.runs.spec import Run, SpecError, Training, from_dict

log = logging.getLogger(__name__)

FORMAT = 1
"""Format of the files above. A record of a newer format is rejected by name."""

REPLACED = ("checkpoint.pt", "env.json", "metrics.jsonl", "predictions.npz", "summary.json")
"""The files that are written under a temporary name and renamed; a killed process leaves `.NAME.*`."""

LARGEST_CHECKPOINT = 64 * 2**30
"""The largest checkpoint that is read, in bytes."""

DELETE_TO_RESUME = "delete it, and the run resumes from the previous checkpoint or starts over"

DEFAULT_ROOT = Path(__file__).resolve().parents[3] / "results"


class RunLocked(RecordError):
    """Another process is working on this run."""


@dataclass(frozen=True)
class Record:
    """The folder of one run below a results root."""

    root: Path
    run_id: str

    def __post_init__(self) -> None:
        """Reject a run id that is not the name of a folder.

        Raises:
            RecordError: for a path, or an empty string.
        """
        if self.run_id in ("", ".", "..") or "/" in self.run_id or "\0" in self.run_id:
            raise RecordError(f"{self.run_id!r} is not a run id: give the name of a folder in {self.root / 'runs'}.")

    @property
    def folder(self) -> Path:
        """The folder with the run's files."""
        return self.root / "runs" / self.run_id

    @property
    def checkpoint(self) -> Path:
        """The state to resume from; once the run is done, the final weights."""
        return self.folder / "checkpoint.pt"

    @property
    def predictions(self) -> Path:
        """What the network of a finished training run predicts, see `tasks.task.Evaluation`."""
        return self.folder / "predictions.npz"

    @property
    def done(self) -> bool:
        """Whether the run is finished, that is, has a summary."""
        return (self.folder / "summary.json").is_file()

    def create(self, spec: Run) -> None:
        """Create the folder and write the spec; an existing folder of the same run is kept.

        Raises:
            RecordError: if the folder cannot be written, or holds another spec or a newer format.
        """
        self._reject_link()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(
                f"The run folder {self.folder} cannot be created ({error.strerror}): choose a writable results folder "
                "with --results."
            ) from error
        if (self.folder / "spec.json").exists():
            if self.spec() != spec:
                raise RecordError(f"{self.folder} holds another run's spec.json: move that folder away.")
        else:
            with write_errors(self.folder / "spec.json"):
                write_json(self.folder / "spec.json", {"format": FORMAT, "spec": spec.to_dict()})

    def _reject_link(self) -> None:
        if self.folder.is_symlink():
            raise RecordError(f"{self.folder} is a symbolic link, but a run folder must not be one: move it away.")

    def begin(self, spec: Run, *, redo: bool = False) -> bool:
        """Prepare the folder for an attempt; `redo` empties it first. Call it while the run is `locked`.

        Returns:
            Whether the run still has to be done: a finished run is left unchanged.
        """
        self.create(spec)
        if redo:
            self.remove()
            self.create(spec)
        for path in self.left_by_killed():
            with contextlib.suppress(OSError):
                path.unlink()
        if self.done:
            self.previous_checkpoint.unlink(missing_ok=True)
        else:
            self.clear_failure()
        return not self.done

    def spec(self) -> Run:
        """The run's spec, checked against the folder's name.

        Raises:
            RecordError: if the file is missing, damaged, of a newer format, or belongs to another folder.
        """
        path = self.folder / "spec.json"
        content = read_json(path)
        version = content.get("format")
        if not isinstance(version, int) or not isinstance(content.get("spec"), dict):
            raise RecordError(f"{path} is not a run's spec: move its folder out of the results.")
        if version > FORMAT:
            raise RecordError(
                f"{path} was written by a newer version of this project (record format {version}; this version reads "
                f"{FORMAT}): update this checkout, or use another results folder."
            )
        try:
            spec = from_dict(content["spec"])
        except SpecError as error:
            raise RecordError(f"{path} holds a spec that this version cannot run: {error}") from error
        if spec.run_id != self.run_id:
            raise RecordError(
                f"{path} describes run {spec.run_id}, not {self.run_id}: the folder was renamed or the file edited. "
                "Restore the folder's name, or move it out of the results."
            )
        return spec

    def add_environment(self, environment: Mapping[str, Any]) -> None:
        """Append one session's provenance to env.json."""
        path = self.folder / "env.json"
        sessions = self.environments() if path.exists() else []
        with write_errors(path):
            write_json(path, {"sessions": [*sessions, dict(environment)]})

    def environments(self) -> list[dict[str, Any]]:
        """The provenance of each session that worked on the run, oldest first."""
        sessions = read_json(self.folder / "env.json").get("sessions")
        if not isinstance(sessions, list) or not all(isinstance(s, dict) for s in sessions):
            raise RecordError(f"{self.folder / 'env.json'} has no list of sessions: move the run's folder away.")
        return sessions

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Add the session's end, time and memory to the entry that `add_environment` writes within the block.

        This happens however the block ends, unless the process is killed.
        """
        started, before = time.monotonic(), provenance.resources_used()["cpu_seconds"]
        path = self.folder / "env.json"
        count = len(self.environments()) if path.exists() else 0
        try:
            yield
        finally:
            with contextlib.suppress(OSError, RecordError):  # the result matters more than this entry
                sessions = self.environments()
                if len(sessions) > count:
                    used = provenance.resources_used()
                    sessions[-1] |= {
                        **used,
                        "cpu_seconds": round(used["cpu_seconds"] - before, 3),
                        "wall_seconds": round(time.monotonic() - started, 3),
                        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                    }
                    write_json(path, {"sessions": sessions})

    def write_checkpoint(self, content: bytes | memoryview) -> None:
        """Replace the checkpoint; the previous one is kept until the run is finished.

        Raises:
            RecordError: if it cannot be written, for example on a full disk; the old checkpoints are then kept.
        """
        with write_errors(self.checkpoint), replacing(self.checkpoint, self.previous_checkpoint) as temporary:
            temporary.write_bytes(content)

    def write_predictions(self, content: bytes) -> None:
        """Replace the predictions, an `.npz`; a `RecordError` says why they cannot be written."""
        with write_errors(self.predictions), replacing(self.predictions) as temporary:
            temporary.write_bytes(content)

    def read_checkpoint(self, path: Path) -> bytes | None:
        """The contents of `checkpoint` or `previous_checkpoint`; None if the file is missing.

        Raises:
            RecordError: if it cannot be read, or is not a regular file.
        """
        try:
            return read_bytes(path, LARGEST_CHECKPOINT)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecordError(f"{path} cannot be read ({error.strerror}): {DELETE_TO_RESUME}.") from error

    @property
    def previous_checkpoint(self) -> Path:
        """The checkpoint before the last one; only an unfinished run has it."""
        return self.folder / "checkpoint.previous.pt"

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and flush it to the disk.

        Raises:
            RecordError: if it cannot be written, for example on a full disk.
        """
        path = self.folder / "metrics.jsonl"
        with write_errors(path), open(path, "a", encoding="utf-8", opener=no_link) as file:
            file.write(json.dumps(finite(metrics), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, epoch: int) -> None:
        """Drop the lines of metrics.jsonl after `epoch`: they are newer than the checkpoint that is resumed."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in self.metrics() if line.get("epoch", 0) <= epoch]
            with write_errors(path):
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a crash truncated is left out.

        Raises:
            RecordError: for a damaged line that is not the last one.
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        pieces = read_text(path).split("\n")
        lines = []
        for number, text in enumerate(pieces, start=1):
            try:
                if text:
                    lines.append(parse_object(text, path))
            except RecordError:
                if number < len(pieces):
                    raise RecordError(f"{path}, line {number}, is damaged: move the run's folder away.") from None
        return lines

    def finish(self, summary: Mapping[str, float | int | str | None]) -> None:
        """Write summary.json, which makes the run done."""
        (self.folder / "failure.json").unlink(missing_ok=True)
        with write_errors(self.folder / "summary.json"):
            write_json(self.folder / "summary.json", dict(summary))
        self.previous_checkpoint.unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """The finished run's flat summary."""
        return read_json(self.folder / "summary.json")

    def fail(self, message: str, traceback: str = "") -> None:
        """Record why this attempt failed; if that cannot be written, log it."""
        try:
            write_json(self.folder / "failure.json", {"message": message, "traceback": traceback})
        except OSError as error:
            log.warning("The failure of run %s could not be recorded: %s", self.run_id, error)

    def failure(self) -> str | None:
        """Why the last attempt failed, in one sentence, or None."""
        path = self.folder / "failure.json"
        return printable(str(read_json(path).get("message"))) if path.exists() else None

    def left_by_killed(self) -> list[Path]:
        """The temporary files of processes that were killed."""
        return [path for name in REPLACED for path in sorted(self.folder.glob(f".{name}.*"))]

    def clear_failure(self) -> None:
        """Delete the last attempt's failure: a new attempt has started."""
        (self.folder / "failure.json").unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the run, the summary first, so that a half-deleted run is not done."""
        (self.folder / "summary.json").unlink(missing_ok=True)
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process; the kernel releases the lock when the process ends, however it ends.

        Raises:
            RunLocked: if another process holds it.
        """
        self._reject_link()
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "a", opener=no_link) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunLocked(f"Run {self.run_id} is being trained by another process.") from None
            yield

    @property
    def busy(self) -> bool:
        """Whether a process is working on the run."""
        try:
            with open(self.folder / "lock", opener=no_link) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False


def record_of(spec: Run, root: Path) -> Record:
    """The record of a spec below a results root."""
    return Record(root, spec.run_id)


def state_of(spec: Run, root: Path) -> tuple[str, str]:
    """The state of a run on disk, and details in words.

    Returns:
        "done", "running", "failed", "started", "not started" or "damaged"; then its progress, or why it failed.
    """
    record = record_of(spec, root)
    try:
        if record.done:
            record.spec(), record.summary()
            return "done", ""
        if not record.folder.exists():
            return "not started", ""
        lines = record.metrics()
        if lines and type(spec) is Training:
            left = lines[-1]["seconds"] / lines[-1]["epoch"] * (spec.epochs - lines[-1]["epoch"])
            progress = f": epoch {lines[-1]['epoch']} of {spec.epochs}, step {lines[-1]['step']}"
        elif lines:
            left = lines[-1]["seconds"] / lines[-1]["step"] * (lines[-1]["steps"] - lines[-1]["step"])
            progress = f": {lines[-1]['step']} of {lines[-1]['steps']} measurements"
        progress = printable(progress) if lines else ""
        if record.busy:
            return "running", f"{progress}, about {duration(left)} left" if lines else ""
        if failure := record.failure():
            return "failed", f": {' '.join(failure.split())}"
        return ("started", progress) if lines or record.checkpoint.exists() else ("not started", "")
    except (KeyError, OSError, OverflowError, RecordError, TypeError, ValueError, ZeroDivisionError) as error:
        return "damaged", f": {printable(str(error))}"


def duration(seconds: float) -> str:
    """Seconds in readable form: 42 s, 7 min, 3.5 h."""
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99 * 60 else f"{seconds / 3600:.1f} h"


def in_bytes(size: float) -> str:
    """A size in readable form: 310 kB, 2.1 MB, 90 MB, 1.4 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}" if size < 10 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"
