"""Table 4: what a step of each method costs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.arms import COLOURS, MARKS, METHOD_WORDS, base_name, method_name
from analysis.cells import identity, interval, significant, values
from analysis.document import formatted, measure, score_text, spread, uncounted
from analysis.evidence import comparison, ids_of
from analysis.exhibit import Claim, Comparison, Exhibit, Picture, Shown, Target, View
from analysis.frames import Results
from analysis.plots import add_legend, set_ticks
from analysis.statistics import Interval, mean_interval
from experiments.harness.runs.grids import timed_steps
from experiments.harness.runs.spec import Run, Timing

NOTES = (
    "A step is zero_grad, the gradient and the optimizer, on batches that are there; median over rounds in which every "
    "method takes one step in a random order, in one process, with one thread on CPUs. Means ± half-width of the 95 % "
    "Student t interval over repetitions (their number). Over base and over SAM: the median "
    "of the ratios within a round, of steps on as many workers. On several workers SAM "
    "has one perturbation for all, from the gradient averaged over them, as plain data parallelism would have it; each "
    "worker perturbs its own micro-batches with mSAM.",
    "Memory: the peak of what a step allocates above weights, data and what stood before it, in one worker. Reduced: "
    "what each worker hands over to be averaged in a step, seen by DistributedDataParallel's own hook; plain training "
    "hands over each gradient once.",
)

COST_WITHIN = 10.0
"""How many percent longer than SAM's step mSAM's may take to be no significant extra cost: a reading of the paper's
words that is ours alone."""

TIMED = ("ratio", "over_sam", "seconds", "examples_per_second", "memory_bytes", "reduced_bytes")
"""What a cost run says of each of its steps."""


def numbers(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """What a step of each method takes, for each number of micro-batches and workers.

    Args:
        frame: one row a finished run.
        cells: cost specs at seed 0, a block each.
        seeds: repetitions 0, ..., seeds - 1 are expected and looked at.
        varies: not used: all arms are in each cell.

    Returns:
        A row for each method, m and number of workers of each cell. `mean` is the time of a step over that of the base
        optimizer on as many workers, the mean over the repetitions of the median of the ratios within a round;
        `over_sam` the time over SAM's, likewise. Other measures are as in Table 3.
    """
    runs, rows = frame.set_index("run_id"), []
    for number, cell in enumerate(cells):
        for workers in dict.fromkeys((1, cell.flat["workers"])):
            for step in timed_steps(cell, workers) if isinstance(cell, Timing) else ():
                name = f"{step.method}_m{step.micro_batches}_w{workers}"
                found = {key: mean_interval(values(runs, cell, seeds, f"{name}_{key}")) for key in TIMED}
                told = f"{method_name(step)}, batch {cell.batch_size}" + (f", {workers} workers" * (workers > 1))
                row = {"block": number, "label": told, **identity(cell, runs, seeds), "method": step.method}
                row |= {"micro_batches": step.micro_batches, "rho": step.rho, "workers": workers}
                row |= {"batch_size": cell.batch_size, "mean": found["ratio"].mean, "n": found["ratio"].n}
                row |= {"half_width": found["ratio"].half_width}
                for key, one in found.items():
                    row |= {key: one.mean, f"{key}_half_width": one.half_width}
                row["over_sam_n"] = found["over_sam"].n
                row["parameters"] = mean_interval(values(runs, cell, seeds, "parameters")).mean
                rows.append(row)
    return significant(pd.DataFrame(rows))


def sentences(view: View) -> list[str]:
    """What mSAM costs over SAM, and how the time of its step grows with m, the batch and the network."""
    alone = view.numbers[(view.numbers["workers"] == 1) & (view.numbers["n"] > 0)]
    perturbed = alone[alone["method"].isin(("sam", "msam"))]
    return [*_over_sam(alone), *_growth_with_m(perturbed), *_growth_with_parameters(perturbed)]


def _over_sam(alone: pd.DataFrame) -> Iterator[str]:
    for (model, batch), rows in alone.groupby(["model", "batch_size"], sort=False):
        times = [
            f"m={row.micro_batches} {_times(interval(row, 'over_sam'))}"
            for row in rows.itertuples()
            if row.method == "msam"
        ]
        sam = next(row for row in rows.itertuples() if row.method == "sam")
        told = _times(Interval(sam.mean, sam.half_width, int(sam.n)))
        base = rows["label"].iloc[0].partition(",")[0]
        yield f"{model}, batch {batch}: SAM takes {told} times as long as {base}; mSAM over SAM: {', '.join(times)}."


def _growth_with_m(perturbed: pd.DataFrame) -> Iterator[str]:
    for model, rows in perturbed.groupby("model", sort=False):
        several = rows["batch_size"].nunique() > 1
        size = rows["batch_size"] if several else rows["batch_size"] * 0 + 1
        design = np.column_stack([rows["micro_batches"], size]).astype(float)
        fit, quality = _least_squares(design, rows["seconds"].to_numpy(dtype=float))
        rest = f"{1000 * fit[1]:.3f} ms for each example" if several else f"{1000 * fit[1]:.1f} ms besides"
        yield (
            f"{model}: a step of SAM or mSAM takes {1000 * fit[0]:.2f} ms for each micro-batch and {rest} "
            f"(least squares over {len(rows)} of them, R2 {quality:.3f})."
        )


def _growth_with_parameters(perturbed: pd.DataFrame) -> Iterator[str]:
    sizes = perturbed.groupby("batch_size")["model"].nunique()
    if len(sizes) and sizes.max() > 2:
        batch = sizes.idxmax()
        rows = perturbed[(perturbed["batch_size"] == batch) & (perturbed["method"] == "sam")]
        design = np.column_stack([np.log(rows["parameters"].to_numpy(dtype=float)), np.ones(len(rows))])
        fit, quality = _least_squares(design, np.log(rows["seconds"].to_numpy(dtype=float)))
        yield (
            f"Over {len(rows)} networks at batch {batch} the time of SAM's step goes as the number of parameters to "
            f"the power of {fit[0]:.2f} (R2 {quality:.2f}{': this number alone does not tell it' * (quality < 0.5)})."
        )


def _least_squares(design: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients, and the share of the variance that they explain."""
    fit = np.linalg.lstsq(design, seconds, rcond=None)[0]
    left = seconds - design @ fit
    return fit, 1 - float(left @ left) / float(np.sum((seconds - seconds.mean()) ** 2))


def _times(found: Interval) -> str:
    return f"{found.mean:.2f}" + (f" ± {found.half_width:.2f}" if found.n > 1 else "") + f" ({found.n})"


def text(view: View) -> pd.DataFrame:
    """What a step takes: time, its ratios, memory, and what workers exchange."""
    table, rows = view.numbers, view.rows
    return pd.DataFrame(
        {
            "dataset": table["dataset"],
            "model": table["model"],
            "batch": table["batch_size"].astype(str),
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
    """Time of a step over the base optimizer's, and memory, against m: a column a network; dashed: several workers."""
    table, cells = numbers(results.runs, target.cells, target.seeds), target.cells
    figure = Figure(figsize=(2.6 * len(cells), 5), layout="constrained")
    grid = figure.subplots(2, len(cells), squeeze=False)
    for (time, memory), (block, rows) in zip(grid.T, table.groupby("block", sort=True), strict=True):
        for workers, style in zip(rows["workers"].unique(), ("-", "--"), strict=False):
            for method, others in (("control", ("base", "control")), ("msam", ("sam", "msam"))):
                line = rows[rows["method"].isin(others) & (rows["workers"] == workers) & (rows["n"] > 0)]
                if not line.empty:
                    words = METHOD_WORDS[method].format(base=base_name(cells[block]))
                    label = words + (f", {workers} workers" if workers > 1 else "")
                    look = {"color": COLOURS[method], "fmt": f"{MARKS[method]}{style}", "label": label}
                    _draw_line((time, memory), line, look | {"mfc": COLOURS[method] if workers == 1 else "none"})
        found = rows[(rows["method"] == "msam") & (rows["workers"] == 1) & (rows["n"] > 0)]
        seen = (
            ""
            if found.empty
            else f"\nmSAM, m={found['micro_batches'].iloc[-1]}: {found['mean'].iloc[-1]:.1f} times base"
        )
        time.set(title=f"{cells[block].model}, batch {cells[block].batch_size}{seen}", ylim=(0, None))
        memory.set(ylim=(0, None))
        for axes, words in ((time, "time over the base's step"), (memory, "memory of a step, MB")):
            axes.set(xlabel="m", ylabel=words)
            set_ticks(axes, rows["micro_batches"])
    add_legend(grid[0][0], fontsize=6)
    return figure


def _draw_line(both: tuple[Axes, Axes], line: pd.DataFrame, look: Mapping[str, Any]) -> None:
    """Time and memory of one method's steps against m, in the two panels; m = 1 keeps its own method's mark."""
    first = line.iloc[0]
    parts = (("mean", "half_width", 1.0), ("memory_bytes", "memory_bytes_half_width", 1e6))
    for axes, (column, half, unit) in zip(both, parts, strict=True):
        sizes, halves = line[column] / unit, line[half].fillna(0) / unit
        axes.errorbar(line["micro_batches"], sizes, halves, ms=4, lw=1, capsize=2, **look)
        own: dict[str, Any] = {"ms": 5, "color": COLOURS[first["method"]]}
        axes.plot([first["micro_batches"]], [first[column] / unit], MARKS[first["method"]], **own)


def over_sam(target: Target, runs: pd.DataFrame, shown: Shown) -> list[Comparison]:
    """mSAM's step over SAM's in the same run, at Table 1's number of micro-batches or the nearest that was timed."""
    found, seeds = [], target.seeds
    for cell in target.cells:
        m = min(_usual_m(cell.model, shown), cell.micro_batches)
        for workers in dict.fromkeys((1, cell.flat["workers"])):
            more = 100 * (values(runs, cell, seeds, f"msam_m{m}_w{workers}_over_sam").to_numpy() - 1)
            known = mean_interval(more)
            said = "not run" if not known.n else "one seed" if known.n == 1 else "not separated"
            if known.mean + known.half_width <= COST_WITHIN:
                said = "supported"
            elif known.mean - known.half_width > COST_WITHIN:
                said = "contradicted"
            where = f"{cell.model}, batch {cell.batch_size}" + (f", {workers} workers" if workers > 1 else "")
            what = f"mSAM, m={m} over SAM, time of a step, percent"
            found.append(comparison(where, what, more, said, ids_of((cell,), runs, seeds)))
    return found


def _usual_m(model: str, shown: Shown) -> int:
    """The number of micro-batches that Table 1 gives a model; 8 where it has none."""
    cells = shown["table1"].cells if "table1" in shown else ()
    return next((cell.micro_batches for cell in cells if (cell.model, cell.method) == (model, "msam")), 8)


EXHIBIT = Exhibit(
    name="table4",
    title="Table 4: cost",
    part="{name}: cost",
    shows=lambda cell: cell.kind == "cost",
    numbers=numbers,
    text=text,
    sentences=sentences,
    notes=lambda view: NOTES,
    claims=(Claim("mSAM costs not significantly more than SAM", over_sam, place=55),),
    figures=(Picture("cost", "Time of a step over the base optimizer's, and its memory, against m.", cost),),
    place=40,
)
