"""What all tables do with their cells: the values of a cell's runs, and their differences to another cell's.

Accuracies and their differences are percentages here; everything else keeps the unit of the records.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import Interval, mean_interval, paired_difference
from experiments.harness.runs.methods import ARMS, Arm, arms_of, differing, reference
from experiments.harness.runs.run import hints, names
from experiments.harness.runs.spec import Run, Training, in_percent

DIGITS = 6
"""Of the numbers in a table's CSV: the last bits of a mean may differ from machine to machine."""

TUNED = ("learning_rate", "weight_decay", "rho")
"""What a grid may vary."""

BLOCK_WORDS = {"batch_size": "batch", "label_noise": "wrong labels", "weight_decay": "weight decay"}
"""Fields that tell a study's blocks apart, as its table calls them; others are called by their names."""

_ALIKE = ("dataset", "model", "base_optimizer", "method", "learning_rate", "rho", "micro_batches")
_IDENTITY = (*_ALIKE[:5], "weight_decay", *_ALIKE[5:], "batch_size", "label_noise")
"""Fields that every table has as columns; all but the first ones may tell blocks apart."""


@lru_cache(maxsize=10_000)
def ids(cell: Run, seeds: int) -> tuple[str, ...]:
    """The ids of a cell's runs at the seeds 0, 1, ..., whether they are there or not."""
    return tuple(replace(cell, seed=seed).run_id for seed in range(seeds))


def values(runs: pd.DataFrame, cell: Run, seeds: int, column: str) -> pd.Series:
    """A column of a cell's finished runs, indexed by seed; runs without a number in it are left out."""
    found = {seed: run_id for seed, run_id in enumerate(ids(cell, seeds)) if run_id in runs.index}
    if column not in runs or not found:
        return pd.Series(dtype=float)
    numbers = pd.to_numeric(runs.loc[list(found.values()), column], errors="coerce")
    return pd.Series(numbers.to_numpy(dtype=float, na_value=float("nan")), index=list(found)).dropna()


def run_ids(cell: Run, runs: pd.DataFrame, seeds: int) -> list[str]:
    """The runs of a cell that have a score, in the order of their seeds."""
    return [ids(cell, seeds)[seed] for seed in scores(cell, runs, seeds).index]


def scores(cell: Run, runs: pd.DataFrame, seeds: int) -> pd.Series:
    """By seed what a cell is compared by; accuracies as percentages."""
    name = cell.score
    return (100 if in_percent(name) else 1) * values(runs, cell, seeds, name)


def used(frame: pd.DataFrame, numbers: pd.DataFrame) -> pd.DataFrame:
    """The rows of the frame that a table was made of."""
    ids = {run_id for cell in numbers["run_ids"].dropna() for run_id in cell.split()}
    return frame[frame["run_id"].isin(ids)]


def machines(rows: pd.DataFrame) -> list[str]:
    """The processors behind these runs, with the instructions that torch used, or the GPUs where there were any."""
    capability = (" (" + rows["cpu_capability"] + ")").fillna("")
    return sorted(set(rows["gpu"].fillna(rows["cpu"] + capability).dropna()))


def blocks_of(cells: Sequence[Run], free: Iterable[str], by_method: bool = False) -> list[list[Run]]:
    """Cells that agree in all fields but the free ones, in the order of their first cells."""
    blocks: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for cell in cells:
        fixed = {k: v for k, v in cell.flat.items() if k not in free}
        blocks[(*fixed.values(), cell.method if by_method else None)].append(cell)
    return list(blocks.values())


def blocks(cells: Sequence[Run], varies: Sequence[str] = ()) -> list[list[Run]]:
    """Cells that agree in all fields that do not define their arms, in the order of their first cells."""
    arms = arms_of(cells, varies)
    free = {"seed", *(field for arm in arms.values() for field in arm.has)}
    homes = {cell: reference(cell, "base", arms) if arm.change else cell for cell, arm in arms.items()}
    found: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for cell in cells:
        home = homes[cell] or cell
        found[tuple(value for name, value in home.flat.items() if name not in free)].append(cell)
    return list(found.values())


def cells_in_order(cells: Sequence[Run], varies: Sequence[str] = ()) -> list[Run]:
    """The cells as the rows of `compared` have them, block by block."""
    return [cell for block in blocks(cells, varies) for cell in block]


def references(cells: Sequence[Run], varies: Sequence[str] = ()) -> dict[Run, dict[str, Run | None]]:
    """What each cell is compared with, in the order of the tables' rows: `over_base`, `over_sam`, `over_control`, ...

    Args:
        cells: The cells of a table.
        varies: The fields that its study declares, see `methods.reference`.
    """
    arms = arms_of(cells, varies)
    others = dict.fromkeys(("base", "sam", "control", *(name for arm in arms.values() for name in arm.against)))

    def compare(cell: Run, name: str) -> Run | None:
        return reference(cell, name, arms, varies) if name in arms[cell].against else None

    return {cell: {f"over_{name}": compare(cell, name) for name in others} for cell in cells_in_order(cells, varies)}


def unmatched(cells: Sequence[Run], varies: Sequence[str] = ()) -> list[str]:
    """A sentence for each comparison that a table lacks, or makes with a cell that differs in a declared field."""
    arms, lines = arms_of(cells, varies), []
    labels = labels_of(cells, ("dataset", "model"), arms)
    for cell, others in references(cells, varies).items():
        for name in arms[cell].claimed:
            other = others[f"over_{name}"]
            alike = [c for c, arm in arms.items() if arm.name == name and _place(c) == _place(cell)]
            where = f"{cell.model}, {cell.dataset}, {labels[cell]}"
            if alike and other is None:
                field = in_words(min(differing(alike[0], cell) - {*arms[cell].has, *ARMS[name].has}, default="run"))
                lines.append(f"{where}: not compared with {labels[alike[0]]}, which has another {field}.")
            if other is not None and (apart := differing(cell, other) & set(varies)):
                fields = ", ".join(f"{in_words(field)} {other.flat[field]}" for field in sorted(apart))
                lines.append(f"{where}: compared with {labels[other]}, at {fields}; the study varies it.")
    return lines


def _place(cell: Run) -> tuple[str, str, str]:
    return cell.kind, cell.dataset, cell.model


def labels_of(cells: Sequence[Run], shown: Sequence[str], arms: Mapping[Run, Arm] | None = None) -> dict[Run, str]:
    """The arm's name of each cell; where cells would read alike, with the fields that tell them apart.

    Args:
        cells: The cells of a table.
        shown: Fields that the table has as columns.
        arms: The arms of the cells, if not each by itself.
    """
    arms = arms or arms_of(cells)
    alike = defaultdict(list)
    for cell in cells:
        alike[(arms[cell].called(cell), *(cell.flat[name] for name in shown))].append(cell)
    labels = {}
    for (name, *_), group in alike.items():
        names = [n for n in hints(type(group[0])) if len({c.flat.get(n) for c in group}) > 1]
        for cell in group:
            fields = ", ".join(f"{in_words(n)} {cell.flat[n]}" for n in names)
            labels[cell] = f"{name} ({fields})" if fields else name
    return labels


def block_words(field: str) -> str:
    """A field that tells blocks apart, as a table calls it."""
    return BLOCK_WORDS.get(field, in_words(field))


def short(value: Any) -> str:
    """A field's value as a table has it."""
    return f"{value:g}" if isinstance(value, int | float | np.number) and not isinstance(value, bool) else str(value)


def in_words(field: str) -> str:
    """A field of the spec as text has it."""
    return field.replace("_", " ")


def identity(cell: Run, runs: pd.DataFrame, seeds: int) -> dict[str, Any]:
    """What a row is and its score: the columns that every table begins with."""
    score = cell.score
    known = scores(cell, runs, seeds)
    found = mean_interval(known)
    missing = [seed for seed in range(seeds) if seed not in known.index]
    return {
        **{name: cell.method if name == "method" else cell.flat[name] for name in _IDENTITY},
        "score": score,
        "mean": found.mean,
        "half_width": found.half_width,
        "n": found.n,
        "expected": seeds,
        "missing_seeds": " ".join(map(str, missing)),
        "missing_run_ids": " ".join(ids(cell, seeds)[seed] for seed in missing),
        "run_ids": " ".join(run_ids(cell, runs, seeds)),
    }


def _difference(name: str, cell: Run, other: Run | None, runs: pd.DataFrame, seeds: int) -> dict[str, float | int]:
    """The paired difference of two cells' scores; empty where there is no other cell."""
    empty = pd.Series(dtype=float)
    theirs = empty if other is None else scores(other, runs, seeds)
    found = paired_difference(scores(cell, runs, seeds), theirs)
    return {name: found.mean, f"{name}_half_width": found.half_width, f"{name}_n": found.n}


def compared(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """A row a cell: what it is, its score, and the differences to the cells that `references` gives."""
    runs, rows, arms = frame.set_index("run_id"), [], arms_of(cells, varies)
    labels = labels_of(cells, ("dataset", "model", "rho", "batch_size", "label_noise", *varies), arms)
    others = references(cells, varies)
    for number, block in enumerate(blocks(cells, varies)):
        for cell in block:
            row = {"block": number, "label": labels[cell], **identity(cell, runs, seeds), "method": arms[cell].name}
            row |= {name: cell.flat[name] for name in varies if name not in row}
            for name, other in others[cell].items():
                row |= _difference(name, cell, other, runs, seeds)
            rows.append(row)
    return rounded(pd.DataFrame(rows))


def averages(
    runs: pd.DataFrame, cells: Iterable[Run | None], seeds: int, column: str, factor: float = 1
) -> list[Interval | None]:
    """Of each cell the mean of a column of its runs, times the factor; None where there is no cell."""
    return [None if cell is None else mean_interval(factor * values(runs, cell, seeds, column)) for cell in cells]


def mean_columns(name: str, found: Sequence[Interval | None], counted: bool = False) -> dict[str, list[float | None]]:
    """Means as a column `name`, their intervals as `<name>_half_width`, and their counts as `<name>_n` if wanted."""
    parts = {name: "mean", f"{name}_half_width": "half_width", **({f"{name}_n": "n"} if counted else {})}
    return {column: [None if one is None else getattr(one, part) for one in found] for column, part in parts.items()}


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Floats to `DIGITS` decimals."""
    results = table.select_dtypes("float").columns.difference(TUNED)
    table[results] = table[results].round(DIGITS) + 0.0  # which turns -0.0 into 0.0
    return table


def significant(table: pd.DataFrame) -> pd.DataFrame:
    """Floats to six significant digits: measures of flatness differ by orders of magnitude."""
    results = table.select_dtypes("float").columns.difference(TUNED)
    table[results] = table[results].map(lambda x: float(f"{x:.{DIGITS}g}") + 0.0)
    return table


def interval(row: Any, name: str) -> Interval:
    """The interval `name` of a table's row."""
    return Interval(getattr(row, name), getattr(row, f"{name}_half_width"), int(getattr(row, f"{name}_n")))


def verdict(difference: Interval, expected: int = 1) -> str:
    """A paired difference in words: its size, and whether its interval leaves out zero, and on which side."""
    if not difference.n:
        return "not run"
    if difference.n == 1:
        return f"{difference.mean:+.2f} (n=1): one seed, no interval"
    told = f"{difference.mean:+.2f} ± {difference.half_width:.2f} (n={difference.n})"
    if not difference.separated:
        return f"{told}: not separated"
    return f"{told}: separated" + ("" if difference.mean * expected > 0 else ", the other way round")


def block_sentences(numbers: pd.DataFrame, expected: int = 1) -> list[str]:
    """What each block says of every arm that is compared with another one of the block.

    Args:
        numbers: a table that begins with what `compared` returns.
        expected: the sign that the paper's claim gives the differences.
    """
    lines, places = [], of_blocks(numbers)
    for number, block in numbers.groupby("block", sort=True):
        names = {row.method: row.label for row in reversed(list(block.itertuples()))}
        several = {label for label, count in block["label"].value_counts().items() if count > 1}
        parts = []
        for row in block.itertuples():
            name = f"{row.label}, rho {row.rho:g}" if row.label in several else row.label
            for other in (other for other in ARMS[row.method].claimed if other in names):
                what = "over the control" if other == "control" else f"{name} over {names[other]}"
                parts.append(f"{what}: {verdict(interval(row, f'over_{other}'), expected)}")
        if parts:
            lines.append(f"{block['model'].iloc[0]}, {block['dataset'].iloc[0]}{places[number]}: {'; '.join(parts)}.")
    return lines


def studied(numbers: pd.DataFrame) -> list[str]:
    """Which fields a table varies for one model on one data set, besides those of the arms: it is a study of them."""
    models, known = numbers.groupby(["model", "dataset"]), set(names()) - set(_ALIKE)
    fields = [name for name in (*BLOCK_WORDS, *numbers) if name in known and name in numbers]
    return [name for name in dict.fromkeys(fields) if models[name].nunique().gt(1).any()]


def of_blocks(numbers: pd.DataFrame) -> dict[int, str]:
    """By block what a study of the batch size or of wrong labels has there, to be put behind model and data set."""
    fields, found = studied(numbers), {}
    for number, block in numbers.groupby("block", sort=True):
        fixed = [name for name in fields if block[name].nunique() == 1]
        found[number] = "".join(f", {block_words(name)} {short(block[name].iloc[0])}" for name in fixed)
    return found


def warnings(frame: pd.DataFrame, numbers: pd.DataFrame) -> list[str]:
    """What keeps a table's rows from being comparable: several commits, data, machines; code not in git."""
    rows = used(frame, numbers)
    lines = []
    commits = rows["commit"].str.split("+").explode().value_counts(sort=False)
    if len(commits) > 1:
        counts = ", ".join(f"{name[:12]} ({n} runs)" for name, n in sorted(commits.items()))
        lines.append(f"Warning: these runs come from several commits: {counts}.")
    if unclean := int((rows["dirty"].fillna(True).astype(bool)).sum()):
        lines.append(f"Warning: {unclean} runs come from a tree with uncommitted changes, or outside git.")
    for (dataset, model), block in rows.groupby(["dataset", "model"], sort=True):
        if block["data_checksum"].nunique() > 1:
            lines.append(f"Warning: the runs of {model} on {dataset} read data with different checksums.")
    if len(machines(rows)) > 1:
        lines.append(f"Times come from several machines ({'; '.join(machines(rows))}): they do not compare.")
    return lines


def trained_anew(frame: pd.DataFrame, cells: Sequence[Run], seeds: int) -> list[str]:
    """A sentence if networks that were measured are not those that the runs of the same spec ended with.

    A spec names one network on one type of processor with one version of the code; on another one it is trained anew.
    """
    runs, other, known = frame.set_index("run_id"), 0, 0
    for cell in cells:
        network = cell.network
        if isinstance(cell, Training) and cell.curvature_every:
            network = replace(cell, curvature_every=0)
        if network is not None:
            mine, theirs = (values(runs, c, seeds, network.score) for c in (cell, network))
            both = mine.index.intersection(theirs.index)
            known += len(both)
            other += int((mine[both] != theirs[both]).sum())
    if not other:
        return []
    return [
        f"{other} of {known} networks were trained anew to be measured, on another processor or by other code: their "
        "test accuracies are not those of the runs of the same spec."
    ]
