"""Table 2: scores on GLUE, a column a task."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.arms import method_name
from analysis.cells import DIGITS, claims, interval, values, verdict
from analysis.document import Document, formatted, make_document, plain_table, row_notes, score_text, signed
from analysis.exhibits.table1 import table_1
from analysis.statistics import Interval, mean_interval
from experiments.harness.spec import METRICS, Spec

NOTES_2 = (
    "Scores are mean ± half-width of the 95 % Student t interval (number of seeds), times 100, on the validation split "
    "after the last epoch: {metrics}. Differences are paired by seed. Intervals are for one comparison at a time.",
    "The majority row always gives the commonest label of the training set.",
)

FURTHER = {
    "mrpc": ("test_f1", "F1"),
    "qqp": ("test_f1", "F1"),
    "stsb": ("test_spearman", "Spearman correlation"),
    "mnli": ("test_mismatched_score", "accuracy on the mismatched part"),
}
"""The second official metric of a GLUE task that has one."""


def table_2(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """`table_1` of text tasks, with the score of whoever always gives the commonest answer (`majority`)."""
    numbers, runs = table_1(frame, cells, seeds), frame.set_index("run_id")
    found = {cell: values(runs, cell, seeds, "test_majority") for cell in cells}
    known = {cell.dataset: 100 * majority.mean() for cell, majority in found.items() if len(majority)}
    numbers["majority"] = numbers["dataset"].map(known).astype(float).round(DIGITS)
    return numbers


def further_metrics(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> list[str]:
    """A line for each model and task with a second official metric: what each method has of it, times 100."""
    runs, found = frame.set_index("run_id"), defaultdict(list)
    for cell in cells:
        column, words = FURTHER.get(cell.dataset, ("", ""))
        known = mean_interval(100 * values(runs, cell, seeds, column))
        if known.n:
            half = f" ± {known.half_width:.2f}" if known.n > 1 else ""
            told = f"{method_name(cell)} {known.mean:.2f}{half} ({known.n})"
            found[f"{cell.model}, {cell.dataset}, {words}"].append(told)
    return [f"{name}: {', '.join(told)}." for name, told in found.items()]


def over_majority(numbers: pd.DataFrame) -> list[str]:
    """Whether the base optimizer of each block of `table_2` beats the commonest answer by more than its interval."""
    lines = []
    for row in numbers[(numbers["method"] == "base") & (numbers["n"] > 0)].itertuples():
        found = Interval(row.mean - row.majority, row.half_width, int(row.n))
        lines.append(f"{row.model}, {row.dataset}: {row.label} over the majority class: {verdict(found)}.")
    return lines


@dataclass(frozen=True)
class WideDocument(Document):
    """A table with a column for each task: on a terminal the committed one stands below it."""

    def terminal(self, committed: pd.DataFrame | None = None) -> str:
        """Plain text; the committed numbers as a second table."""
        parts = [f"{self.title}\n{self.origin}", plain_table(self.cells)]
        if committed is not None:
            parts += ["Committed", plain_table(wide(committed))]
        return "\n\n".join([*parts, *filter(None, ["\n".join(self.claims), "\n".join(self.notes)])])


def wide(numbers: pd.DataFrame, marks: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of `table_2` with a column for each task: scores first, then what they are over each other."""
    tasks = list(dict.fromkeys(numbers["dataset"]))
    marks = marks or [""] * len(numbers)
    texts: dict[tuple[str, str], dict[str, str]] = {}
    for model, block in numbers.groupby("model", sort=False):
        rows = [(row, marks[row.Index]) for row in block.itertuples()]
        base = next((row.label for row, _ in rows if row.method == "base"), "base")
        sam = next((row.label for row, _ in rows if row.method == "sam"), "SAM")
        for row, _ in rows:
            texts.setdefault((model, "majority class"), {})[row.dataset] = formatted(row.majority, ".2f")
        for row, mark in rows:
            texts.setdefault((model, row.label), {})[row.dataset] = score_text(row) + mark
        for column, other in (("over_base", base), ("over_sam", sam)):
            for row, _ in rows:
                if other != row.label and (column == "over_base" or row.method == "msam"):
                    texts.setdefault((model, f"{row.label} over {other}"), {})[row.dataset] = signed(
                        interval(row, column)
                    )
    found = [
        {"model": model, "method": label, **{t: told.get(t, "") for t in tasks}}
        for (model, label), told in texts.items()
    ]
    return pd.DataFrame(found)


def document_2(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
) -> Document:
    """Table 2, or the part of it that one experiment fills, ready to be written."""
    numbers = table_2(frame, cells, seeds)
    marks, notes = row_notes(numbers, failures or {})
    metrics = ", ".join(f"{dataset} {METRICS[dataset]}" for dataset in dict.fromkeys(numbers["dataset"]))
    radii = [
        f"{model}, {label}: rho " + ", ".join(f"{row.rho:g} on {row.dataset}" for row in rows.itertuples()) + "."
        for (model, label), rows in numbers[numbers["rho"] > 0].groupby(["model", "label"], sort=False)
    ]
    return make_document(
        (name, frame, cells, seeds),
        numbers,
        wide(numbers, marks),
        title=f"{name}: GLUE",
        claims=(
            *radii,
            *further_metrics(frame, cells, seeds),
            *over_majority(numbers),
            *claims(numbers),
        ),
        notes=(*notes, *(note.format(metrics=metrics) for note in NOTES_2)),
        kind=WideDocument,
    )
