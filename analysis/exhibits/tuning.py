"""The grid from which a table's hyper-parameters were chosen."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from analysis.cells import TUNED, blocks_of, identity, in_words, labels_of, of_blocks, rounded
from analysis.document import SCORE_NOTE, score_text, studied_columns
from analysis.exhibit import Exhibit, View
from experiments.harness.runs.facts import is_images
from experiments.harness.runs.spec import Run, SpecError

NOTE = (
    f"{SCORE_NOTE}, on held-out training examples. The best mean is chosen, of equal means the largest value: as rho "
    "goes to 0 a method becomes plain training. The test set is not used."
)


def numbers(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """Held-out accuracy of each cell of a grid, and the cell chosen for each method.

    Args:
        frame: one row for each finished run.
        cells: the grid. A method's cells differ only in learning rate, weight decay and rho; those that differ in their
            seed alone, by `seeds`, are one row.
        seeds: the number of seeds of each cell.
        varies: the fields that the table's experiments declare to vary.

    Returns:
        One row for each cell. `chosen` marks the best mean of a method whose runs are complete, of equal means the
        largest value, and `best` the best mean so far. `edge` is the place of a cell in its grid: `interior`, or `low`
        or `high` and the field.

    Raises:
        SpecError: for a cell that is scored on the test set.
    """
    for cell in cells:
        if not cell.flat["holdout_examples"]:
            raise SpecError(f"The grid's cell {cell.title!r} has no held-out examples: give it holdout_examples.")
    runs, rows, counts = frame.set_index("run_id"), [], _seeds(cells, seeds)
    labels = labels_of([*counts], ("dataset", "model", "batch_size", "label_noise", *TUNED))
    for number, group in enumerate(blocks_of([*counts], ("seed", *TUNED), by_method=True)):
        group = sorted(group, key=lambda cell: [cell.flat[name] for name in TUNED])
        identities = [identity(cell, runs, counts[cell]) for cell in group]
        means = {i: round(row["mean"], 9) for i, row in enumerate(identities) if row["n"]}
        best = max(means, key=lambda i: (means[i], i), default=None)
        complete = all(row["n"] == row["expected"] for row in identities)
        for i, (cell, row) in enumerate(zip(group, identities, strict=True)):
            marks = {"best": i == best, "chosen": complete and i == best, "edge": _edge(cell, group)}
            rows.append({"block": number, "label": labels[cell], **row, **marks})
    return rounded(pd.DataFrame(rows))


def _seeds(cells: Sequence[Run], seeds: int) -> dict[Run, int]:
    """The cells that differ in more than the seed, each at its first seed, with their numbers of seeds."""
    alike = blocks_of(cells, ("seed",))
    return {min(group, key=lambda cell: cell.seed): seeds * len(group) for group in alike}


def choices(table: pd.DataFrame, cells: Sequence[Run], used: Iterable[Run] = ()) -> list[str]:
    """The choice of each grid, whether it is in the interior of the grid, and whether the table uses it.

    Args:
        table: the result of `numbers` for `cells`.
        cells: the grid.
        used: the cells of the table that the grid chooses for.
    """
    lines, places = [], of_blocks(table)
    for number, group in enumerate(blocks_of(cells, ("seed", *TUNED), by_method=True)):
        rows = table[table["block"] == number]
        name = f"{group[0].model}, {group[0].dataset}{places[number]}, {rows['label'].iloc[0]}"
        chosen = rows[rows["chosen"]]
        if chosen.empty:
            lines.append(f"{name}: undecided because runs are missing.")
            continue
        row = chosen.iloc[0]
        varied = _varied(group)
        values = " and ".join(f"{in_words(field)} {row[field]:g}" for field in varied) or "the only value"
        place = (
            "in the interior of its grid" if row["edge"] == "interior" else f"at the edge of its grid ({row['edge']})"
        )
        lines.append(f"{name}: {values}, {place}.")
        for cell in used:
            other = [f for f in varied if cell.flat[f] != row[f]]
            if other and _same_method(cell, group[0]) and not any(_chosen(c, row, group) for c in used):
                values = " and ".join(f"{in_words(f)} {cell.flat[f]:g}" for f in other)
                lines[-1] += f" The table uses {values} instead."
    return lines


def _chosen(cell: Run, row: Any, group: Sequence[Run]) -> bool:
    """Whether a table's cell has the group's method and the values of a row of its grid."""
    return _same_method(cell, group[0]) and all(cell.flat[field] == row[field] for field in _varied(group))


def _varied(group: Sequence[Run]) -> list[str]:
    return [name for name in TUNED if len({cell.flat[name] for cell in group}) > 1]


def _edge(cell: Run, group: Sequence[Run]) -> str:
    sides = []
    for name in _varied(group):
        grid_values = sorted({other.flat[name] for other in group})
        if cell.flat[name] in (grid_values[0], grid_values[-1]):
            sides.append(f"{'low' if cell.flat[name] == grid_values[0] else 'high'} {in_words(name)}")
    return ", ".join(sides) or ("interior" if _varied(group) else "only value")


def _same_method(a: Run, b: Run) -> bool:
    """Whether two cells differ only in the fields that a grid varies and the examples that score them."""
    free: dict[str, Any] = {"seed": 0, "holdout_examples": 0, "test_examples": None, **dict.fromkeys(TUNED, 0.5)}
    return replace(a, **free) == replace(b, **free) and a.method == b.method


def text(view: View) -> pd.DataFrame:
    """The values that were tried, their scores, and the choice."""
    table, rows = view.numbers, view.rows
    kind = "accuracy" if is_images(view.target.cells[0].dataset) else "score"
    return pd.DataFrame(
        {
            "dataset": table["dataset"],
            "model": table["model"],
            "method": table["label"],
            **studied_columns(table),
            "learning rate": [f"{row.learning_rate:g}" for row in rows],
            "weight decay": [f"{row.weight_decay:g}" for row in rows],
            "rho": [f"{row.rho:g}" if row.rho else "" for row in rows],
            f"held-out {kind} %": [score_text(row) + mark for row, mark in zip(rows, view.marks, strict=True)],
            "choice": [_choice(row) for row in rows],
        }
    )


def _choice(row: Any) -> str:
    edge = "" if row.edge in ("interior", "only value") else f" (at the edge: {row.edge})"
    if row.chosen:
        return f"chosen{edge}"
    return f"best so far{edge}" if row.best else ""


def grid(name: str, words: str) -> Exhibit:
    """The grid of a table or an experiment.

    Args:
        name: The name of the table or experiment.
        words: The name of the table in the title.
    """
    title = f"The grid of {words}: held-out accuracy"
    return Exhibit(
        name=f"{name}-tuning",
        title=title,
        shows=lambda cell: True,  # `numbers` reports a cell without held-out examples
        numbers=numbers,
        text=text,
        sentences=lambda view: choices(view.numbers, view.target.cells, view.target.used),
        notes=lambda view: (NOTE,),
    )
