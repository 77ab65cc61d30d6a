"""Runs to data frames to the files of `results/`, and back without loss.

runs.csv           one row for each run: its spec, its results, its code and its machine
curves.csv         one row for each epoch of a run
provenance.jsonl   one line for each run: all its sessions
predictions.npz    the predicted classes of each run, if any run has them; only in published results
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.arms import METHODS
from analysis.collect import Finished, Lines, Unfinished, plain, plain_keys
from analysis.columns import PROVENANCE, column_of, csv_text, joined_column, known_dtypes, parse
from analysis.predictions import NAME, Predictions, of_record, published
from experiments.harness.runs.files import RecordError, replacing
from experiments.harness.runs.run import defaults, in_order

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
    "test_ece",
    "test_int8_accuracy",
    "test_int8_score",
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

UNKNOWN = "unknown"
"""Replaces a commit or code hash that no session recorded."""

_PRIVATE = ("host", "hostname", "node", "user", "cwd", "path", "paths", "executable", "argv")
"""Keys of a session that name a machine or a person. Committed files leave them out."""


@dataclass(frozen=True)
class Results:
    """The contents of runs.csv, curves.csv, provenance.jsonl and predictions.npz."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    provenance: dict[str, list[dict[str, Any]]]
    under_way: pd.DataFrame = field(default_factory=lambda: _curves([]))
    """The curves of runs that are not finished, so far; they are in curves.csv, but never committed."""
    predictions: Predictions = field(default_factory=Predictions)
    """The predictions of finished training runs on the test set, read when they are asked for."""

    @classmethod
    def of(cls, runs: Iterable[Finished], under_way: Iterable[Unfinished] = ()) -> "Results":
        """The contents of the files for these runs."""
        runs = list(runs)
        sessions = {run.spec.run_id: [_public(s) for s in run.sessions] for run in runs}
        sources = {
            run.spec.run_id: partial(of_record, run.predictions, run.summary)
            for run in runs
            if run.predictions and run.spec.kind == "train" and not run.spec.flat["holdout_examples"]
        }
        return cls(frame(runs), curves(runs), sessions, curves(under_way), Predictions(sources))

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Read the files; results without predictions.npz have no predictions.

        Raises:
            RecordError: if one of the others is missing, or one is damaged.
        """
        try:
            lines = [json.loads(line) for line in _text(folder / "provenance.jsonl").splitlines()]
            provenance = {line["run_id"]: line["sessions"] for line in lines}
            runs, curves = (parse(_text(folder / f"{name}.csv")) for name in ("runs", "curves"))
            if absent := sorted(set(FIRST) - set(runs.columns)):
                raise ValueError(f"runs.csv has no column {absent[0]!r}")
            runs = _as_before(runs, provenance)
            return cls(runs, curves, provenance, predictions=_predictions(folder / NAME, runs))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"The published files of {folder} cannot be read ({plain(str(error))}): restore them with git."
            ) from error

    def only(self, run_ids: Collection[str]) -> "Results":
        """The rows of these runs."""
        return Results(
            self.runs[self.runs["run_id"].isin(run_ids)],
            self.curves[self.curves["run_id"].isin(run_ids)],
            {k: v for k, v in self.provenance.items() if k in run_ids},
            self.under_way[self.under_way["run_id"].isin(run_ids)],
            self.predictions.only(run_ids),
        )

    def joined(self, other: "Results") -> "Results":
        """The rows of both; no run may be in both."""
        return Results(
            _runs([*rows_of(self.runs), *rows_of(other.runs)]),
            _curves([*_by_run(self.curves), *_by_run(other.curves)]),
            self.provenance | other.provenance,
            predictions=self.predictions.joined(other.predictions),
        )

    def predicted(self) -> bytes:
        """The content of predictions.npz; all predictions are read."""
        return self.predictions.content(dict(zip(self.runs["run_id"], self.runs["dataset"], strict=True)))

    def texts(self) -> dict[str, str]:
        """The texts of the three text files by name; equal contents give equal bytes."""
        lines = [
            json.dumps({"run_id": run_id, "sessions": self.provenance[run_id]}, sort_keys=True) + "\n"
            for run_id in sorted(self.provenance)
        ]
        every = self.curves
        if len(self.under_way):
            every = _curves([*_by_run(self.curves), *_by_run(self.under_way)])
        return {
            "runs.csv": csv_text(self.runs),
            "curves.csv": csv_text(every),
            "provenance.jsonl": "".join(lines),
        }


def frame(runs: Iterable[Finished]) -> pd.DataFrame:
    """One row for each run: the columns of `FIRST`, the other fields of the spec, the summary, `PROVENANCE`."""
    return _runs([_row(run) for run in runs])


def curves(runs: Iterable[Finished | Unfinished]) -> pd.DataFrame:
    """One row for each line of a run's metrics: `run_id`, `epoch`, then the other keys of the line."""
    metrics = [(run.spec.run_id, run.metrics) for run in runs]
    return _curves([(run_id, lines if isinstance(lines, Lines) else Lines(lines)) for run_id, lines in metrics])


def write_files(folder: Path, texts: Mapping[str, str | bytes]) -> None:
    """Write each text or image to its path below `folder`. Readers see either the old or the new file.

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
            f"{folder} cannot be written ({error.strerror}): free some space, or give another folder with --results."
        ) from error


def _predictions(path: Path, runs: pd.DataFrame) -> Predictions:
    """The published predictions of these runs; none without the file."""
    if not path.exists():
        return Predictions()
    accuracies = [name for name in runs if str(name).endswith("_accuracy")]
    rows = rows_of(runs[["run_id", "dataset", *accuracies]])
    return published(path, {row["run_id"]: row for row in rows})


def _as_before(runs: pd.DataFrame, provenance: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Add the columns that did not exist when the rows were written.

    Fields of specs get their defaults, which mean "as before"; provenance comes from the sessions.
    """
    known, rows = known_dtypes(), rows_of(runs)
    for name in PROVENANCE:
        if name not in runs:
            column = [_provenance(provenance.get(row["run_id"]) or [{}])[name] for row in rows]
            runs = runs.assign(**{name: column_of(column, known.get(name))})
    new = {
        name: default
        for name, default in defaults().items()
        if default is not None and (name not in runs or runs[name].hasnans)
    }
    return runs.assign(**{n: pd.array([r.get(n, d) for r in rows], dtype=known[n]) for n, d in new.items()})


def _runs(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    rows = sorted(rows, key=_order)
    known = [*FIRST, *(name for name in in_order() if name not in FIRST)]
    others = {key for row in rows for key in row} - set(known) - set(PROVENANCE)
    summary = [*(k for k in SUMMARY if k in others), *sorted(others - set(SUMMARY))]
    return _table(rows, [*known, *summary, *PROVENANCE])


def _row(run: Finished) -> dict[str, Any]:
    sessions = run.sessions or [{}]
    row = {
        "run_id": run.spec.run_id,
        "method": run.spec.method,
        **run.spec.flat,
        **_provenance(sessions),
    }
    for key, value in plain_keys(run.summary).items():
        if key not in row:
            row[key] = value
        elif row[key] != value:
            row[f"summary_{key}"] = value
    return row


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


def _table(rows: Sequence[Mapping[str, Any]], columns: list[str]) -> pd.DataFrame:
    """The rows as a frame, equal to what reading it back from CSV gives."""
    known = known_dtypes()
    return pd.DataFrame({name: column_of([row.get(name) for row in rows], known.get(name)) for name in columns})


def _provenance(sessions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of `PROVENANCE`."""
    within = {"torch": "packages", "cpu_capability": "torch_flags"}
    parts = {key: [_mapping(session.get(name)) for session in sessions] for key, name in within.items()}
    joined = {key: _together(parts.get(key, sessions), key) for key in PROVENANCE}
    joined |= {key: joined[key] or UNKNOWN for key in ("commit", "code")}
    # A measurement depends on the code that trained its network too.
    networks = [session["network_dirty"] for session in sessions if "network_dirty" in session]
    return joined | {"dirty": _any([*(session.get("dirty") for session in sessions), *networks])}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _together(sessions: Sequence[Mapping[str, Any]], key: str) -> str | None:
    """The distinct values of the sessions, joined with +; None if no session has one."""
    values = [s.get(key) for s in sessions]
    if all(value is None for value in values):
        return None
    return "+".join(dict.fromkeys(UNKNOWN if v is None else _unpath(plain(str(v))) for v in values))


def _any(flags: Sequence[Any]) -> bool | None:
    """True if any flag is true, else None if any is unknown."""
    if any(flag is True for flag in flags):
        return True
    return False if all(flag is False for flag in flags) else None


def _public(value: Any) -> Any:
    """A session's entry without names of machines and people, with paths cut to their last part."""
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


def _curves(by_run: Iterable[tuple[str, Lines]]) -> pd.DataFrame:
    """The lines of all runs, sorted by run id."""
    by_run = sorted(by_run, key=lambda pair: pair[0])
    others = sorted({name for _, lines in by_run for name in lines.columns} - {"run_id", "epoch"})
    names = np.repeat(np.array([run_id for run_id, _ in by_run], dtype=object), [lines.count for _, lines in by_run])
    columns = {"run_id": pd.array(names, dtype="string")}
    known = known_dtypes()
    for name in ("epoch", *others):
        columns[name] = joined_column([lines.column(name) for _, lines in by_run], known.get(name))
    return pd.DataFrame(columns)


def _by_run(curves: pd.DataFrame) -> list[tuple[str, Lines]]:
    """The inverse of `_curves`."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(curves):
        rows.setdefault(row.pop("run_id"), []).append(row)
    return [(run_id, Lines(lines)) for run_id, lines in rows.items()]


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as dicts without missing values."""
    return [{k: v for k, v in row.items() if not pd.isna(v)} for row in table.astype(object).to_dict("records")]


def _text(path: Path) -> str:
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()
