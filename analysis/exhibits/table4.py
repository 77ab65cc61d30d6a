"""Table 4: the cost of a step of each method."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.arms import COLOURS, MARKS, METHOD_WORDS, base_name, method_name
from analysis.cells import identity, interval, rounded_relative, values
from analysis.contrasts import COST, COST_WITHIN, Contrast, usual_m
from analysis.document import formatted, measure, score_text, spread, uncounted
from analysis.evidence import claim, comparison, ids_of
from analysis.exhibit import Comparison, Exhibit, Picture, Shown, Target, View
from analysis.frames import Results
from analysis.plots import add_legend, set_ticks
from analysis.statistics import Interval, mean_interval
from experiments.harness.runs.grids import timed_steps
from experiments.harness.runs.spec import Run, Timing

NOTES = (
    "A step is zero_grad, the gradient and the optimizer, on batches already in memory. Each time is the median over "
    "rounds in which every method takes one step, in random order, in one process, with one thread on CPUs. Means ± "
    "half-width of the 95 % Student t interval over repetitions (number of repetitions). Over base and over SAM: the "
    "median of the ratios within a round, for steps on the same number of workers. On several workers SAM uses one "
    "perturbation for all, from the gradient averaged over the workers, as in plain data-parallel training. With mSAM "
    "each worker perturbs its own micro-batches.",
    "Memory: the peak memory that a step allocates in one worker, on top of weights, data and earlier allocations. "
    "Reduced: the data that each worker sends to be averaged in a step, as seen by a hook of DistributedDataParallel; "
    "plain training sends each gradient once.",
)

TIMED = ("ratio", "over_sam", "seconds", "examples_per_second", "memory_bytes", "reduced_bytes")
"""The numbers that a cost run has for each of its steps."""


def numbers(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """The cost of a step of each method, for each number of micro-batches and workers.

    Args:
        frame: one row for each finished run.
        cells: cost specs at seed 0, one block for each.
        seeds: the repetitions 0, ..., seeds - 1 are expected and used.
        varies: unused, because each cell contains all arms.

    Returns:
        One row for each method, m and number of workers of each cell. `mean` is the time of a step over that of the
        base optimizer on the same number of workers: the median ratio within a round, averaged over the repetitions.
        `over_sam` is the same over SAM. Other measures are as in Table 3.
    """
    runs, rows = frame.set_index("run_id"), []
    for number, cell in enumerate(cells):
        about = identity(cell, runs, seeds)
        for workers in dict.fromkeys((1, cell.flat["workers"])):
            for step in timed_steps(cell, workers) if isinstance(cell, Timing) else ():
                name = f"{step.method}_m{step.micro_batches}_w{workers}"
                times = {key: mean_interval(values(runs, cell, seeds, f"{name}_{key}")) for key in TIMED}
                label = f"{method_name(step)}, batch {cell.batch_size}" + (f", {workers} workers" * (workers > 1))
                label += _after_comma(_way(cell))
                row = {"block": number, "label": label, **about, "method": step.method}
                row |= {"micro_batches": step.micro_batches, "rho": step.rho, "workers": workers}
                row |= {"way": _way(cell)} if any(map(_way, cells)) else {}
                row |= {"batch_size": cell.batch_size, "mean": times["ratio"].mean, "n": times["ratio"].n}
                row |= {"half_width": times["ratio"].half_width}
                for key, time in times.items():
                    row |= {key: time.mean, f"{key}_half_width": time.half_width}
                row["over_sam_n"] = times["over_sam"].n
                row["parameters"] = mean_interval(values(runs, cell, seeds, "parameters")).mean
                rows.append(row)
    return rounded_relative(pd.DataFrame(rows))


def _way(cell: Run) -> str:
    return cell.way if isinstance(cell, Timing) else ""


def sentences(view: View) -> list[str]:
    """The cost of mSAM over SAM, and how the time of a step grows with m, the batch and the network."""
    alone = view.numbers[(view.numbers["workers"] == 1) & (view.numbers["n"] > 0)]
    perturbed = alone[alone["method"].isin(("sam", "msam"))]
    return [*_over_sam(alone), *_growth_with_m(perturbed), *_growth_with_parameters(perturbed)]


def _over_sam(alone: pd.DataFrame) -> Iterator[str]:
    for _, rows in alone.groupby("block", sort=False):
        times = [
            f"m={row.micro_batches} {_times(interval(row, 'over_sam'))}"
            for row in rows.itertuples()
            if row.method == "msam"
        ]
        sam = next(row for row in rows.itertuples() if row.method == "sam")
        ratio = _times(Interval(sam.mean, sam.half_width, int(sam.n)))
        base = rows["label"].iloc[0].partition(",")[0]
        first = rows.iloc[0]
        where = f"{first['model']}, batch {first['batch_size']}{_after_comma(first.get('way'))}"
        yield f"{where}: SAM takes {ratio} times as long as {base}; mSAM over SAM: {', '.join(times)}."


def _growth_with_m(perturbed: pd.DataFrame) -> Iterator[str]:
    ways = perturbed["way"] if "way" in perturbed else perturbed["model"].map(lambda _: "")
    for (model, way), rows in perturbed.groupby(["model", ways], sort=False):
        several = rows["batch_size"].nunique() > 1
        size = rows["batch_size"] if several else rows["batch_size"] * 0 + 1
        design = np.column_stack([rows["micro_batches"], size]).astype(float)
        fit, quality = _least_squares(design, rows["seconds"].to_numpy(dtype=float))
        rest = f"{1000 * fit[1]:.3f} ms for each example" if several else f"{1000 * fit[1]:.1f} ms in addition"
        yield (
            f"{model}{_after_comma(way)}: a step of SAM or mSAM takes {1000 * fit[0]:.2f} ms for each micro-batch and "
            f"{rest} (least squares over {len(rows)} steps, R2 {quality:.3f})."
        )


def _after_comma(way: object) -> str:
    return f", {way}" if way else ""


def _growth_with_parameters(perturbed: pd.DataFrame) -> Iterator[str]:
    sizes = perturbed.groupby("batch_size")["model"].nunique()
    if len(sizes) and sizes.max() > 2:
        batch = sizes.idxmax()
        rows = perturbed[(perturbed["batch_size"] == batch) & (perturbed["method"] == "sam")]
        design = np.column_stack([np.log(rows["parameters"].to_numpy(dtype=float)), np.ones(len(rows))])
        fit, quality = _least_squares(design, np.log(rows["seconds"].to_numpy(dtype=float)))
        yield (
            f"Over {len(rows)} networks at batch {batch} the time of SAM's step scales as the number of parameters to "
            f"the power of {fit[0]:.2f} (R2 {quality:.2f}{': a poor fit' * (quality < 0.5)})."
        )


def _least_squares(design: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients, and the share of the variance that they explain."""
    fit = np.linalg.lstsq(design, seconds, rcond=None)[0]
    left = seconds - design @ fit
    return fit, 1 - float(left @ left) / float(np.sum((seconds - seconds.mean()) ** 2))


def _times(ratio: Interval) -> str:
    return f"{ratio.mean:.2f}" + (f" ± {ratio.half_width:.2f}" if ratio.n > 1 else "") + f" ({ratio.n})"


def text(view: View) -> pd.DataFrame:
    """The cost of a step: time, its ratios, memory, and the data that workers exchange."""
    table, rows = view.numbers, view.rows
    return pd.DataFrame(
        {
            "dataset": table["dataset"],
            "model": table["model"],
            "batch": table["batch_size"].astype(str),
            **({"way": [way or "loop" for way in table["way"]]} if "way" in table else {}),
            "method": [row.label.partition(", batch")[0] for row in rows],
            "workers": table["workers"].astype(str),
            "ms a step": measure(table, "seconds", 1000),
            "over base": [score_text(row) + mark for row, mark in zip(rows, view.marks, strict=True)],
            "over SAM": uncounted(table, [spread(interval(row, "over_sam")) for row in rows]),
            "examples/s": [formatted(row.examples_per_second, ".0f") for row in rows],
            "memory, MB": [formatted(row.memory_bytes / 1e6, ".1f") for row in rows],
            "reduced, MB": [formatted(row.reduced_bytes / 1e6, ".2f") if row.workers > 1 else "" for row in rows],
        }
    )


def cost(results: Results, target: Target) -> Figure:
    """mSAM over SAM with the claim's line, time over the base optimizer's, and memory, against m, by network.

    Dashed lines: several workers.
    """
    table, cells = numbers(results.runs, target.cells, target.seeds), target.cells
    figure = Figure(figsize=(2.6 * len(cells), 7.5), layout="constrained")
    grid = figure.subplots(3, len(cells), squeeze=False)
    for (over, time, memory), (block, rows) in zip(grid.T, table.groupby("block", sort=True), strict=True):
        _draw_over_sam(over, rows[(rows["method"] == "msam") & (rows["n"] > 0)])
        for workers, style in zip(rows["workers"].unique(), ("-", "--"), strict=False):
            for method, others in (("control", ("base", "control")), ("msam", ("sam", "msam"))):
                line = rows[rows["method"].isin(others) & (rows["workers"] == workers) & (rows["n"] > 0)]
                if not line.empty:
                    words = METHOD_WORDS[method].format(base=base_name(cells[block]))
                    label = words + (f", {workers} workers" if workers > 1 else "")
                    line_style = {"color": COLOURS[method], "fmt": f"{MARKS[method]}{style}", "label": label}
                    _draw_line((time, memory), line, line_style | {"mfc": COLOURS[method] if workers == 1 else "none"})
        way = "\n" * bool(_way(cells[block])) + _way(cells[block])
        over.set(title=f"{cells[block].model}, batch {cells[block].batch_size}{way}")
        time.set(ylim=(0, None))
        memory.set(ylim=(0, None))
        parts = ((over, "mSAM over SAM, %"), (time, "time over the base's step"), (memory, "memory of a step, MB"))
        for axes, words in parts:
            axes.set(xlabel="m", ylabel=words)
            set_ticks(axes, rows["micro_batches"])
    for axes in grid[:2, 0]:
        add_legend(axes, fontsize=6)
    return figure


def _draw_over_sam(axes: Axes, rows: pd.DataFrame) -> None:
    """The additional time of mSAM's step over SAM's, paired within rounds, and the line that the claim draws."""
    axes.axhline(COST_WITHIN, ls=":", lw=1, color="black", label=f"the claim: at most {COST_WITHIN:g} %")
    for workers, line in rows.groupby("workers", sort=True):
        percent, halves = 100 * (line["over_sam"] - 1), 100 * line["over_sam_half_width"].fillna(0)
        style: dict[str, Any] = {"fmt": f"{MARKS['msam']}{'-' if workers == 1 else '--'}", "color": COLOURS["msam"]}
        style |= {"ms": 4, "lw": 1, "capsize": 2, "mfc": COLOURS["msam"] if workers == 1 else "none"}
        label = "mSAM over SAM" + (f", {workers} workers" if workers > 1 else "")
        axes.errorbar(line["micro_batches"], percent, halves, label=label, **style)


def _draw_line(panels: tuple[Axes, Axes], line: pd.DataFrame, style: Mapping[str, Any]) -> None:
    """Time and memory of one method's steps against m, in two panels; m = 1 keeps the marker of its method."""
    first = line.iloc[0]
    parts = (("mean", "half_width", 1.0), ("memory_bytes", "memory_bytes_half_width", 1e6))
    for axes, (column, half, unit) in zip(panels, parts, strict=True):
        sizes, halves = line[column] / unit, line[half].fillna(0) / unit
        axes.errorbar(line["micro_batches"], sizes, halves, ms=4, lw=1, capsize=2, **style)
        own_style: dict[str, Any] = {"ms": 5, "color": COLOURS[first["method"]]}
        axes.plot([first["micro_batches"]], [first[column] / unit], MARKS[first["method"]], **own_style)


def over_sam(target: Target, runs: pd.DataFrame, shown: Shown, contrast: Contrast = COST[0]) -> list[Comparison]:
    """A step of mSAM over SAM in the same run, at Table 1's m or the largest timed m below it.

    Args:
        target: The table.
        runs: The finished runs by id.
        shown: All shown tables.
        contrast: Its `having` names the cells that are compared: those whose micro-batches run in this way.
    """
    comparisons, seeds = [], target.seeds
    for cell in target.cells:
        if any(cell.flat[name] != value for name, value in contrast.having.items()):
            continue
        m = min(usual_m(cell.model, cell.profile), cell.micro_batches)
        for workers in dict.fromkeys((1, cell.flat["workers"])):
            percent = 100 * (values(runs, cell, seeds, f"msam_m{m}_w{workers}_over_sam").to_numpy() - 1)
            where = f"{cell.model}, batch {cell.batch_size}" + (f", {workers} workers" if workers > 1 else "")
            where += _after_comma(_way(cell))
            words = where, f"mSAM, m={m} over SAM, time of a step, percent"
            comparisons.append(comparison(contrast, cell, words, percent, ids_of((cell,), runs, seeds)))
    return comparisons


EXHIBIT = Exhibit(
    name="table4",
    title="Table 4: cost",
    part="{name}: cost",
    shows=lambda cell: cell.kind == "cost",
    numbers=numbers,
    text=text,
    sentences=sentences,
    notes=lambda view: NOTES,
    claims=tuple(claim(contrast, partial(over_sam, contrast=contrast), place=55) for contrast in COST),
    figures=(
        Picture(
            "cost", "Time of mSAM's step over SAM's, of a step over the base optimizer's, and memory, against m.", cost
        ),
    ),
    place=40,
)
