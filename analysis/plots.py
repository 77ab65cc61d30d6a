"""Shared by the figures: style, files, and lines, bands and points drawn from cells."""

import io
import multiprocessing
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from analysis.cells import ids, references, values
from analysis.statistics import Interval, mean_interval, paired_difference
from experiments.harness.runs.methods import Arm, arms_of
from experiments.harness.runs.process import cores
from experiments.harness.runs.spec import Run

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "msam",
}

FEW = 4
"""The number of figures from which on it pays to start further processes, which takes some seconds."""


def files(name: str, figure: Figure) -> dict[str, bytes]:
    """The figure as PDF and PNG, by file name."""
    images = {}
    for form, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(buffer, format=form, dpi=120, metadata=metadata)
        images[f"{name}.{form}"] = buffer.getvalue()
    return images


def all_files(figures: Iterable[tuple[str, Figure]], count: int) -> Iterator[dict[str, bytes]]:
    """The files of each of `count` named figures, in order.

    `FEW` of them or more are written by several processes, except for a figure that cannot be sent to one.
    """
    if count < FEW or (workers := cores()) < 2:
        yield from (files(name, figure) for name, figure in figures)
        return
    with ProcessPoolExecutor(min(workers, count), multiprocessing.get_context("forkserver")) as pool:
        sent = ((name, figure, _pickled(figure)) for name, figure in figures)
        written = [
            pool.submit(_files_of, name, content) if content else files(name, figure) for name, figure, content in sent
        ]
        yield from (one.result() if isinstance(one, Future) else one for one in written)


def _pickled(figure: Figure) -> bytes:
    """The figure for another process; empty if it cannot be pickled: it may have a lambda as a formatter of ticks."""
    try:
        return pickle.dumps(figure)
    except (AttributeError, TypeError, pickle.PicklingError):
        return b""


def _files_of(name: str, pickled: bytes) -> dict[str, bytes]:
    return files(name, pickle.loads(pickled))


@dataclass(frozen=True)
class Series:
    """One line or set of points: a value of cells against a field of their specs."""

    field: str
    label: str
    style: str = "-"
    """Style of the joining line; empty for open markers without a line."""
    column: str | None = None
    """The column to draw; by default the test score."""
    factor: float = 100
    """Factor applied to the column."""
    shift: float = 1
    """Factor applied to the field, so that points at the same value are drawn next to each other."""
    over: Mapping[Run, Run] | None = None
    """The cell that each cell is compared with: paired differences are drawn instead of values."""


def draw_points(
    axes: Axes, frame: pd.DataFrame, cells: Sequence[Run], seeds: int, series: Series, arms: Mapping[Run, Arm]
) -> None:
    """Draw means, or means of paired differences, with their intervals, in the colour of the last cell's arm."""
    field, shift = series.field, series.shift

    def of(cell: Run) -> pd.Series:
        return series.factor * values(frame, cell, seeds, series.column or cell.score)

    def interval_of(cell: Run) -> Interval:
        if series.over is None:
            return mean_interval(of(cell))
        return paired_difference(of(cell), of(series.over[cell])) if cell in series.over else mean_interval([])

    points = [(cell.flat[field], interval_of(cell)) for cell in sorted(cells, key=lambda cell: cell.flat[field])]
    points = [(x, interval) for x, interval in points if interval.n]
    if not points:
        return
    arm = arms[cells[-1]]
    axes.errorbar(
        [shift * x for x, _ in points],
        [interval.mean for _, interval in points],
        [interval.half_width if interval.n > 1 else 0 for _, interval in points],
        fmt=f"{arm.mark}{series.style}",
        ms=4,
        lw=1,
        capsize=2,
        color=arm.colour,
        mfc=arm.colour if series.style else "none",
        label=series.label,
    )
    # at m = 1 a line starts at the base optimizer or SAM, which keeps its colour and marker
    others = {cell.flat[field]: cell for cell in cells if arms[cell] is not arm}
    for x, interval in points:
        if x in others:
            other = arms[others[x]]
            style: dict[str, Any] = {"ms": 5, "color": other.colour, "label": other.called(others[x])}
            axes.plot([shift * x], [interval.mean], other.mark, **style, zorder=3)


def draw_band(axes: Axes, curves: pd.DataFrame, cell: Run, seeds: int, column: str, arm: Arm) -> Interval:
    """Draw the mean over seeds by epoch with its 95 % band, cut off below a tenth of the mean.

    Returns:
        The interval at the last epoch.
    """
    empty = mean_interval([])
    if column not in curves:
        return empty
    rows = curves[curves["run_id"].isin(ids(cell, seeds)) & curves[column].notna()]
    by_epoch = {int(epoch): mean_interval(group[column]) for epoch, group in rows.groupby("epoch", sort=True)}
    if not by_epoch:
        return empty
    means, halves = (
        np.array([getattr(interval, name) for interval in by_epoch.values()]) for name in ("mean", "half_width")
    )
    mark = arm.mark if len(by_epoch) < 20 else ""
    style: dict[str, Any] = {"marker": mark, "ls": arm.line, "ms": 3, "lw": 1, "color": arm.colour}
    axes.plot(list(by_epoch), means, **style, label=arm.called(cell))
    low, high = means - np.nan_to_num(halves), means + np.nan_to_num(halves)
    axes.fill_between(list(by_epoch), np.maximum(low, means / 10), high, color=arm.colour, alpha=0.2, lw=0)
    return by_epoch[max(by_epoch)]


def draw_under_way(axes: Axes, curves: pd.DataFrame, cell: Run, seeds: int, column: str, arm: Arm) -> None:
    """Draw each unfinished run of a cell as a dotted line that ends in an open dot."""
    if column not in curves:
        return
    label: str | None = f"{arm.called(cell)}, under way"
    for run_id in ids(cell, seeds):
        rows = curves[(curves["run_id"] == run_id) & curves[column].notna()]
        if len(rows):
            epochs, values = (rows[name].to_numpy(dtype=float) for name in ("epoch", column))
            style: dict[str, Any] = {"ls": ":", "lw": 1, "color": arm.colour, "mfc": "none", "ms": 4}
            axes.plot(epochs, values, marker="o", markevery=[len(rows) - 1], label=label, **style)
            label = None


def seeds_of(last: Iterable[Interval]) -> str:
    """For a title: the numbers of seeds of some means."""
    counts = sorted({interval.n for interval in last if interval.n})
    return f"\nn = {' to '.join(map(str, {counts[0]: 0, counts[-1]: 0}))} seeds" if counts else "\nno run has finished"


def over_base(cells: Sequence[Run], varies: Sequence[str] = ()) -> dict[Run, Run]:
    """The base optimizer's cell that each cell is compared with: its own for a cell of the base optimizer."""
    bases = {cell: others.get("over_base") for cell, others in references(cells, varies).items()}
    arms = arms_of(cells, varies)
    own = {cell: cell for cell in cells if arms[cell].name == "base"}
    return {cell: base for cell, base in bases.items() if base is not None} | own


def draw_zero(axes: Axes, bases: Iterable[Run], arms: Mapping[Run, Arm]) -> None:
    """Draw the base optimizer as the line at 0, in its colour."""
    for base in list(bases)[:1]:
        axes.axhline(0, ls=arms[base].line, lw=1, color=arms[base].colour, label=arms[base].called(base), zorder=0)


def limit_to_most(axes: Axes) -> None:
    """Let the y axis show most points: those far below the others become arrows at its lower end, with their value.

    Far below is more than three interquartile ranges below the first quartile.
    """
    points = [
        (x, y, half)
        for container in axes.containers
        if isinstance(container, ErrorbarContainer)
        for x, y, half in _points_of(container)
    ]
    heights = np.array([y for _, y, _ in points])
    if len(heights) < 4:
        return
    first, third = np.quantile(heights, (0.25, 0.75))
    far = heights < first - 3 * (third - first)
    if not far.any():
        return
    low = min(y - half for (_, y, half), away in zip(points, far, strict=True) if not away)
    high = max(y + half for (_, y, half), away in zip(points, far, strict=True) if not away)
    margin = 0.08 * max(high - low, 1e-9)
    axes.set_ylim(min(low, 0.0) - 3 * margin, max(high, 0.0) + margin)
    collapsed: dict[float, list[str]] = {}
    for (x, y, _), away in zip(points, far, strict=True):
        if away:
            collapsed.setdefault(x, []).append(f"{y:.1f}")
    for x, texts in collapsed.items():
        style: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 7}
        axes.annotate("\n".join([*texts, "↓"]), (x, min(low, 0.0) - 3 * margin), **style)


def _points_of(container: ErrorbarContainer) -> Iterator[tuple[float, float, float]]:
    """The x, the mean and the half-width of each point."""
    line, _, (bars,) = container.lines
    xy = np.asarray(line.get_xydata(), dtype=float)
    ends = np.array([segment[1][1] for segment in bars.get_segments()])
    yield from zip(xy[:, 0], xy[:, 1], ends - xy[:, 1], strict=True)


def set_logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, down to half the lowest mean above 0: bands that reach below would stretch it.

    A rise of the loss, or an eigenvalue, may be 0 or below; such a mean has no place on this axis.
    """
    means = [y for line in axes.lines for y in np.asarray(line.get_ydata(), dtype=float) if y > 0]
    if means:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(means) / 2)


def set_ticks(axes: Axes, tried: Iterable[float]) -> None:
    """Make the x axis logarithmic, with ticks only at the values that were tried."""
    values = sorted(set(tried))
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def add_legend(axes: Axes, **options: Any) -> None:
    """Add a legend if anything is drawn."""
    if axes.has_data():
        axes.legend(**options)


def add_common_legend(figure: Figure, columns: int) -> None:
    """Add one legend below all panels, with each label once, if anything is drawn."""
    keys = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: mark for marks, labels in keys for mark, label in zip(marks, labels, strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), columns))


def six_digits(values: np.ndarray) -> np.ndarray:
    """Round to six significant digits: the last bits of exponentials differ between processors."""
    return np.array([float(f"{value:.6g}") for value in values])


def panels_of(cells: Iterable[Run]) -> dict[str, list[Run]]:
    """The cells by model and data set."""
    panels: dict[str, list[Run]] = {}
    for cell in cells:
        panels.setdefault(f"{cell.model}, {cell.dataset}", []).append(cell)
    return panels


def row_of_panels(count: int, width: float = 4.4, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in a row, each of this size in inches."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def line_of(curves: pd.DataFrame, cell: Run, measure: str) -> Any:
    """The line of a measurement on training data, in a cell's run at seed 0; None if missing."""
    if "measure" not in curves:
        return None
    rows = curves[(curves["run_id"] == cell.run_id) & (curves["measure"] == measure) & (curves["part"] == "train")]
    return None if rows.empty else rows.iloc[0]
