"""Run folders -> data frames -> the files of `results/`, and back without loss.

runs.csv           one row a run: what it was, what came out, and the code and machine behind it
curves.csv         one row an epoch of a run
provenance.jsonl   one line a run: every session that worked on it
"""

import dataclasses
import io
import json
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.harness.runs.files import RecordError, replacing
from experiments.harness.runs.record import Record
from experiments.harness.runs.spec import METHODS, Spec

FIRST = (
    "run_id",
    "profile",
    "dataset",
    "model",
    "method",
    "base_optimizer",
    "rho",
    "micro_batches",
    "seed",
)
SUMMARY = (
    "test_accuracy",
    "test_score",
    "test_loss",
    "holdout_accuracy",
    "holdout_score",
    "holdout_loss",
    "train_accuracy",
    "train_loss",
    "sharpness",
    "wall_seconds",
    "step_seconds",
    "steps",
    "parameters",
)
PROVENANCE = ("commit", "dirty", "code", "data_checksum", "torch", "cpu", "cpu_capability", "gpu")

UNKNOWN = "unknown"
"""Stands for a commit or code hash that no session noted."""

_PRIVATE = ("host", "hostname", "node", "user", "cwd", "path", "paths", "executable", "argv")
"""Keys of a session that name a machine or a person, and stay out of files that are committed."""

_DTYPES = {str: "string", int: "Int64", float: "Float64", bool: "boolean"}


class Lines:
    """The lines of a metrics.jsonl by column, numbers as arrays: dicts of as many lines would fill the memory."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Take the lines; a column that some of them lack has None there."""
        lines = [_plain_keys(line) for line in lines]
        self.count = len(lines)
        names = dict.fromkeys(name for line in lines for name in line)
        self.columns = {name: _packed([line.get(name) for line in lines]) for name in names}

    def column(self, name: str) -> np.ndarray | list[Any]:
        """Its values; None for each line if there is no such column."""
        return self.columns.get(name, [None] * self.count)


@dataclass(frozen=True)
class Run:
    """One finished run, read."""

    spec: Spec
    summary: dict[str, Any]
    metrics: Lines | Sequence[Mapping[str, Any]]
    sessions: list[dict[str, Any]]


@dataclass(frozen=True)
class Unfinished:
    """A run that was begun and has no summary."""

    spec: Spec
    failure: str | None
    """Why its last attempt failed; None if it is at work or was interrupted."""


@dataclass(frozen=True)
class Collected:
    """All that a results root holds."""

    finished: tuple[Run, ...]
    unfinished: tuple[Unfinished, ...]
    problems: tuple[str, ...]
    """A sentence for each folder that could not be read; nothing was done to it."""

    @property
    def failures(self) -> dict[str, str]:
        """Why runs failed, by run_id."""
        return {u.spec.run_id: u.failure for u in self.unfinished if u.failure is not None}


def finished_runs(root: Path) -> set[str]:
    """The names of the folders of `root/runs` that have a summary; nothing in them is read.

    Raises:
        RecordError: if `root` is not a folder that can be listed.
    """
    return {folder.name for folder in _folders(root) if (folder / "summary.json").exists()}


def collect(root: Path, curves_of: Collection[str] | None = None) -> Collected:
    """Read every folder of `root/runs`; what cannot be read becomes a sentence and is left alone.

    Args:
        root: The results root.
        curves_of: The runs whose metrics are wanted, most of what there is to read; None for all.

    Raises:
        RecordError: if `root` is not a folder that can be listed.
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


@dataclass(frozen=True)
class Results:
    """The contents of runs.csv, curves.csv and provenance.jsonl."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    provenance: dict[str, list[dict[str, Any]]]

    @classmethod
    def of(cls, runs: Iterable[Run]) -> "Results":
        """The files' contents for these runs."""
        runs = list(runs)
        sessions = {run.spec.run_id: [_public(s) for s in run.sessions] for run in runs}
        return cls(frame(runs), curves(runs), sessions)

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Read the three files.

        Raises:
            RecordError: if one of them is missing or damaged.
        """
        try:
            lines = [json.loads(line) for line in _text(folder / "provenance.jsonl").splitlines()]
            provenance = {line["run_id"]: line["sessions"] for line in lines}
            runs, curves = (parse(_text(folder / f"{name}.csv")) for name in ("runs", "curves"))
            if lost := sorted(set(FIRST) - set(runs.columns)):
                raise ValueError(f"runs.csv has no column {lost[0]!r}")
            return cls(_as_before(runs, provenance), curves, provenance)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"The published files of {folder} cannot be read ({plain(str(error))}): restore them with git."
            ) from error

    def only(self, run_ids: Collection[str]) -> "Results":
        """The part that belongs to these runs."""
        return Results(
            self.runs[self.runs["run_id"].isin(run_ids)],
            self.curves[self.curves["run_id"].isin(run_ids)],
            {k: v for k, v in self.provenance.items() if k in run_ids},
        )

    def joined(self, other: "Results") -> "Results":
        """Both together; the runs must differ."""
        return Results(
            _runs([*_rows(self.runs), *_rows(other.runs)]),
            _curves([*_by_run(self.curves), *_by_run(other.curves)]),
            self.provenance | other.provenance,
        )

    def texts(self) -> dict[str, str]:
        """The three files' texts by name; equal contents give equal bytes."""
        lines = [
            json.dumps({"run_id": run_id, "sessions": self.provenance[run_id]}, sort_keys=True) + "\n"
            for run_id in sorted(self.provenance)
        ]
        return {
            "runs.csv": csv_text(self.runs),
            "curves.csv": csv_text(self.curves),
            "provenance.jsonl": "".join(lines),
        }


def _as_before(runs: pd.DataFrame, provenance: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """The rows with the columns that there were none of when they were written.

    Fields of specs have their defaults, which mean "as before"; what the sessions say is taken from them.
    """
    known, rows = _known_dtypes(), _rows(runs)
    for name in PROVENANCE:
        if name not in runs:
            said = [_provenance(provenance.get(row["run_id"]) or [{}])[name] for row in rows]
            runs = runs.assign(**{name: _column(said, known.get(name))})
    new = {
        field.name: field.default
        for field in dataclasses.fields(Spec)
        if field.default not in (dataclasses.MISSING, None) and (field.name not in runs or runs[field.name].hasnans)
    }
    return runs.assign(**{n: pd.array([r.get(n, d) for r in rows], dtype=known[n]) for n, d in new.items()})


def frame(runs: Iterable[Run]) -> pd.DataFrame:
    """One row a run: the columns of `FIRST`, the other fields of the spec, the summary, `PROVENANCE`."""
    return _runs([_row(run) for run in runs])


def curves(runs: Iterable[Run]) -> pd.DataFrame:
    """One row for each line of a run's metrics: `run_id`, `epoch`, then whatever the line says."""
    found = [(run.spec.run_id, run.metrics) for run in runs]
    return _curves([(run_id, lines if isinstance(lines, Lines) else Lines(lines)) for run_id, lines in found])


def csv_text(table: pd.DataFrame) -> str:
    """The table as CSV: floats with all the digits that they need, nothing for what is missing."""
    return table.to_csv(index=False, lineterminator="\n")


def parse(text: str) -> pd.DataFrame:
    """The inverse of `csv_text`."""
    table = _texts(text)
    known = _known_dtypes()
    return pd.DataFrame({name: _typed(table[name], known.get(str(name))) for name in table})


def _texts(text: str) -> pd.DataFrame:
    """A CSV's cells as texts, nothing where they are empty; a line of nothing is a row too."""
    return pd.read_csv(io.StringIO(text), dtype="string", keep_default_na=False, na_values=[""], skip_blank_lines=False)


def write_files(folder: Path, texts: Mapping[str, str | bytes]) -> None:
    """Write each text, or picture, to its place below `folder`, file by file: a reader sees the old or the new one.

    Raises:
        RecordError: if the folder cannot be written.
    """
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            content = text.encode("utf-8") if isinstance(text, str) else text
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise RecordError(
            f"{folder} cannot be written ({error.strerror}): make room, or choose another folder with --results."
        ) from error


def plain(text: str) -> str:
    """The text on one line, without control characters and without halves of surrogate pairs."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text.encode("utf-8", "replace").decode("utf-8"))


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise RecordError(f"There is no results folder {root}: name the one that holds runs/ with --results.")
    try:
        return sorted(p for p in (root / "runs").iterdir() if not p.name.startswith(".") and not _empty(p))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RecordError(f"{root / 'runs'} cannot be read ({error.strerror}).") from error


def _empty(folder: Path) -> bool:
    """Whether the folder holds nothing but a lock: a run that is about to begin, or was removed."""
    try:
        return folder.is_dir() and all(path.name == "lock" for path in folder.iterdir())
    except OSError:
        return False


def _read(record: Record, with_curves: bool) -> Run | Unfinished:
    if not record.folder.is_dir():
        raise RecordError(f"{record.folder} is not a run's folder: move it out of the results.")
    spec = record.spec()
    if not record.done:
        failure = record.failure()
        return Unfinished(spec, None if failure is None else plain(failure)[:200])
    try:
        sessions = record.environments()
    except RecordError:
        sessions = []
    return Run(spec, record.summary(), Lines(record.metrics() if with_curves else ()), sessions)


def _row(run: Run) -> dict[str, Any]:
    sessions = run.sessions or [{}]
    row = {
        "run_id": run.spec.run_id,
        "method": run.spec.method,
        **run.spec.to_dict(),
        **_provenance(sessions),
    }
    for key, value in _plain_keys(run.summary).items():
        if key not in row:
            row[key] = value
        elif row[key] != value:
            row[f"summary_{key}"] = value
    return row


def _provenance(sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of `PROVENANCE`."""
    within = {"torch": "packages", "cpu_capability": "torch_flags"}
    parts = {key: [_mapping(session.get(name)) for session in sessions] for key, name in within.items()}
    told = {key: _together(parts.get(key, sessions), key) for key in PROVENANCE}
    told |= {key: told[key] or UNKNOWN for key in ("commit", "code")}
    # Of a measured network's training too: what it was trained by decides what is found.
    networks = [session["network_dirty"] for session in sessions if "network_dirty" in session]
    return told | {"dirty": _any([*(session.get("dirty") for session in sessions), *networks])}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _together(sessions: Sequence[Mapping[str, Any]], key: str) -> str | None:
    """What the sessions say, each different thing once; None if none of them says anything."""
    said = [s.get(key) for s in sessions]
    if all(value is None for value in said):
        return None
    return "+".join(dict.fromkeys(UNKNOWN if v is None else _unpath(plain(str(v))) for v in said))


def _any(flags: Sequence[Any]) -> bool | None:
    """True if one is, None if one is not known."""
    if any(flag is True for flag in flags):
        return True
    return False if all(flag is False for flag in flags) else None


def _plain_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_name(key): value if type(value) in _NUMBERS else _scalar(value) for key, value in values.items()}


_NUMBERS = (float, int, bool, type(None))


@lru_cache(maxsize=10_000)
def _name(key: str) -> str:
    """A column's name; the same few keys are on every line."""
    return plain(str(key))


def _scalar(value: Any) -> Any:
    """A value for one cell; the record writes numbers that are not finite as their names."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else plain(value)
    if isinstance(value, Mapping | list):
        return plain(json.dumps(value))
    return value


def _public(value: Any) -> Any:
    """A session's entry without names of machines and people, and with paths cut to their last part."""
    if isinstance(value, Mapping):
        return {str(k): _public(v) for k, v in value.items() if str(k).lower() not in _PRIVATE}
    if isinstance(value, list):
        return [_public(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return _unpath(plain(value)) if isinstance(value, str) else value


def _unpath(text: str) -> str:
    """The text with every absolute path cut to its last part; web addresses stay."""
    return re.sub(r"(?:file://|(?<![\w.:/)\]}]))/(?:[^\s/'\"=,;:]+/)*([^\s/'\"=,;:]*)/?", r"\1", text)


def _runs(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    rows = sorted(rows, key=_order)
    known = [*FIRST, *(f.name for f in dataclasses.fields(Spec) if f.name not in FIRST)]
    told = {key for row in rows for key in row} - set(known) - set(PROVENANCE)
    summary = [*(k for k in SUMMARY if k in told), *sorted(told - set(SUMMARY))]
    return _table(rows, [*known, *summary, *PROVENANCE])


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("micro_batches", "rho", "learning_rate", "seed", "run_id")
    place = METHODS.index(row["method"]) if row["method"] in METHODS else len(METHODS)
    return (
        row["profile"],
        row["dataset"],
        row["model"],
        row["base_optimizer"],
        place,
        *(row[n] for n in names),
    )


def _curves(found: Iterable[tuple[str, Lines]]) -> pd.DataFrame:
    """The lines of all runs, a run behind the other in the order of their names."""
    found = sorted(found, key=lambda one: one[0])
    told = sorted({name for _, lines in found for name in lines.columns} - {"run_id", "epoch"})
    names = np.repeat(np.array([run_id for run_id, _ in found], dtype=object), [lines.count for _, lines in found])
    columns = {"run_id": pd.array(names, dtype="string")}
    known = _known_dtypes()
    for name in ("epoch", *told):
        columns[name] = _joined([lines.column(name) for _, lines in found], known.get(name))
    return pd.DataFrame(columns)


def _packed(values: list[Any]) -> np.ndarray | list[Any]:
    """Floats, or whole numbers, as an array; anything else as it is."""
    kinds = set(map(type, values))
    if kinds == {float}:
        return np.array(values)
    return np.array(values) if kinds == {int} and max(map(abs, values)) < 10**18 else values


def _joined(parts: Sequence[np.ndarray | list[Any]], dtype: str | None) -> pd.api.extensions.ExtensionArray | pd.Series:
    """A column from those of all runs."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    others = [part for part in parts if not isinstance(part, np.ndarray)]
    if not arrays or dtype or any(value is not None for part in others for value in part):
        return _column(
            [value for part in parts for value in (part if isinstance(part, list) else part.tolist())], dtype
        )
    missing = np.concatenate([np.full(len(part), isinstance(part, list)) for part in parts])
    zeros = [part if isinstance(part, np.ndarray) else np.zeros(len(part), dtype=int) for part in parts]
    numbers = np.concatenate(zeros)
    numbers = np.where(missing, math.nan, numbers) if numbers.dtype == float else numbers
    if numbers.dtype == float:
        return pd.array(numbers, dtype="Float64")
    return pd.arrays.IntegerArray(numbers, missing)


def _by_run(curves: pd.DataFrame) -> list[tuple[str, Lines]]:
    """The inverse of `_curves`."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(curves):
        rows.setdefault(row.pop("run_id"), []).append(row)
    return [(run_id, Lines(lines)) for run_id, lines in rows.items()]


def _table(rows: Sequence[Mapping[str, Any]], columns: list[str]) -> pd.DataFrame:
    """Rows as a frame that has been through CSV: it is what reading the written file gives."""
    known = _known_dtypes()
    return pd.DataFrame({name: _column([row.get(name) for row in rows], known.get(name)) for name in columns})


def _column(values: list[Any], dtype: str | None) -> pd.api.extensions.ExtensionArray | pd.Series:
    """A column as its text would be read back: numbers at once, anything else through its text."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {bool} and dtype in (None, "boolean"):
        return pd.array(values, dtype="boolean")
    if kinds <= {int} and dtype in (None, "Int64") and all(v is None or abs(v) < 10**18 for v in values):
        return pd.array(values, dtype="Int64")
    if kinds and kinds <= {int, float} and (float in kinds if dtype is None else dtype == "Float64"):
        numbers = np.array([math.nan if value is None else value for value in values], dtype=float)
        return pd.array(numbers, dtype="Float64")
    texts = csv_text(pd.DataFrame({"column": pd.Series(values, dtype=object)}))
    return _typed(_texts(texts)["column"], dtype)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not pd.isna(v)} for row in table.astype(object).to_dict("records")]


def _typed(texts: pd.Series, dtype: str | None) -> pd.Series:
    """A column as its type; if that is not known, as the narrowest one that all of its texts fit."""
    for name in [dtype] if dtype else ["Int64", "Float64", "boolean"]:
        try:
            return pd.Series([pd.NA if pd.isna(t) else _PYTHON[name](t) for t in texts], dtype=name)
        except (ValueError, OverflowError):
            if dtype:
                raise
    return texts


def _number(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def _flag(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(f"{text!r} is neither True nor False")
    return text == "True"


_PYTHON: dict[str, Callable[[Any], Any]] = {"string": str, "Int64": _number, "Float64": float, "boolean": _flag}


def _known_dtypes() -> dict[str, str]:
    dtypes = {name: _dtype(hint) for name, hint in typing.get_type_hints(Spec).items()}
    texts = ("run_id", "method", *PROVENANCE)
    return dtypes | dict.fromkeys(texts, "string") | {"dirty": "boolean"}


def _dtype(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    return _DTYPES[hint]


def _text(path: Path) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()
