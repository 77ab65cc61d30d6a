"""Shared by the figures: style, files, and lines, bands and points drawn from cells."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.cells import ids, scores, values
from analysis.statistics import Interval, mean_interval, paired_difference
from experiments.harness.runs.methods import Arm
from experiments.harness.runs.spec import Run

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "msam",
}


def files(name: str, figure: Figure) -> dict[str, bytes]:
    """The figure as PDF and PNG, by file name."""
    images = {}
    for form, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(buffer, format=form, dpi=120, metadata=metadata)
        images[f"{name}.{form}"] = buffer.getvalue()
    return images


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


def draw_points(
    axes: Axes, frame: pd.DataFrame, cells: Sequence[Run], seeds: int, series: Series, arms: Mapping[Run, Arm]
) -> None:
    """Draw means with their intervals, in the colour of the last cell's arm."""
    field, shift = series.field, series.shift
    points = [
        (
            cell.flat[field],
            mean_interval(series.factor * values(frame, cell, seeds, series.column or cell.score)),
        )
        for cell in sorted(cells, key=lambda cell: cell.flat[field])
    ]
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
    """Draw each unfinished run of a cell as a dotted line that ends in a dot; the legend says what that means."""
    if column not in curves:
        return
    label = "under way" if "under way" not in axes.get_legend_handles_labels()[1] else None
    for run_id in ids(cell, seeds):
        rows = curves[(curves["run_id"] == run_id) & curves[column].notna()]
        if len(rows):
            epochs, values = (rows[name].to_numpy(dtype=float) for name in ("epoch", column))
            axes.plot(epochs, values, ls=":", lw=1, color=arm.colour)
            axes.plot(epochs[-1:], values[-1:], "o", ms=4, color=arm.colour, mfc="none", label=label)
            label = None


def draw_level(axes: Axes, frame: pd.DataFrame, cell: Run, seeds: int, arm: Arm) -> None:
    """Draw a cell's mean as a horizontal line, with its interval as a band."""
    interval = mean_interval(100 * values(frame, cell, seeds, cell.score))
    if interval.n:
        axes.axhline(interval.mean, ls=arm.line, lw=1, color=arm.colour, label=arm.called(cell))
        if interval.n > 1:
            low, high = interval.mean - interval.half_width, interval.mean + interval.half_width
            axes.axhspan(low, high, color=arm.colour, alpha=0.15, lw=0)


def ends_of(last: Mapping[str, Interval]) -> str:
    """For a title: the lowest and the highest last mean of the lines, and the numbers of seeds."""
    known = {name: interval for name, interval in last.items() if interval.n}
    if not known:
        return ""
    low, high = (choose(known, key=lambda name: known[name].mean) for choose in (min, max))
    counts = "-".join(map(str, sorted({interval.n for interval in known.values()})))
    return f"\nends at {known[low].mean:.3g} ({low})\nto {known[high].mean:.3g} ({high}), n = {counts}"


def gain_of_msam(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, field: str) -> str:
    """For a title: mSAM over SAM at both ends of the axis; empty if neither was run."""
    gains = []
    for end in (min, max):
        at = end((cell.flat[field] for cell in cells), default=0)
        pair = [c for method in ("msam", "sam") for c in cells if (c.method, c.flat[field]) == (method, at)]
        samples = [scores(cell, frame, seeds) for cell in pair]
        gain = paired_difference(*samples) if len(samples) == 2 else mean_interval([])
        if gain.n:
            half = f" ± {gain.half_width:.1f}" if gain.n > 1 else ""
            gains.append(f"{gain.mean:+.1f}{half} (n = {gain.n}) at {at:g}")
    return f"\nmSAM over SAM:\n{', '.join(dict.fromkeys(gains))}" if gains else ""


def highest_mean(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, arms: Mapping[Run, Arm]) -> str:
    """For a title: the highest mean and its cell."""
    means = {cell: mean_interval(100 * values(frame, cell, seeds, cell.score)) for cell in cells}
    means = {cell: interval for cell, interval in means.items() if interval.n}
    if not means:
        return ""
    best = max(means, key=lambda cell: means[cell].mean)
    rho = f", rho {best.rho:g}" if best.rho else ""
    half = f" ± {means[best].half_width:.1f}" if means[best].n > 1 else ""
    return f"\nhighest mean {means[best].mean:.1f}{half} %:\n{arms[best].called(best)}{rho} (n = {means[best].n})"


def set_logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, down to half the lowest mean: bands that reach below 0 would stretch it."""
    means = [y for line in axes.lines for y in np.asarray(line.get_ydata(), dtype=float)]
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
