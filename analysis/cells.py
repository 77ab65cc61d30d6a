"""What all tables do with their cells: the values of a cell's runs, and their differences to another cell's.

Accuracies and their differences are percentages here; everything else keeps the unit of the records.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pandas as pd

from analysis.arms import method_name
from analysis.statistics import Interval, mean_interval, paired_difference
from experiments.harness.runs.spec import Spec, in_percent, score_name

DIGITS = 6
"""Of the numbers in a table's CSV: the last bits of a mean may differ from machine to machine."""

TUNED = ("learning_rate", "weight_decay", "rho")
"""What a grid varies, and what may differ between a method and the one it is compared with."""

BLOCK_WORDS = {"batch_size": "batch", "label_noise": "wrong labels"}
"""Fields that tell a study's blocks apart, as its table calls them."""


@lru_cache(maxsize=10_000)
def ids(cell: Spec, seeds: int) -> tuple[str, ...]:
    """The ids of a cell's runs at the seeds 0, 1, ..., whether they are there or not."""
    return tuple(replace(cell, seed=seed).run_id for seed in range(seeds))


def values(runs: pd.DataFrame, cell: Spec, seeds: int, column: str) -> pd.Series:
    """A column of a cell's finished runs, indexed by seed; runs without a number in it are left out."""
    found = {seed: run_id for seed, run_id in enumerate(ids(cell, seeds)) if run_id in runs.index}
    if column not in runs or not found:
        return pd.Series(dtype=float)
    numbers = pd.to_numeric(runs.loc[list(found.values()), column], errors="coerce")
    return pd.Series(numbers.to_numpy(dtype=float, na_value=float("nan")), index=list(found)).dropna()


def run_ids(cell: Spec, runs: pd.DataFrame, seeds: int) -> list[str]:
    """The runs of a cell that have a score, in the order of their seeds."""
    return [ids(cell, seeds)[seed] for seed in scores(cell, runs, seeds).index]


def scores(cell: Spec, runs: pd.DataFrame, seeds: int) -> pd.Series:
    """By seed what a cell is compared by; accuracies as percentages."""
    name = score_name(cell)
    return (100 if in_percent(name) else 1) * values(runs, cell, seeds, name)


def used(frame: pd.DataFrame, numbers: pd.DataFrame) -> pd.DataFrame:
    """The rows of the frame that a table was made of."""
    ids = {run_id for cell in numbers["run_ids"].dropna() for run_id in cell.split()}
    return frame[frame["run_id"].isin(ids)]


def machines(rows: pd.DataFrame) -> list[str]:
    """The processors behind these runs, with the instructions that torch used, or the GPUs where there were any."""
    capability = (" (" + rows["cpu_capability"] + ")").fillna("")
    return sorted(set(rows["gpu"].fillna(rows["cpu"] + capability).dropna()))


def blocks_of(cells: Sequence[Spec], free: Iterable[str], by_method: bool = False) -> list[list[Spec]]:
    """Cells that agree in all fields but the free ones, in the order of their first cells."""
    blocks: dict[tuple[Any, ...], list[Spec]] = defaultdict(list)
    for cell in cells:
        fixed = {k: v for k, v in cell.to_dict().items() if k not in free}
        blocks[(*fixed.values(), cell.method if by_method else None)].append(cell)
    return list(blocks.values())


def cells_in_order(cells: Sequence[Spec]) -> list[Spec]:
    """The cells as the rows of `compared` have them, block by block."""
    return [cell for block in blocks_of(cells, ("micro_batches", "seed", *TUNED)) for cell in block]


def references(cells: Sequence[Spec]) -> dict[Spec, dict[str, Spec | None]]:
    """What each cell is compared with, in the order of the tables' rows: `over_base`, `over_sam`, `over_control`."""
    found = {}
    for block in blocks_of(cells, ("micro_batches", "seed", *TUNED)):
        base = next((cell for cell in block if cell.method == "base"), None)
        sams = {cell.rho: cell for cell in reversed(block) if cell.method == "sam"}
        sam = next((cell for cell in block if cell.method == "sam"), None)
        controls = {cell.micro_batches: cell for cell in block if cell.method == "control"}
        for cell in block:
            others = {
                "over_base": base,
                "over_sam": sams.get(cell.rho, sam) if cell.method in ("sam", "msam") else None,
                "over_control": controls.get(cell.micro_batches) if cell.method == "msam" else None,
            }
            found[cell] = {name: None if other == cell else other for name, other in others.items()}
    return found


def labels_of(cells: Sequence[Spec], shown: Sequence[str]) -> dict[Spec, str]:
    """The method's name of each cell; where cells would read alike, with the fields that tell them apart."""
    alike = defaultdict(list)
    for cell in cells:
        alike[(method_name(cell), *(getattr(cell, name) for name in shown))].append(cell)
    labels = {}
    for (name, *_), group in alike.items():
        names = [f.name for f in dataclasses.fields(Spec) if len({getattr(c, f.name) for c in group}) > 1]
        for cell in group:
            told = ", ".join(f"{in_words(n)} {getattr(cell, n)}" for n in names)
            labels[cell] = f"{name} ({told})" if told else name
    return labels


def in_words(field: str) -> str:
    """A field of the spec as text has it."""
    return field.replace("_", " ")


def identity(cell: Spec, runs: pd.DataFrame, seeds: int) -> dict[str, Any]:
    """What a row is and its score: the columns that every table begins with."""
    score = score_name(cell)
    known = scores(cell, runs, seeds)
    found = mean_interval(known)
    missing = [seed for seed in range(seeds) if seed not in known.index]
    names = (
        "dataset",
        "model",
        "base_optimizer",
        "method",
        "learning_rate",
        "weight_decay",
        "rho",
        "micro_batches",
        "batch_size",
        "label_noise",
    )
    return {
        **{name: getattr(cell, name) for name in names},
        "score": score,
        "mean": found.mean,
        "half_width": found.half_width,
        "n": found.n,
        "expected": seeds,
        "missing_seeds": " ".join(map(str, missing)),
        "missing_run_ids": " ".join(ids(cell, seeds)[seed] for seed in missing),
        "run_ids": " ".join(run_ids(cell, runs, seeds)),
    }


def _difference(name: str, cell: Spec, other: Spec | None, runs: pd.DataFrame, seeds: int) -> dict[str, float | int]:
    """The paired difference of two cells' scores; empty where there is no other cell."""
    empty = pd.Series(dtype=float)
    theirs = empty if other is None else scores(other, runs, seeds)
    found = paired_difference(scores(cell, runs, seeds), theirs)
    return {name: found.mean, f"{name}_half_width": found.half_width, f"{name}_n": found.n}


def compared(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """A row a cell: what it is, its score, and the differences to the base, to SAM and to its control."""
    runs, rows = frame.set_index("run_id"), []
    labels = labels_of(cells, ("dataset", "model", "rho", "batch_size", "label_noise"))
    for number, block in enumerate(blocks_of(cells, ("micro_batches", "seed", *TUNED))):
        for cell, others in references(block).items():
            row = {"block": number, "label": labels[cell], **identity(cell, runs, seeds)}
            for name, other in others.items():
                row |= _difference(name, cell, other, runs, seeds)
            rows.append(row)
    return rounded(pd.DataFrame(rows))


def averages(
    runs: pd.DataFrame, cells: Iterable[Spec | None], seeds: int, column: str, factor: float = 1
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
    """What each block says: the control and SAM over the base optimizer, mSAM over SAM and the control.

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
            if row.method in ("control", "sam") and "base" in names:
                parts.append(f"{name} over {names['base']}: {verdict(interval(row, 'over_base'), expected)}")
            if row.method == "msam" and "sam" in names:
                parts.append(f"{name} over {names['sam']}: {verdict(interval(row, 'over_sam'), expected)}")
            if row.method == "msam" and "control" in names:
                parts.append(f"over the control: {verdict(interval(row, 'over_control'), expected)}")
        if parts:
            lines.append(f"{block['model'].iloc[0]}, {block['dataset'].iloc[0]}{places[number]}: {'; '.join(parts)}.")
    return lines


def studied(numbers: pd.DataFrame) -> list[str]:
    """Which of these fields a table varies for one model on one data set: it is a study of them."""
    models = numbers.groupby(["model", "dataset"])
    return [name for name in BLOCK_WORDS if name in numbers and models[name].nunique().gt(1).any()]


def of_blocks(numbers: pd.DataFrame) -> dict[int, str]:
    """By block what a study of the batch size or of wrong labels has there, to be put behind model and data set."""
    names, found = studied(numbers), {}
    for number, block in numbers.groupby("block", sort=True):
        told = [name for name in names if block[name].nunique() == 1]
        found[number] = "".join(f", {BLOCK_WORDS[name]} {block[name].iloc[0]:g}" for name in told)
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


def trained_anew(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> list[str]:
    """A sentence if networks that were measured are not those that the runs of the same spec ended with.

    A spec names one network on one type of processor with one version of the code; on another one it is trained anew.
    """
    runs, other, known = frame.set_index("run_id"), 0, 0
    for cell in cells:
        network = cell.trained or (replace(cell, curvature_every=0) if cell.curvature_every else None)
        if network is not None:
            mine, theirs = (values(runs, c, seeds, score_name(network)) for c in (cell, network))
            both = mine.index.intersection(theirs.index)
            known += len(both)
            other += int((mine[both] != theirs[both]).sum())
    if not other:
        return []
    return [
        f"{other} of {known} networks were trained anew to be measured, on another processor or by other code: their "
        "test accuracies are not those of the runs of the same spec."
    ]
