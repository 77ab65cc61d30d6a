"""One run's folder: opened, appended to, checkpointed, finished and read back.

    results/runs/<run_id>/
        spec.json         the spec and the format of the record
        env.json          one entry for each session that worked on the run: commit, command, versions, machine
        metrics.jsonl     one line an epoch, flushed
        checkpoint.pt     the state to resume from, replaced by rename; after the finish only the weights
        summary.json      flat numbers and strings, written last: no summary, not done
        failure.json      why the last attempt ended, if it failed; removed by the next attempt

The folder is the only state. Standard library only: whoever reads records never waits for torch.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.harness.spec import Spec, SpecError

FORMAT = 1
"""Of the files below. A reader refuses a record of a newer format by name."""

DEFAULT_ROOT = Path(__file__).resolve().parents[2] / "results"


class RecordError(Exception):
    """A record that cannot be read or written. The message names the file and says what to do."""


class RunLocked(RecordError):
    """Another process is at work on this run."""


@dataclass(frozen=True)
class Record:
    """The folder of one run below a results root."""

    root: Path
    run_id: str

    @property
    def folder(self) -> Path:
        """Where the run's files are."""
        return self.root / "runs" / self.run_id

    @property
    def checkpoint(self) -> Path:
        """The state to resume from; after the finish, the final weights."""
        return self.folder / "checkpoint.pt"

    @property
    def done(self) -> bool:
        """Whether the run has finished: it has a summary."""
        return (self.folder / "summary.json").is_file()

    def create(self, spec: Spec) -> None:
        """Make the folder and say in it what the run is; a folder of the same run is taken over.

        Raises:
            RecordError: if the folder cannot be written, or holds another spec or a newer format.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(
                f"The run folder {self.folder} cannot be made ({error.strerror}): choose a writable "
                "results folder with --results."
            ) from error
        if (self.folder / "spec.json").exists():
            if self.spec() != spec:
                raise RecordError(f"{self.folder} holds another run's spec.json: move that folder away.")
        else:
            write_json(self.folder / "spec.json", {"format": FORMAT, "spec": spec.to_dict()})

    def begin(self, spec: Spec, *, redo: bool = False) -> bool:
        """`create` the folder for another attempt, emptied first if `redo`; call it while the run is `locked`.

        Returns:
            Whether there is something to do: a finished run is left alone.
        """
        self.create(spec)
        if redo:
            self.remove()
            self.create(spec)
        if not self.done:
            self.clear_failure()
        return not self.done

    def spec(self) -> Spec:
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
                f"{path} was written by a newer version of this project (record format {version}, this one "
                f"reads {FORMAT}): update this checkout, or use another results folder."
            )
        try:
            spec = Spec.from_dict(content["spec"])
        except SpecError as error:
            raise RecordError(f"{path} holds a spec this version cannot run: {error}") from error
        if spec.run_id != self.run_id:
            raise RecordError(
                f"{path} describes run {spec.run_id}, not {self.run_id}: the folder was renamed or the file "
                "edited. Give the folder its name back, or move it out of the results."
            )
        return spec

    def add_environment(self, environment: Mapping[str, Any]) -> None:
        """Append one session's provenance to env.json."""
        path = self.folder / "env.json"
        sessions = self.environments() if path.exists() else []
        write_json(path, {"sessions": [*sessions, dict(environment)]})

    def environments(self) -> list[dict[str, Any]]:
        """The provenance of each session that worked on the run, oldest first."""
        sessions = read_json(self.folder / "env.json").get("sessions")
        if not isinstance(sessions, list) or not all(isinstance(s, dict) for s in sessions):
            raise RecordError(f"{self.folder / 'env.json'} has no list of sessions: it was edited.")
        return sessions

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and flush it to the disk."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(metrics), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, epoch: int) -> None:
        """Drop lines of metrics.jsonl beyond `epoch`: they postdate the checkpoint that is resumed."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in self.metrics() if line.get("epoch", 0) <= epoch]
            _write(path, "".join(json.dumps(line) + "\n" for line in kept))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut off by a crash is left out.

        Raises:
            RecordError: for a damaged line that is not the last.
        """
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        pieces = _read(path).split("\n")
        lines = []
        for number, text in enumerate(pieces, start=1):
            try:
                if text:
                    lines.append(_object(text, path))
            except RecordError:
                if number < len(pieces):
                    raise RecordError(f"{path}, line {number}, is damaged: move the run's folder away.") from None
        return lines

    def finish(self, summary: Mapping[str, float | int | str | None]) -> None:
        """Write summary.json: from here on the run is done."""
        (self.folder / "failure.json").unlink(missing_ok=True)
        write_json(self.folder / "summary.json", dict(summary))

    def summary(self) -> dict[str, Any]:
        """The finished run's flat summary."""
        return read_json(self.folder / "summary.json")

    def fail(self, message: str, traceback: str = "") -> None:
        """Say in the record why this attempt ended."""
        write_json(self.folder / "failure.json", {"message": message, "traceback": traceback})

    def failure(self) -> str | None:
        """Why the last attempt failed, in one sentence, or None."""
        path = self.folder / "failure.json"
        return str(read_json(path).get("message")) if path.exists() else None

    def clear_failure(self) -> None:
        """Forget the last attempt's failure: a new one has begun."""
        (self.folder / "failure.json").unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the run, the summary first: a half-deleted run is an unfinished one."""
        (self.folder / "summary.json").unlink(missing_ok=True)
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the kernel lets go of it when the process dies, however it dies.

        Raises:
            RunLocked: if another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunLocked(f"Run {self.run_id} is being trained by another process.") from None
            yield

    @property
    def busy(self) -> bool:
        """Whether a process is at work on the run."""
        try:
            with open(self.folder / "lock") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False


def record_of(spec: Spec, root: Path) -> Record:
    """The record of a spec below a results root."""
    return Record(root, spec.run_id)


def state_of(spec: Spec, root: Path) -> tuple[str, str]:
    """What the disk tells of a run, and words about it.

    Returns:
        "done", "running", "failed", "begun", "not begun" or "damaged"; then how far it is, or why it failed.
    """
    record = record_of(spec, root)
    try:
        if record.done:
            record.spec(), record.summary()
            return "done", ""
        if not record.folder.exists():
            return "not begun", ""
        lines = record.metrics()
        if lines and spec.kind == "train":
            left = lines[-1]["seconds"] / lines[-1]["epoch"] * (spec.epochs - lines[-1]["epoch"])
            progress = f": epoch {lines[-1]['epoch']} of {spec.epochs}, step {lines[-1]['step']}"
        elif lines:
            left = lines[-1]["seconds"] / lines[-1]["step"] * (lines[-1]["steps"] - lines[-1]["step"])
            progress = f": {lines[-1]['step']} of {lines[-1]['steps']} measurements"
        if record.busy:
            return "running", f"{progress}, about {duration(left)} left" if lines else ""
        if failure := record.failure():
            return "failed", f": {' '.join(failure.split())}"
        return ("begun", progress if lines else "") if lines or record.checkpoint.exists() else ("not begun", "")
    except (KeyError, OSError, RecordError) as error:
        return "damaged", f": {error}"


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 7 min, 3.5 h."""
    if seconds < 99:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99 * 60 else f"{seconds / 3600:.1f} h"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object so that a reader sees the old file or the whole new one."""
    _write(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RecordError: if the file is missing, unreadable, or anything but one JSON object.
    """
    return _object(_read(path), path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read ({error}): mend it or move its folder away.") from error


def _object(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON ({error}): mend it or move its folder away.") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} does not hold a JSON object: mend it or move its folder away.")
    return content


def _finite(content: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as its name."""
    if isinstance(content, Mapping):
        return {k: _finite(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(v) for v in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content
