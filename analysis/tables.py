"""The tables' numbers, as the paper names the tables: functions from one frame of runs to one frame of cells.

Accuracies and their differences are percentages here; everything else keeps the unit of the records.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import Interval, mean_interval, paired_difference
from experiments.harness.runs.grids import timed_steps
from experiments.harness.runs.spec import Spec, SpecError, in_percent, score_name

DIGITS = 6
"""Of the numbers in a table's CSV: the last bits of a mean may differ from machine to machine."""

_BASE = {"sgd": "SGD", "adamw": "AdamW"}

_TUNED = ("learning_rate", "weight_decay", "rho")
"""What a grid varies, and what may differ between a method and the one it is compared with."""


def table_1(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """Test score of each cell, and its differences to the base optimizer and to SAM, paired by seed.

    Args:
        frame: one row a finished run, as `collect.frame` makes it.
        cells: specs at seed 0; a row each, gathered in blocks that share all but rho, m and tuned values. Curvature
            runs among them add to the rows of the networks that they measure.
        seeds: the seeds 0, ..., seeds - 1 are expected and looked at.

    Returns:
        One row a cell. The first base cell of a block is its reference, and the SAM cell of the same rho if there is
        one, else the first.
    """
    measured = {cell.trained: cell for cell in cells if cell.trained}
    cells = [cell for cell in cells if not cell.trained]
    numbers, runs = _compared(frame, cells, seeds), frame.set_index("run_id")
    rows = []
    for block in _blocks(cells, ("micro_batches", "seed", *_TUNED)):
        base = next((cell for cell in block if cell.method == "base"), None)
        usual = mean_interval(values(runs, base, seeds, "wall_seconds")).mean if base else float("nan")
        for cell in block:
            seconds = mean_interval(values(runs, cell, seeds, "wall_seconds")).mean
            rows.append(
                {
                    "train_accuracy": mean_interval(100 * values(runs, cell, seeds, "train_accuracy")).mean,
                    "wall_seconds": seconds,
                    "relative_time": seconds / usual if usual else float("nan"),
                    **_measured(measured.get(cell), runs, seeds),
                }
            )
    numbers = numbers.join(_numbers(rows))
    more = [" ".join(run_ids(measured[c], runs, seeds)) if c in measured else "" for c in cells_in_order(cells)]
    numbers["run_ids"] = [" ".join(filter(None, both)) for both in zip(numbers["run_ids"], more, strict=True)]
    return numbers


def _measured(cell: Spec | None, runs: pd.DataFrame, seeds: int) -> dict[str, float]:
    """Columns of the largest eigenvalue and the accuracy with BatchNorm estimated anew, if a curvature run was made."""
    if cell is None:
        return {}
    columns: dict[str, float] = {}
    for name, column, factor in (("lambda_1", "train_lambda_1", 1), ("reestimated", "test_reestimated_accuracy", 100)):
        found = mean_interval(factor * values(runs, cell, seeds, column))
        columns |= {name: found.mean, f"{name}_half_width": found.half_width, f"{name}_n": found.n}
    return columns


def cells_in_order(cells: Sequence[Spec]) -> list[Spec]:
    """The cells as the rows of `table_1` and `table_3` have them, block by block."""
    return [cell for block in _blocks(cells, ("micro_batches", "seed", *_TUNED)) for cell in block]


def _compared(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """A row a cell: what it is, its score, and the differences to the base, to SAM and to its control."""
    runs, rows = frame.set_index("run_id"), []
    labels = _labels(cells, ("dataset", "model", "rho", "batch_size", "label_noise"))
    for number, block in enumerate(_blocks(cells, ("micro_batches", "seed", *_TUNED))):
        for cell, others in references(block).items():
            row = {"block": number, "label": labels[cell], **_identity(cell, runs, seeds)}
            for name, other in others.items():
                row |= _difference(name, cell, other, runs, seeds)
            rows.append(row)
    return _numbers(rows)


def references(cells: Sequence[Spec]) -> dict[Spec, dict[str, Spec | None]]:
    """What each cell is compared with, in the order of the tables' rows: `over_base`, `over_sam`, `over_control`."""
    found = {}
    for block in _blocks(cells, ("micro_batches", "seed", *_TUNED)):
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


def table_2(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """`table_1` of text tasks, with the score of whoever always gives the commonest answer (`majority`)."""
    numbers, runs = table_1(frame, cells, seeds), frame.set_index("run_id")
    found = {cell: values(runs, cell, seeds, "test_majority") for cell in cells}
    known = {cell.dataset: 100 * majority.mean() for cell, majority in found.items() if len(majority)}
    numbers["majority"] = numbers["dataset"].map(known).astype(float).round(DIGITS)
    return numbers


FURTHER = {
    "mrpc": ("test_f1", "F1"),
    "qqp": ("test_f1", "F1"),
    "stsb": ("test_spearman", "Spearman correlation"),
    "mnli": ("test_mismatched_score", "accuracy on the mismatched part"),
}
"""The second official metric of a GLUE task that has one."""


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


FLATNESS = (
    *("train_lambda_1", "test_lambda_1", "train_lambda_ratio", "train_trace", "test_trace", "train_loss"),
    *("train_ascent_sharpness", "test_ascent_sharpness", "train_average_sharpness", "test_average_sharpness"),
)
"""What a curvature run's table shows beside the sharpness of micro-batches."""


def table_3(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """Flatness of the networks of each cell: the numbers of their curvature runs.

    Args:
        frame: one row a finished run.
        cells: curvature specs at seed 0; a row each, in blocks as those of `table_1`.
        seeds: the seeds 0, ..., seeds - 1 are expected and looked at.

    Returns:
        One row a cell. `mean` is the largest Hessian eigenvalue on training data; its paired differences are as in
        `table_1`. Every other measure has its mean under its own name and its interval under `<name>_half_width`.
    """
    numbers, runs = _compared(frame, cells, seeds), frame.set_index("run_id")
    known = [name for name in runs if re.fullmatch(r"(train|test)_(sharpness|penalty|squared)_m\d+", str(name))]
    columns: dict[str, list[float]] = {}
    for name in (*FLATNESS, *sorted(known, key=lambda n: (n.rsplit("m", 1)[0], int(n.rsplit("m", 1)[1])))):
        found = [mean_interval(values(runs, cell, seeds, name)) for cell in cells_in_order(cells)]
        columns[name] = [f.mean for f in found]
        columns[f"{name}_half_width"] = [f.half_width for f in found]
    residuals = [values(runs, cell, seeds, "train_residual") for cell in cells_in_order(cells)]
    columns["residual"] = [found.max() if len(found) else float("nan") for found in residuals]
    numbers = numbers.join(pd.DataFrame(columns))
    return _significant(numbers)


def trajectories_table(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """The largest eigenvalue of each cell after its last epoch, as `table_3` has that of Table 1's networks.

    Args:
        frame: one row a finished run.
        cells: specs at seed 0 that measure it along training; a row each, in blocks as those of `table_1`.
        seeds: the seeds 0, ..., seeds - 1 are expected and looked at.
    """
    numbers, runs = _compared(frame, cells, seeds), frame.set_index("run_id")
    for name, factor in (("greatest_lambda_1", 1), ("test_accuracy", 100)):
        found = [mean_interval(factor * values(runs, cell, seeds, name)) for cell in cells_in_order(cells)]
        numbers[name] = [f.mean for f in found]
        numbers[f"{name}_half_width"] = [f.half_width for f in found]
    return _significant(numbers)


TIMED = ("ratio", "over_sam", "seconds", "examples_per_second", "memory_bytes", "reduced_bytes")
"""What a cost run says of each of its steps."""


def table_4(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """What a step of each method takes, for each number of micro-batches and workers.

    Args:
        frame: one row a finished run.
        cells: cost specs at seed 0, a block each.
        seeds: repetitions 0, ..., seeds - 1 are expected and looked at.

    Returns:
        A row for each method, m and number of workers of each cell. `mean` is the time of a step over that of the base
        optimizer on as many workers, the mean over the repetitions of the median of the ratios within a round;
        `over_sam` the time over SAM's, likewise. Other measures are as in `table_3`.
    """
    runs, rows = frame.set_index("run_id"), []
    for number, cell in enumerate(cells):
        for workers in dict.fromkeys((1, cell.workers)):
            for step in timed_steps(cell, workers):
                name = f"{step.method}_m{step.micro_batches}_w{workers}"
                found = {key: mean_interval(values(runs, cell, seeds, f"{name}_{key}")) for key in TIMED}
                told = f"{method_name(step)}, batch {cell.batch_size}" + (f", {workers} workers" * (workers > 1))
                row = {"block": number, "label": told, **_identity(cell, runs, seeds), "method": step.method}
                row |= {"micro_batches": step.micro_batches, "rho": step.rho, "workers": workers}
                row |= {"batch_size": cell.batch_size, "mean": found["ratio"].mean, "n": found["ratio"].n}
                row |= {"half_width": found["ratio"].half_width}
                for key, interval_ in found.items():
                    row |= {key: interval_.mean, f"{key}_half_width": interval_.half_width}
                row["over_sam_n"] = found["over_sam"].n
                row["parameters"] = mean_interval(values(runs, cell, seeds, "parameters")).mean
                rows.append(row)
    return _significant(pd.DataFrame(rows))


def cost_claims(numbers: pd.DataFrame) -> list[str]:
    """What mSAM costs over SAM, and how the time of its step grows with m, the batch and the network."""
    lines = []
    alone = numbers[(numbers["workers"] == 1) & (numbers["n"] > 0)]
    for (model, batch), rows in alone.groupby(["model", "batch_size"], sort=False):
        times = [
            f"m={row.micro_batches} {_times(interval(row, 'over_sam'))}"
            for row in rows.itertuples()
            if row.method == "msam"
        ]
        sam = next(row for row in rows.itertuples() if row.method == "sam")
        told = _times(Interval(sam.mean, sam.half_width, int(sam.n)))
        base = rows["label"].iloc[0].partition(",")[0]
        lines.append(
            f"{model}, batch {batch}: SAM takes {told} times as long as {base}; mSAM over SAM: {', '.join(times)}."
        )
    perturbed = alone[alone["method"].isin(("sam", "msam"))]
    for model, rows in perturbed.groupby("model", sort=False):
        several = rows["batch_size"].nunique() > 1
        size = rows["batch_size"] if several else rows["batch_size"] * 0 + 1
        design = np.column_stack([rows["micro_batches"], size]).astype(float)
        fit, quality = _least_squares(design, rows["seconds"].to_numpy(dtype=float))
        rest = f"{1000 * fit[1]:.3f} ms for each example" if several else f"{1000 * fit[1]:.1f} ms besides"
        lines.append(
            f"{model}: a step of SAM or mSAM takes {1000 * fit[0]:.2f} ms for each micro-batch and {rest} "
            f"(least squares over {len(rows)} of them, R2 {quality:.3f})."
        )
    sizes = perturbed.groupby("batch_size")["model"].nunique()
    if len(sizes) and sizes.max() > 2:
        batch = sizes.idxmax()
        rows = perturbed[(perturbed["batch_size"] == batch) & (perturbed["method"] == "sam")]
        design = np.column_stack([np.log(rows["parameters"].to_numpy(dtype=float)), np.ones(len(rows))])
        fit, quality = _least_squares(design, np.log(rows["seconds"].to_numpy(dtype=float)))
        lines.append(
            f"Over {len(rows)} networks at batch {batch} the time of SAM's step goes as the number of parameters to "
            f"the power of {fit[0]:.2f} (R2 {quality:.2f}{': this number alone does not tell it' * (quality < 0.5)})."
        )
    return lines


def _least_squares(design: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients, and the share of the variance that they explain."""
    fit = np.linalg.lstsq(design, seconds, rcond=None)[0]
    left = seconds - design @ fit
    return fit, 1 - float(left @ left) / float(np.sum((seconds - seconds.mean()) ** 2))


def _times(found: Interval) -> str:
    return f"{found.mean:.2f}" + (f" ± {found.half_width:.2f}" if found.n > 1 else "") + f" ({found.n})"


def theory_table(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """Largest stable sharpness of each cell of a simulation, beside the predicted one.

    Args:
        frame: one row a finished run.
        cells: theory specs at seed 0, a row each.
        seeds: the seeds 0, ..., seeds - 1 are expected and looked at.

    Returns:
        One row a cell: `mean` and `half_width` of the simulated boundary, `predicted`, the mean of `simulated /
        predicted - 1`, and its greatest size over the seeds (`worst`).
    """
    runs, rows = frame.set_index("run_id"), []
    blocks = list(dict.fromkeys((_part(cell), cell.model) for cell in cells))
    for cell in cells:
        errors = values(runs, cell, seeds, "relative_error")
        row = _identity(cell, runs, seeds)
        rows.append(
            {"block": blocks.index((_part(cell), cell.model)), "label": method_name(cell), **row}
            | {
                "part": _part(cell),
                "normalised": cell.normalised,
                "batch_size": cell.batch_size,
                "examples": cell.examples,
                "predicted": mean_interval(values(runs, cell, seeds, "predicted_sharpness")).mean,
                "relative_error": mean_interval(errors).mean,
                "worst": float(errors.abs().max()) if len(errors) else float("nan"),
            }
        )
    return _numbers(rows)


def theory_claims(numbers: pd.DataFrame) -> list[str]:
    """Whether each part's prediction holds, and whether mSAM's boundary is below SAM's, and SAM's below descent's."""
    lines = []
    for part in PARTS:
        rows = numbers[(numbers["part"] == part) & (numbers["n"] > 0)]
        if rows.empty:
            continue
        worst = rows["worst"].max()
        holds = "holds" if worst < PREDICTED_WITHIN else "does not hold"
        lines.append(
            f"{part}: the prediction {holds} to {PREDICTED_WITHIN:.0%}; what was simulated is up to {worst:.2%} off."
        )
    exact = numbers[(numbers["part"] == "exact") & (numbers["n"] > 0)]
    below = compared = 0
    for _, rows in exact[exact["rho"] > 0].groupby(["model", "learning_rate", "rho"]):
        found = rows.set_index("method")["mean"]
        if {"sam", "msam"} <= set(found.index):
            descent = 2 / rows["learning_rate"].iloc[0]
            compared, below = compared + 1, below + int(found["msam"] < found["sam"] < descent)
    if compared:
        lines.append(
            f"exact: mSAM's boundary lies below SAM's, and SAM's below 2 / eta, in {below} of {compared} settings."
        )
    return lines


PREDICTED_WITHIN = 0.02
"""How far a simulated boundary may lie from an exact prediction."""

PARTS = ("exact", "normalised", "stochastic")
"""Of the theory table: where the prediction is exact, and the two ways in which it is left."""


def _part(cell: Spec) -> str:
    if cell.batch_size < cell.examples:
        return "stochastic"
    return "normalised" if cell.normalised else "exact"


def over_majority(numbers: pd.DataFrame) -> list[str]:
    """Whether the base optimizer of each block of `table_2` beats the commonest answer by more than its interval."""
    lines = []
    for row in numbers[(numbers["method"] == "base") & (numbers["n"] > 0)].itertuples():
        found = Interval(row.mean - row.majority, row.half_width, int(row.n))
        lines.append(f"{row.model}, {row.dataset}: {row.label} over the majority class: {verdict(found)}.")
    return lines


def tuning_table(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """Held-out accuracy of each cell of a grid, and which one it chooses for each method.

    Args:
        frame: one row a finished run.
        cells: the grid at seed 0. A method's cells share everything but learning rate, weight decay and rho.
        seeds: the seeds 0, ..., seeds - 1 are expected and looked at.

    Returns:
        One row a cell. `chosen` marks the best mean of a method whose runs are all there, `best` the best
        mean so far; `edge` says where a cell lies in its grid: `interior`, or `low` or `high` and the field.

    Raises:
        SpecError: for a cell that is scored on the test set, which chooses nothing here.
    """
    for cell in cells:
        if not cell.holdout_examples:
            raise SpecError(f"The grid's cell {cell.title!r} has no held-out part: give it holdout_examples.")
    runs, rows = frame.set_index("run_id"), []
    labels = _labels(cells, ("dataset", "model", "batch_size", "label_noise", *_TUNED))
    for number, group in enumerate(_blocks(cells, ("seed", *_TUNED), by_method=True)):
        group = sorted(group, key=lambda cell: [getattr(cell, name) for name in _TUNED])
        found = [_identity(cell, runs, seeds) for cell in group]
        means = [row["mean"] for row in found if row["n"]]
        best = next((i for i, row in enumerate(found) if row["n"] and row["mean"] == max(means)), None)
        complete = all(row["n"] == seeds for row in found)
        for i, (cell, row) in enumerate(zip(group, found, strict=True)):
            marks = {"best": i == best, "chosen": complete and i == best, "edge": _edge(cell, group)}
            rows.append({"block": number, "label": labels[cell], **row, **marks})
    return _numbers(rows)


def claims(numbers: pd.DataFrame, expected: int = 1) -> list[str]:
    """What each block of `table_1` says: the control and SAM over the base optimizer, mSAM over SAM and the control.

    Args:
        numbers: what `table_1`, `table_2` or `table_3` returned.
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


BLOCK_WORDS = {"batch_size": "batch", "label_noise": "wrong labels"}
"""Fields that tell a study's blocks apart, as its table calls them."""


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


def choices(numbers: pd.DataFrame, cells: Sequence[Spec], used: Iterable[Spec] = ()) -> list[str]:
    """What each grid of `tuning_table` chose, whether inside the grid, and whether the table uses it.

    Args:
        numbers: what `tuning_table` returned for `cells`.
        cells: the grid.
        used: the cells of the table that the grid was run for.
    """
    lines, places = [], of_blocks(numbers)
    for number, group in enumerate(_blocks(cells, ("seed", *_TUNED), by_method=True)):
        rows = numbers[numbers["block"] == number]
        name = f"{group[0].model}, {group[0].dataset}{places[number]}, {rows['label'].iloc[0]}"
        chosen = rows[rows["chosen"]]
        if chosen.empty:
            lines.append(f"{name}: undecided, runs are missing.")
            continue
        row = chosen.iloc[0]
        varied = _varied(group)
        told = " and ".join(f"{_words(field)} {row[field]:g}" for field in varied) or "the only value"
        place = "interior of its grid" if row["edge"] == "interior" else f"at the edge of its grid ({row['edge']})"
        lines.append(f"{name}: {told}, {place}.")
        for cell in used:
            other = [f for f in varied if getattr(cell, f) != row[f]]
            if other and _same_method(cell, group[0]) and not any(_chosen(c, row, group) for c in used):
                told = " and ".join(f"{_words(f)} {getattr(cell, f):g}" for f in other)
                lines[-1] += f" The table uses {told} instead."
    return lines


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


def used(frame: pd.DataFrame, numbers: pd.DataFrame) -> pd.DataFrame:
    """The rows of the frame that a table was made of."""
    ids = {run_id for cell in numbers["run_ids"].dropna() for run_id in cell.split()}
    return frame[frame["run_id"].isin(ids)]


def machines(rows: pd.DataFrame) -> list[str]:
    """The processors behind these runs, with the instructions that torch used, or the GPUs where there were any."""
    capability = (" (" + rows["cpu_capability"] + ")").fillna("")
    return sorted(set(rows["gpu"].fillna(rows["cpu"] + capability).dropna()))


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


def _identity(cell: Spec, runs: pd.DataFrame, seeds: int) -> dict[str, Any]:
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


def scores(cell: Spec, runs: pd.DataFrame, seeds: int) -> pd.Series:
    """By seed what a cell is compared by; accuracies as percentages."""
    name = score_name(cell)
    return (100 if in_percent(name) else 1) * values(runs, cell, seeds, name)


def _significant(table: pd.DataFrame) -> pd.DataFrame:
    """Floats to six significant digits: measures of flatness differ by orders of magnitude."""
    results = table.select_dtypes("float").columns.difference(_TUNED)
    table[results] = table[results].map(lambda x: float(f"{x:.{DIGITS}g}") + 0.0)
    return table


def _numbers(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    results = table.select_dtypes("float").columns.difference(_TUNED)
    table[results] = table[results].round(DIGITS) + 0.0  # which turns -0.0 into 0.0
    return table


def _blocks(cells: Sequence[Spec], free: Iterable[str], by_method: bool = False) -> list[list[Spec]]:
    """Cells that agree in all fields but the free ones, in the order of their first cells."""
    blocks: dict[tuple[Any, ...], list[Spec]] = defaultdict(list)
    for cell in cells:
        fixed = {k: v for k, v in cell.to_dict().items() if k not in free}
        blocks[(*fixed.values(), cell.method if by_method else None)].append(cell)
    return list(blocks.values())


def _labels(cells: Sequence[Spec], shown: Sequence[str]) -> dict[Spec, str]:
    """The method's name of each cell; where cells would read alike, with the fields that tell them apart."""
    alike = defaultdict(list)
    for cell in cells:
        alike[(method_name(cell), *(getattr(cell, name) for name in shown))].append(cell)
    labels = {}
    for (name, *_), group in alike.items():
        names = [f.name for f in dataclasses.fields(Spec) if len({getattr(c, f.name) for c in group}) > 1]
        for cell in group:
            told = ", ".join(f"{_words(n)} {getattr(cell, n)}" for n in names)
            labels[cell] = f"{name} ({told})" if told else name
    return labels


def base_name(cell: Spec) -> str:
    """What a cell's base optimizer is called."""
    return _BASE[cell.base_optimizer]


def method_name(cell: Spec) -> str:
    """What a method is called, with its base optimizer or its m."""
    base = base_name(cell)
    return {
        "base": base,
        "control": f"{base}, m={cell.micro_batches} micro-batches",
        "sam": "SAM",
        "msam": f"mSAM, m={cell.micro_batches}",
    }[cell.method]


def _chosen(cell: Spec, row: Any, group: Sequence[Spec]) -> bool:
    """Whether a table's cell is of the group's method and has the values of a row of its grid."""
    return _same_method(cell, group[0]) and all(getattr(cell, field) == row[field] for field in _varied(group))


def _varied(group: Sequence[Spec]) -> list[str]:
    return [name for name in _TUNED if len({getattr(cell, name) for cell in group}) > 1]


def _edge(cell: Spec, group: Sequence[Spec]) -> str:
    sides = []
    for name in _varied(group):
        found = sorted({getattr(other, name) for other in group})
        if getattr(cell, name) in (found[0], found[-1]):
            sides.append(f"{'low' if getattr(cell, name) == found[0] else 'high'} {_words(name)}")
    return ", ".join(sides) or ("interior" if _varied(group) else "only value")


def _same_method(a: Spec, b: Spec) -> bool:
    """Whether two cells differ in nothing but what a grid varies and what they are scored on."""
    free: dict[str, Any] = {"seed": 0, "holdout_examples": 0, "test_examples": None, **dict.fromkeys(_TUNED, 0.5)}
    return replace(a, **free) == replace(b, **free) and a.method == b.method


def _words(field: str) -> str:
    return field.replace("_", " ")
