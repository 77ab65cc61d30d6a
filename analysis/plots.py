"""What the figures share: their style, their files, and lines, bands and points drawn from cells."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.arms import COLOURS, LINES, MARKS, method_name
from analysis.cells import ids, scores, values
from analysis.statistics import Interval, mean_interval, paired_difference
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
    """The page as PDF and PNG, by file name."""
    found = {}
    for form, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(buffer, format=form, dpi=120, metadata=metadata)
        found[f"{name}.{form}"] = buffer.getvalue()
    return found


@dataclass(frozen=True)
class Series:
    """Points of cells against a field of their specs."""

    field: str
    label: str
    style: str = "-"
    """Of the line that joins them; without one they are open marks."""
    column: str | None = None
    """What is drawn; the test score if left out."""
    factor: float = 100
    """That it is multiplied by."""
    shift: float = 1
    """That the field is multiplied by, so that points at one place stand side by side."""


def draw_points(axes: Axes, frame: pd.DataFrame, cells: Sequence[Run], seeds: int, series: Series) -> None:
    """Means with their intervals, in the last cell's method's colour."""
    field, shift = series.field, series.shift
    found = [
        (
            cell.flat[field],
            mean_interval(series.factor * values(frame, cell, seeds, series.column or cell.score)),
        )
        for cell in sorted(cells, key=lambda cell: cell.flat[field])
    ]
    found = [(x, interval) for x, interval in found if interval.n]
    if not found:
        return
    method = cells[-1].method
    axes.errorbar(
        [shift * x for x, _ in found],
        [interval.mean for _, interval in found],
        [interval.half_width if interval.n > 1 else 0 for _, interval in found],
        fmt=f"{MARKS[method]}{series.style}",
        ms=4,
        lw=1,
        capsize=2,
        color=COLOURS[method],
        mfc=COLOURS[method] if series.style else "none",
        label=series.label,
    )
    # m = 1 of a line is the base optimizer or SAM, which keeps its colour and mark
    others = {cell.flat[field]: cell for cell in cells if cell.method != method}
    for x, interval in found:
        if x in others:
            other, name = others[x].method, method_name(others[x])
            axes.plot([shift * x], [interval.mean], MARKS[other], ms=5, color=COLOURS[other], label=name, zorder=3)


def draw_band(axes: Axes, curves: pd.DataFrame, cell: Run, seeds: int, column: str) -> Interval:
    """The mean over seeds by epoch as a line in its 95 % band, of which nothing below a tenth of the mean is drawn.

    Returns:
        The last one.
    """
    nothing = mean_interval([])
    if column not in curves:
        return nothing
    rows = curves[curves["run_id"].isin(ids(cell, seeds)) & curves[column].notna()]
    found = {int(epoch): mean_interval(group[column]) for epoch, group in rows.groupby("epoch", sort=True)}
    if not found:
        return nothing
    colour = COLOURS[cell.method]
    means, halves = (np.array([getattr(f, name) for f in found.values()]) for name in ("mean", "half_width"))
    mark = MARKS[cell.method] if len(found) < 20 else ""
    look: dict[str, Any] = {"marker": mark, "ls": LINES[cell.method], "ms": 3, "lw": 1, "color": colour}
    axes.plot(list(found), means, **look, label=method_name(cell))
    low, high = means - np.nan_to_num(halves), means + np.nan_to_num(halves)
    axes.fill_between(list(found), np.maximum(low, means / 10), high, color=colour, alpha=0.2, lw=0)
    return found[max(found)]


def draw_level(axes: Axes, frame: pd.DataFrame, cell: Run, seeds: int) -> None:
    """A cell's mean as a line across, with its interval as a band."""
    found = mean_interval(100 * values(frame, cell, seeds, cell.score))
    if found.n:
        style = {"base": "-", "control": ":"}[cell.method]
        axes.axhline(found.mean, ls=style, lw=1, color=COLOURS[cell.method], label=method_name(cell))
        if found.n > 1:
            low, high = found.mean - found.half_width, found.mean + found.half_width
            axes.axhspan(low, high, color=COLOURS[cell.method], alpha=0.15, lw=0)


def ends_of(last: Mapping[str, Interval]) -> str:
    """For a title: between what means the lines end, and how many seeds are behind them."""
    known = {name: interval for name, interval in last.items() if interval.n}
    if not known:
        return ""
    low, high = (choose(known, key=lambda name: known[name].mean) for choose in (min, max))
    counts = "-".join(map(str, sorted({interval.n for interval in known.values()})))
    return f"\nends at {known[low].mean:.3g} ({low})\nto {known[high].mean:.3g} ({high}), n = {counts}"


def gain_of_msam(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, field: str) -> str:
    """For a title: mSAM over SAM at both ends of the axis."""
    told = []
    for end in (min, max):
        at = end((cell.flat[field] for cell in cells), default=0)
        pair = [c for method in ("msam", "sam") for c in cells if (c.method, c.flat[field]) == (method, at)]
        both = [scores(cell, frame, seeds) for cell in pair]
        found = paired_difference(*both) if len(both) == 2 else mean_interval([])
        if found.n:
            half = f" ± {found.half_width:.1f}" if found.n > 1 else ""
            told.append(f"{found.mean:+.1f}{half} (n = {found.n}) at {at:g}")
    return f"\nmSAM over SAM:\n{', '.join(dict.fromkeys(told))}" if told else ""


def highest_mean(frame: pd.DataFrame, cells: Sequence[Run], seeds: int) -> str:
    """For a title: where the highest mean is."""
    found = {cell: mean_interval(100 * values(frame, cell, seeds, cell.score)) for cell in cells}
    found = {cell: interval for cell, interval in found.items() if interval.n}
    if not found:
        return ""
    best = max(found, key=lambda cell: found[cell].mean)
    rho = f", rho {best.rho:g}" if best.rho else ""
    half = f" ± {found[best].half_width:.1f}" if found[best].n > 1 else ""
    name = method_name(best)
    return f"\nhighest mean {found[best].mean:.1f}{half} %:\n{name}{rho} (n = {found[best].n})"


def set_logarithmic(axes: Axes) -> None:
    """A logarithmic axis down to half of the least mean: bands that reach below 0 would fill it else."""
    means = [y for line in axes.lines for y in np.asarray(line.get_ydata(), dtype=float)]
    if means:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(means) / 2)


def set_ticks(axes: Axes, tried: Iterable[float]) -> None:
    """A logarithmic axis across that names the values that were tried, and no others."""
    values = sorted(set(tried))
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def add_legend(axes: Axes, **options: Any) -> None:
    """A legend, if anything is drawn."""
    if axes.has_data():
        axes.legend(**options)


def six_digits(values: np.ndarray) -> np.ndarray:
    """To six significant digits: the last bits of exponentials differ from processor to processor."""
    return np.array([float(f"{value:.6g}") for value in values])


def panels_of(cells: Iterable[Run]) -> dict[str, list[Run]]:
    """The cells by model and data set."""
    found: dict[str, list[Run]] = {}
    for cell in cells:
        found.setdefault(f"{cell.model}, {cell.dataset}", []).append(cell)
    return found


def row_of_panels(count: int, width: float = 4.4, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels side by side, each of this size in inches."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def line_of(curves: pd.DataFrame, cell: Run, measure: str) -> Any:
    """The measurement's line of a cell's run at seed 0 on training data, if it is there."""
    if "measure" not in curves:
        return None
    found = curves[(curves["run_id"] == cell.run_id) & (curves["measure"] == measure) & (curves["part"] == "train")]
    return None if found.empty else found.iloc[0]
