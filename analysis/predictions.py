"""The classes that networks predict for the test examples: read from records, checked, and published as one file.

    results/<profile>/predictions.npz
        <run_id>                      (N,) uint8: the predicted class of each test example; float32 for a regression
        <run_id>_int8                 the same after dynamic int8 quantisation, if the run has it
        <run_id>_mismatched           the same for MNLI's mismatched part
        labels_<dataset>_<N>          (N,) the true classes, once for all runs that are scored on these examples
        labels_<dataset>_mismatched_<N>

Runs of a grid, which are scored on held-out training examples, are left out. Files are untrusted: bounded, never
unpickled, and rejected by name. A run whose predictions are damaged counts without them.
"""

import io
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.runs.files import RecordError, printable, read_bytes

NAME = "predictions.npz"
"""The file of a record, and of a folder of results."""

LARGEST_RECORD = 8 * 2**20
"""The most bytes that the predictions of one run may have, compressed or not."""

LARGEST_PUBLISHED = 10_000_000
"""The most bytes that the published file may have."""

_PART, _INT8, _LABELS = "test", "_int8", "labels"

_TYPES = (np.dtype("uint8"), np.dtype("float32"))


class Damaged(RecordError):
    """The predictions of a record cannot be used. The run counts without them."""


@dataclass(frozen=True)
class Predicted:
    """The predictions of one network."""

    classes: Mapping[str, np.ndarray]
    """By suffix: "" for the test examples, `_int8`, `_mismatched`, `_mismatched_int8`; each (N,)."""
    labels: Mapping[str, np.ndarray]
    """The true classes by suffix: "" and `_mismatched`; each (N,)."""


@dataclass(frozen=True)
class Predictions:
    """The predictions of some runs, each read when it is first asked for."""

    sources: Mapping[str, Callable[[], Predicted]] = field(default_factory=dict)
    """Reads the predictions of a run, by run_id."""
    problems: dict[str, str] = field(default_factory=dict)
    """A sentence for each run whose predictions were read and are damaged."""
    cached: dict[str, Predicted] = field(default_factory=dict, repr=False)

    def of(self, run_id: str) -> Predicted | None:
        """The predictions of a run; None if it has none, or if those of its record are damaged.

        Raises:
            RecordError: if published predictions are damaged.
        """
        if run_id not in self.sources or run_id in self.problems:
            return None
        if run_id not in self.cached:
            try:
                self.cached[run_id] = self.sources[run_id]()
            except Damaged as error:
                self.problems[run_id] = str(error)
                return None
        return self.cached[run_id]

    def only(self, run_ids: Collection[str]) -> "Predictions":
        """The predictions of these runs."""
        kept = {run_id: source for run_id, source in self.sources.items() if run_id in run_ids}
        return Predictions(kept, self.problems, self.cached)

    def joined(self, other: "Predictions") -> "Predictions":
        """The predictions of both; no run may be in both."""
        both = Predictions({**self.sources, **other.sources})
        for one in (self, other):
            both.problems.update({name: text for name, text in one.problems.items() if name in one.sources})
            both.cached.update({name: content for name, content in one.cached.items() if name in one.sources})
        return both

    def content(self, datasets: Mapping[str, str]) -> bytes:
        """The published file; equal predictions give equal bytes. All predictions are read.

        A run whose labels differ from those of an earlier one is left out and reported.

        Args:
            datasets: The data set of each run, by run_id.
        """
        arrays: dict[str, np.ndarray] = {}
        for run_id in sorted(self.sources):
            predicted = self.of(run_id)
            if predicted is None:
                continue
            labels = {_labels(datasets[run_id], part, len(y)): y for part, y in predicted.labels.items()}
            if other := [name for name, y in labels.items() if not np.array_equal(arrays.get(name, y), y)]:
                self.problems[run_id] = (
                    f"The predictions of run {run_id} are left out: its {other[0]} differ from those of other runs, so "
                    "it was scored on other examples. Train it again on the same data."
                )
                continue
            arrays |= labels | {run_id + suffix: classes for suffix, classes in predicted.classes.items()}
        return _archive(arrays)


def of_record(path: Path, summary: Mapping[str, Any]) -> Predicted:
    """Read and check the predictions of a record.

    Args:
        path: The record's file.
        summary: The run's summary. Each accuracy in it must be that of the predictions.

    Raises:
        Damaged: if the file is damaged, too large, or does not belong to the summary.
    """
    try:
        arrays = _arrays(read_bytes(path, LARGEST_RECORD))
        return _checked(arrays, summary)
    except Exception as error:  # a damaged archive raises errors of many types
        reason = printable(" ".join(str(error).split()))[:200] or type(error).__name__
        raise Damaged(
            f"{path} cannot be used ({reason}): the run counts without its predictions; train it again to have them."
        ) from error


def published(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> Predictions:
    """The predictions in a folder of published results. Only the names of the arrays are read now.

    Args:
        path: The file.
        rows: The rows of runs.csv by run_id.

    Raises:
        ValueError: if it is not an archive of arrays.
        OSError: if it cannot be read.
    """
    try:
        arrays = np.load(io.BytesIO(read_bytes(path, LARGEST_PUBLISHED)), allow_pickle=False)
        names = set(arrays.files)
    except (zipfile.BadZipFile, AttributeError, EOFError) as error:
        raise ValueError(f"{path.name} is not an archive of arrays") from error

    def read(run_id: str) -> Predicted:
        parts = ("", "_mismatched")
        given = {part + end for part in parts for end in ("", _INT8) if run_id + part + end in names}
        try:
            contents = {f"{_PART}{suffix}": arrays[run_id + suffix] for suffix in given}
            for part in parts:
                if part in given:
                    name = _labels(rows[run_id]["dataset"], part, len(contents[_PART + part]))
                    contents[f"{_PART}{part}_{_LABELS}"] = arrays[name]
            return _checked(contents, rows[run_id])
        except Exception as error:  # as above
            raise RecordError(
                f"The predictions of run {run_id} in {path} are damaged ({error}): restore the file with git."
            ) from error

    return Predictions({run_id: partial(read, run_id) for run_id in rows if run_id in names})


def _labels(dataset: str, part: str, count: int) -> str:
    return f"{_LABELS}_{dataset}{part}_{count}"


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an archive whose inflated size is bounded.

    Raises:
        Exception: of many types, if it is damaged.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
    if sum(member.file_size for member in members) > LARGEST_RECORD or len(members) > 16:
        raise ValueError("it has more than any record's predictions")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _checked(arrays: Mapping[str, Any], summary: Mapping[str, Any]) -> Predicted:
    """The predictions and labels of all parts of the test set.

    Raises:
        ValueError: if arrays are missing, or not (N,) of the same type and length, or if an accuracy of the summary is
            not that of the predictions.
    """
    end = f"_{_LABELS}"
    labels = {name.removesuffix(end): array for name, array in arrays.items() if name.endswith(end)}
    predicted = {name: array for name, array in arrays.items() if not name.endswith(end)}
    if _PART not in predicted:
        raise ValueError(f"it has no array {_PART!r}")
    for name, array in predicted.items():
        truth = labels.get(name.removesuffix(_INT8))
        if truth is None or not name.startswith(_PART):
            raise ValueError(f"its array {name!r} has no labels")
        for one in (array, truth):
            if (
                not isinstance(one, np.ndarray)
                or one.dtype not in _TYPES
                or one.ndim != 1
                or not np.isfinite(one).all()
            ):
                raise ValueError(f"its array {name!r} or its labels are not one row of uint8 or of finite float32")
        if len(array) != len(truth) or array.dtype != truth.dtype or not len(array):
            raise ValueError(f"its array {name!r} has {len(array)} values of {array.dtype} for {len(truth)} labels")
        stated = summary.get(f"{name}_accuracy")
        if isinstance(stated, int | float) and not abs(np.mean(array == truth) - stated) < 1e-6:
            raise ValueError(f"{name!r} has accuracy {np.mean(array == truth):.6f}, but the summary says {stated:.6f}")
    return Predicted(
        {name.removeprefix(_PART): array for name, array in predicted.items()},
        {name.removeprefix(_PART): array for name, array in labels.items() if name in predicted},
    )


def _archive(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An .npz archive in the order of the names and without dates, as `np.savez` would add."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in sorted(arrays):
            array = io.BytesIO()
            np.lib.format.write_array(array, np.ascontiguousarray(arrays[name]), version=(1, 0), allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980
            member.compress_type, member.external_attr, member.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
            archive.writestr(member, array.getvalue(), compresslevel=9)
    return file.getvalue()
