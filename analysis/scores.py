"""Tables of test scores: what Table 1, Table 2 and the studies have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.cells import (
    averages,
    block_sentences,
    blocks,
    cells_in_order,
    compared,
    interval,
    mean_columns,
    rounded,
    run_ids,
    unmatched,
    values,
)
from analysis.document import SCORE_NOTE, formatted, measure, percent, score_text, signed, studied_columns
from analysis.evidence import of_scores
from analysis.exhibit import Claim, View
from analysis.statistics import mean_interval
from experiments.harness.runs.methods import ARMS
from experiments.harness.runs.spec import Run

Cells = Sequence[Run | None]
"""One for each row of a table; None where the row has none."""


@dataclass(frozen=True)
class Column:
    """A column of a table of scores, behind the score and its differences."""

    title: str
    numbers: Callable[[pd.DataFrame, Cells, int], Mapping[str, Sequence[Any]]]
    """From the runs by id, the cell of each row, and the number of seeds: columns of the table's numbers."""
    text: Callable[[pd.DataFrame], Sequence[str]]
    """From the table's numbers: the cells of the column."""
    measured: bool = False
    """Whether it is of the curvature runs of the rows' networks; it is shown if there are some."""


def mean_column(
    title: str, name: str, source: str = "", *, factor: float = 1, measured: bool = False, digits: str = "significant"
) -> Column:
    """The mean of a number of the runs' summaries, with its 95 % interval.

    Args:
        title: Heading.
        name: Of the column in the table's CSV.
        source: Of the number in the summaries; left out, the same.
        factor: That the numbers are multiplied by.
        measured: As in `Column`.
        digits: `significant`, three of them, or `score`, two decimals.
    """

    def numbers(runs: pd.DataFrame, cells: Cells, seeds: int) -> Mapping[str, Sequence[Any]]:
        return mean_columns(name, averages(runs, cells, seeds, source or name, factor), counted=True)

    written = percent if digits == "score" else measure
    return Column(title, numbers, lambda table: written(table, name), measured)


def _train_accuracy(runs: pd.DataFrame, cells: Cells, seeds: int) -> Mapping[str, Sequence[float]]:
    found = averages(runs, cells, seeds, "train_accuracy", 100)
    return {"train_accuracy": [one.mean for one in found if one]}


def _times(runs: pd.DataFrame, cells: Cells, seeds: int) -> Mapping[str, Sequence[float]]:
    """Seconds of a run, and their ratio to those of the block's base optimizer."""
    seconds, ratios = [], []
    for block in blocks([cell for cell in cells if cell]):
        base = next((cell for cell in block if cell.method == "base"), None)
        usual = mean_interval(values(runs, base, seeds, "wall_seconds")).mean if base else float("nan")
        for cell in block:
            seconds.append(mean_interval(values(runs, cell, seeds, "wall_seconds")).mean)
            ratios.append(seconds[-1] / usual if usual else float("nan"))
    return {"wall_seconds": seconds, "relative_time": ratios}


def _time(row: Any) -> str:
    seconds = formatted(row.wall_seconds, ".0f" if row.wall_seconds >= 10 else ".1f")
    ratio = "" if pd.isna(row.relative_time) else f" (x{row.relative_time:.2f})"
    return f"{seconds} s{ratio}" if seconds else ""


COLUMNS = (
    Column(
        "train accuracy %",
        _train_accuracy,
        lambda table: [formatted(value, ".2f") for value in table["train_accuracy"]],
    ),
    mean_column("lambda 1", "lambda_1", "train_lambda_1", measured=True),
    mean_column(
        "BatchNorm re-estimated %",
        "reestimated",
        "test_reestimated_accuracy",
        factor=100,
        measured=True,
        digits="score",
    ),
    Column("time", _times, lambda table: [_time(row) for row in table.itertuples()]),
)
"""Of every table of scores."""

LINEAR = "linear model (floor)"

NOTES = (
    f"{SCORE_NOTE}; differences are in percentage points and paired by seed. Intervals are for one "
    "comparison at a time. Time is the mean for one run, other work of the machine included, and its ratio to the base "
    "optimizer's: Table 4 is what to compare costs by.",
    "The test accuracy is that of the last epoch, never of the best one.",
    "Seeds differ in initial weights and the order of batches. The images of a subset are the same for all seeds, and "
    "so are its wrong labels where there are some: intervals say nothing of other images.",
)
NOTE_SAME_RHO = "mSAM is compared with SAM at the same rho where there is one."
NOTE_MEASURED = (
    "Lambda 1 is the largest Hessian eigenvalue of the training loss, measured as in Table 3. Re-estimated: the test "
    "accuracy once BatchNorm's statistics have been averaged over one more epoch of mini-batches at the final weights."
)


def _claims_of_further_arms() -> Iterable[Claim]:
    """Each comparison of an arm that the abstract says nothing of."""
    for name, arm in ARMS.items():
        for other in arm.claimed if name not in ("control", "sam", "msam") else ():
            legends = (one.legend.format(base="plain training") for one in (arm, ARMS[other]))
            text = "(ours) Test accuracy: {} over {}".format(*legends)
            yield Claim(text, of_scores(name, f"over_{other}", 1), further=True)


CLAIMS = (
    Claim("mSAM's test accuracy is better than SAM's", of_scores("msam", "over_sam", 1)),
    Claim("mSAM's test accuracy is better than plain training's", of_scores("msam", "over_base", 1)),
    Claim(
        "(ours) ... and than that of plain gradients over the same micro-batches",
        of_scores("msam", "over_control", 1),
    ),
    Claim("SAM's test accuracy is better than plain training's", of_scores("sam", "over_base", 1)),
    *_claims_of_further_arms(),
)


def shows(cell: Run) -> bool:
    """Whether a cell is a training, or a curvature run of a training's network."""
    return cell.kind == "train" or cell.network is not None


def numbers(
    frame: pd.DataFrame,
    cells: Sequence[Run],
    seeds: int,
    varies: Sequence[str] = (),
    columns: Sequence[Column] = COLUMNS,
) -> pd.DataFrame:
    """Test score of each cell, and its differences to the base optimizer and to SAM, paired by seed.

    Args:
        frame: one row a finished run, as `frames.frame` makes it.
        cells: specs at seed 0; a row each, gathered in blocks that share all that does not define an arm. Curvature
            runs among them add to the rows of the networks that they measure.
        seeds: the seeds 0, ..., seeds - 1 are expected and looked at.
        varies: the fields that the table's experiments declare to vary.
        columns: what else there is of each row.

    Returns:
        One row a cell, with its differences to the cells that `cells.references` gives.
    """
    networks, measured = _networks(cells, varies), _measured(cells, varies)
    table, runs = compared(frame, networks, seeds, varies), frame.set_index("run_id")
    for column in [c for c in columns if not c.measured] + [c for c in columns if c.measured and any(measured)]:
        found = column.numbers(runs, measured if column.measured else networks, seeds)
        table = table.join(rounded(pd.DataFrame(found)))
    more = [" ".join(run_ids(cell, runs, seeds)) if cell else "" for cell in measured]
    table["run_ids"] = [" ".join(filter(None, both)) for both in zip(table["run_ids"], more, strict=True)]
    return table


def text(view: View, columns: Sequence[Column] = COLUMNS) -> pd.DataFrame:
    """The score of each row, its differences, and the columns; those of curvature runs only if there are some."""
    table, rows = view.numbers, view.rows
    measured = any(_measured(view.target.cells))
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
            **{column.title: column.text(table) for column in columns if measured or not column.measured},
        }
    )


def sentences(view: View, expected: int = 1) -> list[str]:
    """What each block says of the arms, and which comparisons there are none of; `expected` is the claims' sign."""
    cells = view.target.cells
    trainings = [cell for cell in cells if not cell.network] or cells
    return [*block_sentences(view.numbers, expected), *unmatched(trainings, view.target.varies)]


def notes(view: View) -> Iterable[str]:
    """How to read a table of scores."""
    sams = view.numbers[view.numbers["method"] == "sam"]
    yield from NOTES
    if sams.groupby("block")["rho"].nunique().gt(1).any():
        yield NOTE_SAME_RHO
    if any(_measured(view.target.cells)):
        yield NOTE_MEASURED


def _networks(cells: Sequence[Run], varies: Sequence[str] = ()) -> list[Run]:
    """The trainings among the cells, in the order of the rows."""
    return cells_in_order([cell for cell in cells if not cell.network], varies)


def _measured(cells: Sequence[Run], varies: Sequence[str] = ()) -> list[Run | None]:
    """The curvature run of each row's network, if it is among the cells."""
    found: dict[Run, Run] = {cell.network: cell for cell in cells if cell.network}
    return [found.get(cell) for cell in _networks(cells, varies)]
