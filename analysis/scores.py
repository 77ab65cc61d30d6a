"""Tables of test scores, shared by Table 1, Table 2 and the studies."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.cells import (
    averages,
    cells_in_order,
    compared,
    difference,
    interval,
    mean_columns,
    references,
    rounded,
    unmatched,
    values,
)
from analysis.contrasts import ACCURACY
from analysis.document import (
    SCORE_NOTE,
    SIGNIFICANCE_NOTE,
    formatted,
    measure,
    percent,
    score_text,
    signed,
    studied_columns,
)
from analysis.evidence import claim
from analysis.exhibit import View
from analysis.sentences import block_sentences, rows_of_cells
from analysis.statistics import Interval
from experiments.harness.runs.catalogue import MARGINS
from experiments.harness.runs.spec import Run, in_percent


@dataclass(frozen=True)
class Column:
    """A further column of a table of scores, after the score and its differences."""

    title: str
    numbers: Callable[[pd.DataFrame, Sequence[Run], int, Sequence[str]], Mapping[str, Sequence[Any]]]
    """Takes the runs by id, the cell of each row, the number of seeds and the fields declared to vary; returns columns
    of the table's numbers."""
    text: Callable[[pd.DataFrame], Sequence[str]]
    """Takes the table's numbers; returns the text of the column."""


def mean_column(title: str, name: str, source: str = "", *, factor: float = 1, digits: str = "significant") -> Column:
    """A column with the mean of a number in the runs' summaries and its 95 % interval.

    Args:
        title: The heading.
        name: The name of the column in the table's CSV.
        source: The name of the number in the summaries; by default `name`.
        factor: The factor applied to the numbers.
        digits: `significant` for three significant digits, or `score` for two decimals.
    """

    def numbers(
        runs: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str]
    ) -> Mapping[str, Sequence[Any]]:
        return mean_columns(name, averages(runs, cells, seeds, source or name, factor), counted=True)

    written = percent if digits == "score" else measure
    return Column(title, numbers, lambda table: written(table, name))


def compared_column(title: str, name: str, source: str, *, factor: float = 1, digits: str = "significant") -> Column:
    """As `mean_column`; the table's CSV also has the paired differences to other arms, as `<name>_over_sam` and so on.

    Args:
        title: The heading.
        name: The name of the column in the table's CSV.
        source: The name of the number in the summaries.
        factor: The factor applied to the numbers.
        digits: As in `mean_column`.
    """
    means = mean_column(title, name, source, factor=factor, digits=digits)

    def numbers(
        runs: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str]
    ) -> Mapping[str, Sequence[Any]]:
        columns: dict[str, list[Interval]] = {}
        for cell, others in references(cells, varies).items():
            for over, other in others.items():
                one = difference(cell, other, lambda c: factor * values(runs, c, seeds, source))
                columns.setdefault(over, []).append(one)
        by_name = (mean_columns(f"{name}_{over}", ones, counted=True) for over, ones in columns.items())
        paired = {key: column for each in by_name for key, column in each.items()}
        return {**means.numbers(runs, cells, seeds, varies), **paired}

    return Column(title, numbers, means.text)


def _train_accuracy(
    runs: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str]
) -> Mapping[str, Sequence[float]]:
    return {"train_accuracy": [mean.mean for mean in averages(runs, cells, seeds, "train_accuracy", 100)]}


COLUMNS = (
    Column(
        "train %",
        _train_accuracy,
        lambda table: [formatted(value, ".2f") for value in table["train_accuracy"]],
    ),
)
"""The further columns of every table of scores."""

LINEAR = "linear model (floor)"

NOTES = (
    f"{SCORE_NOTE}; differences are in percentage points and paired by seed. {SIGNIFICANCE_NOTE} "
    "Table 4 compares costs.",
    "Test accuracies are those of the last epoch, not of the best epoch.",
    "Seeds differ in initial weights and batch order. All seeds use the same subset of images, and the same wrong "
    "labels if there are any: the intervals do not cover the choice of images.",
)
NOTE_SAME_RHO = "mSAM is compared with SAM at the same rho, if there is one."
NOTE_SHARED = (
    "Over shared: over SAM on the same micro-batches with one perturbation for all of them. The two differ only in "
    "who shares a perturbation, which is the paper's idea{rhos}."
)

CLAIMS = tuple(claim(contrast) for contrast in ACCURACY)


def shows(cell: Run) -> bool:
    """Whether a cell is a training run."""
    return cell.kind == "train"


def numbers(
    frame: pd.DataFrame,
    cells: Sequence[Run],
    seeds: int,
    varies: Sequence[str] = (),
    columns: Sequence[Column] = COLUMNS,
) -> pd.DataFrame:
    """The test score of each cell, and its differences to other arms, paired by seed.

    Args:
        frame: one row for each finished run, as made by `frames.frame`.
        cells: specs at seed 0, one for each row, grouped in blocks that differ only in the fields that define an arm.
        seeds: the seeds 0, ..., seeds - 1 are expected and used.
        varies: the fields that the table's experiments declare to vary.
        columns: the further columns.

    Returns:
        One row for each cell, with its differences to the cells of `cells.references`.
    """
    ordered = cells_in_order(cells, varies)
    table, runs = compared(frame, ordered, seeds, varies), frame.set_index("run_id")
    for column in columns:
        table = table.join(rounded(pd.DataFrame(column.numbers(runs, ordered, seeds, varies))))
    return table


def text(view: View, columns: Sequence[Column] = COLUMNS) -> pd.DataFrame:
    """The score of each row, its differences, and the further columns."""
    table, rows = view.numbers, view.rows
    return pd.DataFrame(
        {
            "dataset": table["dataset"],
            "model": [LINEAR if row.model == "linear" else row.model for row in rows],
            "method": table["label"],
            **studied_columns(table),
            "rho": [f"{row.rho:g}" if row.rho else "" for row in rows],
            "test accuracy %": [score_text(row) + mark for row, mark in zip(rows, view.marks, strict=True)],
            "over base": [signed(interval(row, "over_base")) for row in rows],
            "over SAM": [signed(interval(row, "over_sam")) for row in rows],
            **({"over shared": [signed(interval(row, "over_shared")) for row in rows]} if _shared(table) else {}),
            **{column.title: column.text(table) for column in columns},
        }
    )


def sentences(view: View, expected: int = 1) -> list[str]:
    """The differences of each block, and the missing comparisons; `expected` is the sign that the paper claims."""
    cells = view.target.cells
    return [*block_sentences(view, expected, margin_of(cells[0])), *unmatched(cells, view.target.varies)]


def margin_of(cell: Run) -> float:
    """The margin of equivalence of a cell's scores, in points; NaN if they are not in percent."""
    return MARGINS[cell.profile] if in_percent(cell.score) else math.nan


def notes(view: View) -> Iterable[str]:
    """Explain how to read a table of scores."""
    sams = view.numbers[view.numbers["method"] == "sam"]
    yield from NOTES
    if sams.groupby("block")["rho"].nunique().gt(1).any():
        yield NOTE_SAME_RHO
    if _shared(view.numbers):
        yield NOTE_SHARED.format(rhos=_differing_rhos(view))


def _differing_rhos(view: View) -> str:
    """Which rows have another rho than SAM on the same micro-batches, each with the rho that was chosen for it."""
    others = view.target.references
    differing = [
        row.label
        for cell, row in rows_of_cells(view).items()
        if (other := others[cell].get("over_shared")) and other.flat["rho"] != cell.flat["rho"]
    ]
    return f", and in their rho ({'; '.join(differing)})" if differing else ""


def _shared(table: pd.DataFrame) -> bool:
    """Whether a row is compared with SAM on micro-batches."""
    return "over_shared" in table and bool(table["over_shared_n"].any())
