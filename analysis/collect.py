"""Read run folders into memory. A folder that cannot be read is reported and left unchanged."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import Record
from experiments.harness.runs.spec import Run


class Lines:
    """The lines of a metrics.jsonl by column, with numbers as arrays: one dict for each line would fill the memory."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Store the lines by column; a line that lacks a column has None there."""
        lines = [plain_keys(line) for line in lines]
        self.count = len(lines)
        names = dict.fromkeys(name for line in lines for name in line)
        self.columns = {name: packed([line.get(name) for line in lines]) for name in names}

    def column(self, name: str) -> np.ndarray | list[Any]:
        """The values of a column; None for each line if there is no such column."""
        return self.columns.get(name, [None] * self.count)


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    spec: Run
    summary: dict[str, Any]
    metrics: Lines | Sequence[Mapping[str, Any]]
    sessions: list[dict[str, Any]]
    predictions: Path | None = None
    """The file with its predictions, if it has one; it is read when it is needed."""


@dataclass(frozen=True)
class Unfinished:
    """A run that was started and has no summary."""

    spec: Run
    failure: str | None
    """Why its last attempt failed; None if it is running or was interrupted."""
    metrics: Lines = field(default_factory=lambda: Lines(()))
    """Its epochs so far."""

    @property
    def state(self) -> str:
        """Why it failed, or how far it is."""
        if self.failure is not None:
            return f"failed: {self.failure}"
        epochs = self.metrics.columns.get("epoch")
        reached = "" if epochs is None else f", epoch {epochs[-1]} of {self.spec.flat['epochs']}"
        return f"under way{reached}"


@dataclass(frozen=True)
class Collected:
    """All runs of a results root."""

    finished: tuple[Finished, ...]
    unfinished: tuple[Unfinished, ...]
    problems: tuple[str, ...]
    """A sentence for each folder that could not be read; the folder is left unchanged."""

    @property
    def states(self) -> dict[str, str]:
        """For each run without a result, why it failed or how far it is, by run_id."""
        return {u.spec.run_id: u.state for u in self.unfinished if u.failure is not None or u.metrics.count}


def finished_runs(root: Path) -> set[str]:
    """The names of the folders of `root/runs` that have a summary; the files are not opened.

    Raises:
        RecordError: if `root` is not a folder, or cannot be listed.
    """
    return {folder.name for folder in _folders(root) if (folder / "summary.json").exists()}


def collect(root: Path, curves_of: Collection[str] | None = None) -> Collected:
    """Read every folder of `root/runs`. A folder that cannot be read is reported and left unchanged.

    Args:
        root: The results root.
        curves_of: The runs whose metrics to read, which take most of the time; None for all.

    Raises:
        RecordError: if `root` is not a folder, or cannot be listed.
    """
    finished, unfinished, problems = [], [], []
    for folder in _folders(root):
        record = Record(folder.parent.parent, folder.name)
        try:
            run = _read(record, curves_of is None or record.run_id in curves_of)
        except RecordError as error:
            problems.append(plain(str(error)))
            continue
        if isinstance(run, Unfinished):
            unfinished.append(run)
            continue
        if not run.sessions:
            problems.append(f"{record.folder} has no readable env.json: its commit and machine are unknown.")
        finished.append(run)
    return Collected(tuple(finished), tuple(unfinished), tuple(problems))


def plain(text: str) -> str:
    """The text on one line, without control characters and lone surrogates."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text.encode("utf-8", "replace").decode("utf-8"))


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise RecordError(f"The results folder {root} does not exist: give the folder that holds runs/ with --results.")
    try:
        return sorted(p for p in (root / "runs").iterdir() if not p.name.startswith(".") and not _empty(p))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordError(f"{root / 'runs'} cannot be read ({error.strerror}): check its permissions.") from error


def _empty(folder: Path) -> bool:
    """Whether the folder holds nothing except a lock: a run that is about to start, or was removed."""
    try:
        return folder.is_dir() and all(path.name == "lock" for path in folder.iterdir())
    except OSError:
        return False


def _read(record: Record, with_curves: bool) -> Finished | Unfinished:
    if not record.folder.is_dir():
        raise RecordError(f"{record.folder} is not a run folder: move it out of runs/.")
    spec = record.spec()
    if not record.done:
        failure, lines = record.failure(), Lines(record.metrics() if with_curves else ())
        return Unfinished(spec, None if failure is None else plain(failure)[:200], lines)
    try:
        sessions = record.environments()
    except RecordError:
        sessions = []
    lines, predictions = Lines(record.metrics() if with_curves else ()), record.predictions
    return Finished(spec, record.summary(), lines, sessions, predictions if predictions.exists() else None)


def plain_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, each as a scalar for one cell of a table, under names without control characters."""
    return {_name(key): value if type(value) in _NUMBERS else _scalar(value) for key, value in values.items()}


_NUMBERS = (float, int, bool, type(None))


@lru_cache(maxsize=10_000)
def _name(key: str) -> str:
    """A column's name, cached because every line has the same few keys."""
    return plain(str(key))


def _scalar(value: Any) -> Any:
    """A value for one cell; records write non-finite numbers as strings."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else plain(value)
    if isinstance(value, Mapping | list):
        return plain(json.dumps(value))
    return value


def packed(values: list[Any]) -> np.ndarray | list[Any]:
    """Floats or integers as an array; anything else unchanged."""
    kinds = set(map(type, values))
    if kinds == {float}:
        return np.array(values)
    return np.array(values) if kinds == {int} and max(map(abs, values)) < 10**18 else values
