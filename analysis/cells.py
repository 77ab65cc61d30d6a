"""Cells of tables: the values of a cell's runs, and the paired differences to another cell.

Accuracies and their differences are in percent; everything else keeps the unit of the records.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import Interval, mean_interval, paired_difference
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.methods import ARMS, Arm, arms_of, differing, reference
from experiments.harness.runs.run import hints, names
from experiments.harness.runs.spec import Run, Training, in_percent

DIGITS = 6
"""Digits of the numbers in a table's CSV: the last bits of a mean may differ between machines."""

TUNED = ("learning_rate", "weight_decay", "rho")
"""The fields that a grid may vary."""

BLOCK_WORDS = {"batch_size": "batch", "label_noise": "wrong labels", "weight_decay": "weight decay"}
"""The words for fields that distinguish the blocks of a study; other fields keep their names."""

_ALIKE = ("dataset", "model", "base_optimizer", "method", "learning_rate", "rho", "micro_batches")
_IDENTITY = (*_ALIKE[:5], "weight_decay", *_ALIKE[5:], "batch_size", "label_noise")
"""Fields that every table has as columns. Those not in `_ALIKE` may distinguish blocks."""


@lru_cache(maxsize=10_000)
def ids(cell: Run, seeds: int) -> tuple[str, ...]:
    """The ids of a cell's runs, from its own seed on, whether or not they have run."""
    return tuple(run.run_id for run in with_seeds([cell], seeds))


def values(runs: pd.DataFrame, cell: Run, seeds: int, column: str) -> pd.Series:
    """A column of a cell's finished runs, indexed by seed; runs without a number in that column are dropped."""
    finished = {seed: run_id for seed, run_id in enumerate(ids(cell, seeds), cell.seed) if run_id in runs.index}
    if column not in runs or not finished:
        return pd.Series(dtype=float)
    texts = runs[column].array[[runs.index.get_loc(run_id) for run_id in finished.values()]]
    numbers = pd.to_numeric(texts, errors="coerce")
    numbers = np.array([math.nan if pd.isna(number) else number for number in numbers], dtype=float)
    known = ~np.isnan(numbers)
    return pd.Series(numbers[known], index=np.array(list(finished))[known])


def run_ids(cell: Run, runs: pd.DataFrame, seeds: int) -> list[str]:
    """The ids of a cell's runs that have a score, in the order of their seeds."""
    return [ids(cell, seeds)[seed - cell.seed] for seed in scores(cell, runs, seeds).index]


def scores(cell: Run, runs: pd.DataFrame, seeds: int) -> pd.Series:
    """The scores of a cell, indexed by seed; accuracies in percent."""
    name = cell.score
    return (100 if in_percent(name) else 1) * values(runs, cell, seeds, name)


def used(frame: pd.DataFrame, numbers: pd.DataFrame) -> pd.DataFrame:
    """The rows of the frame whose runs a table uses."""
    ids = {run_id for cell in numbers["run_ids"].dropna() for run_id in cell.split()}
    return frame[frame["run_id"].isin(ids)]


def machines(rows: pd.DataFrame) -> list[str]:
    """The GPUs that made these runs, or the processors with the instruction set that torch used."""
    capability = (" (" + rows["cpu_capability"] + ")").fillna("")
    return sorted(set(rows["gpu"].fillna(rows["cpu"] + capability).dropna()))


def blocks_of(cells: Sequence[Run], free: Iterable[str], by_method: bool = False) -> list[list[Run]]:
    """Group cells that agree in all fields except the free ones, in the order of the first cells."""
    blocks: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for cell in cells:
        fixed = {k: v for k, v in cell.flat.items() if k not in free}
        blocks[(*fixed.values(), cell.method if by_method else None)].append(cell)
    return list(blocks.values())


def blocks(cells: Sequence[Run], varies: Sequence[str] = ()) -> list[list[Run]]:
    """Group cells that agree in all fields except those that define their arms, in the order of the first cells."""
    arms = arms_of(cells, varies)
    free = {"seed", *(field for arm in arms.values() for field in arm.has)}
    bases = {cell: reference(cell, "base", arms) if arm.change else cell for cell, arm in arms.items()}
    groups: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for cell in cells:
        base = bases[cell] or cell
        groups[tuple(value for name, value in base.flat.items() if name not in free)].append(cell)
    return list(groups.values())


def cells_in_order(cells: Sequence[Run], varies: Sequence[str] = ()) -> list[Run]:
    """The cells in the order of the rows of `compared`, block by block."""
    return [cell for block in blocks(cells, varies) for cell in block]


def references(cells: Sequence[Run], varies: Sequence[str] = ()) -> dict[Run, dict[str, Run | None]]:
    """The cells that each cell is compared with, in the order of the rows: `over_base`, `over_sam`, `over_control`, ...

    Args:
        cells: The cells of a table.
        varies: The fields that the study declares to vary, see `methods.reference`.
    """
    arms = arms_of(cells, varies)
    present = {arm.name for arm in arms.values()}
    further = (name for arm in arms.values() for name in arm.against if name in present)
    others = dict.fromkeys(("base", "sam", "control", *further))

    def compare(cell: Run, name: str) -> Run | None:
        return reference(cell, name, arms, varies) if name in arms[cell].against else None

    return {cell: {f"over_{name}": compare(cell, name) for name in others} for cell in cells_in_order(cells, varies)}


def unmatched(cells: Sequence[Run], varies: Sequence[str] = ()) -> list[str]:
    """A sentence for each comparison that is missing, or that is with a cell that differs in a declared field."""
    arms, lines = arms_of(cells, varies), []
    labels = labels_of(cells, ("dataset", "model"), arms)
    for cell, others in references(cells, varies).items():
        for name in arms[cell].claimed:
            other = others.get(f"over_{name}")
            candidates = [c for c, arm in arms.items() if arm.name == name and _network(c) == _network(cell)]
            where = f"{cell.model}, {cell.dataset}, {labels[cell]}"
            if candidates and other is None:
                field = in_words(
                    min(differing(candidates[0], cell) - {*arms[cell].has, *ARMS[name].has}, default="run")
                )
                lines.append(f"{where}: not compared with {labels[candidates[0]]}, which has a different {field}.")
            if other is not None and (differing_fields := differing(cell, other) & set(varies)):
                fields = ", ".join(f"{in_words(field)} {other.flat[field]}" for field in sorted(differing_fields))
                lines.append(f"{where}: compared with {labels[other]} at {fields}, which the study varies.")
    return lines


def _network(cell: Run) -> tuple[str, str, str]:
    return cell.kind, cell.dataset, cell.model


def labels_of(cells: Sequence[Run], shown: Sequence[str], arms: Mapping[Run, Arm] | None = None) -> dict[Run, str]:
    """The name of each cell's arm; cells of equal name also show the fields that distinguish them.

    Args:
        cells: The cells of a table.
        shown: Fields that the table shows as columns.
        arms: The arms of the cells; worked out from the cells by default.
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
    """The words for a field that distinguishes blocks."""
    return BLOCK_WORDS.get(field, in_words(field))


def short(value: Any) -> str:
    """A field's value as tables show it."""
    return f"{value:g}" if isinstance(value, int | float | np.number) and not isinstance(value, bool) else str(value)


def in_words(field: str) -> str:
    """The name of a spec's field with spaces."""
    return field.replace("_", " ")


def identity(cell: Run, runs: pd.DataFrame, seeds: int) -> dict[str, Any]:
    """The columns that every table begins with: the fields of a cell, its score, and the runs it uses or lacks."""
    score = cell.score
    by_seed = scores(cell, runs, seeds)
    score_interval = mean_interval(by_seed)
    missing = [seed for seed in range(cell.seed, cell.seed + seeds) if seed not in by_seed.index]
    return {
        **{name: cell.method if name == "method" else cell.flat[name] for name in _IDENTITY},
        "score": score,
        "mean": score_interval.mean,
        "half_width": score_interval.half_width,
        "n": score_interval.n,
        "expected": seeds,
        "missing_seeds": " ".join(map(str, missing)),
        "missing_run_ids": " ".join(ids(cell, seeds)[seed - cell.seed] for seed in missing),
        "run_ids": " ".join(run_ids(cell, runs, seeds)),
    }


def difference(cell: Run, other: Run | None, by_seed: Callable[[Run], pd.Series]) -> Interval:
    """The paired difference of two cells' values, indexed by seed; without values if there is no other cell."""
    return paired_difference(by_seed(cell), pd.Series(dtype=float) if other is None else by_seed(other))


def compared(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each cell: its fields, its score, and the differences to its `references`."""
    runs, rows, arms = frame.set_index("run_id"), [], arms_of(cells, varies)
    labels = labels_of(cells, ("dataset", "model", "rho", "batch_size", "label_noise", *varies), arms)
    others = references(cells, varies)
    for number, block in enumerate(blocks(cells, varies)):
        for cell in block:
            row = {"block": number, "label": labels[cell], **identity(cell, runs, seeds), "method": arms[cell].name}
            row |= {name: cell.flat[name] for name in varies if name not in row}
            for name, other in others[cell].items():
                over = difference(cell, other, lambda c: scores(c, runs, seeds))
                row |= {name: over.mean, f"{name}_half_width": over.half_width, f"{name}_n": over.n}
            rows.append(row)
    return rounded(pd.DataFrame(rows))


def averages(runs: pd.DataFrame, cells: Iterable[Run], seeds: int, column: str, factor: float = 1) -> list[Interval]:
    """The mean of a column over each cell's runs, times the factor."""
    return [mean_interval(factor * values(runs, cell, seeds, column)) for cell in cells]


def mean_columns(name: str, means: Sequence[Interval], counted: bool = False) -> dict[str, list[float]]:
    """Means as a column `name`, half-widths as `<name>_half_width`, and, if `counted`, counts as `<name>_n`."""
    parts = {name: "mean", f"{name}_half_width": "half_width", **({f"{name}_n": "n"} if counted else {})}
    return {column: [getattr(mean, part) for mean in means] for column, part in parts.items()}


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Round floats to `DIGITS` decimals."""
    results = table.select_dtypes("float").columns.difference(TUNED)
    table[results] = table[results].round(DIGITS) + 0.0  # which turns -0.0 into 0.0
    return table


def rounded_relative(table: pd.DataFrame) -> pd.DataFrame:
    """Round floats to `DIGITS` significant digits, for columns that differ by orders of magnitude."""
    results = table.select_dtypes("float").columns.difference(TUNED)
    table[results] = table[results].map(lambda x: float(f"{x:.{DIGITS}g}") + 0.0)
    return table


def interval(row: Any, name: str) -> Interval:
    """The interval in the columns `name` of a table's row."""
    return Interval(getattr(row, name), getattr(row, f"{name}_half_width"), int(getattr(row, f"{name}_n")))


def studied(numbers: pd.DataFrame) -> list[str]:
    """The fields that a table varies for one model on one data set, other than those that define arms."""
    models, known = numbers.groupby(["model", "dataset"]), set(names()) - set(_ALIKE)
    fields = [name for name in (*BLOCK_WORDS, *numbers) if name in known and name in numbers]
    return [name for name in dict.fromkeys(fields) if models[name].nunique().gt(1).any()]


def of_blocks(numbers: pd.DataFrame) -> dict[int, str]:
    """By block, the values of the studied fields, to be appended to the model and the data set."""
    fields, words = studied(numbers), {}
    for number, block in numbers.groupby("block", sort=True):
        fixed = [name for name in fields if block[name].nunique() == 1]
        words[number] = "".join(f", {block_words(name)} {short(block[name].iloc[0])}" for name in fixed)
    return words


def warnings(frame: pd.DataFrame, numbers: pd.DataFrame) -> list[str]:
    """Reasons why a table's rows may not be comparable: several commits, data sets or machines; uncommitted code."""
    rows = used(frame, numbers)
    lines = []
    commits = rows["commit"].str.split("+").explode().value_counts(sort=False)
    if len(commits) > 1:
        counts = ", ".join(f"{name[:12]} ({n} runs)" for name, n in sorted(commits.items()))
        one = rows["code"].nunique() == 1
        begin = "These runs have the same training code, at" if one else "Warning: these runs come from"
        resumed = "; a resumed run counts at each of its commits" if sum(commits) > len(rows) else ""
        lines.append(f"{begin} several commits: {counts}{resumed}.")
    if unclean := int((rows["dirty"].fillna(True).astype(bool)).sum()):
        lines.append(f"Warning: {unclean} runs come from a tree with uncommitted changes, or outside git.")
    for (dataset, model), block in rows.groupby(["dataset", "model"], sort=True):
        if block["data_checksum"].nunique() > 1:
            lines.append(f"Warning: the runs of {model} on {dataset} read data with different checksums.")
    if len(machines(rows)) > 1:
        lines.append(
            f"These runs come from several machines ({'; '.join(machines(rows))}): times cannot be compared, and the "
            "same spec gives slightly different networks on each."
        )
    return lines


def retrained(frame: pd.DataFrame, cells: Sequence[Run], seeds: int) -> list[str]:
    """A sentence if measured networks differ from those of the training runs with the same spec.

    A spec determines a network only for one type of processor and one version of the code. On any other, the network is
    retrained before it is measured.
    """
    runs, changed, known = frame.set_index("run_id"), 0, 0
    for cell in cells:
        network = cell.network
        if isinstance(cell, Training) and cell.curvature_every:
            network = replace(cell, curvature_every=0)
        if network is not None:
            mine, theirs = (values(runs, c, seeds, network.score) for c in (cell, network))
            common = mine.index.intersection(theirs.index)
            known += len(common)
            changed += int((mine[common] != theirs[common]).sum())
    if not changed:
        return []
    return [
        f"{changed} of {known} networks were retrained for the measurement, on another processor or with other code: "
        "their test accuracies differ from those of the runs with the same spec."
    ]
