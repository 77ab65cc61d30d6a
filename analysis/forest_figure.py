"""The figure `contrasts`: every comparison of accuracy as a forest plot, the primary one first.

Comparisons of flatness, cost and theory have other units and are left out: report.html and the tables have them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis import plots
from analysis.claims import in_digits
from analysis.contrasts import ALL, Contrast
from analysis.document import signed
from analysis.scale import Scale, in_words, scales
from analysis.statistics import Interval
from experiments.harness.runs import catalogue
from experiments.harness.runs.methods import ARMS

NAME = "contrasts"
LEFT, MIDDLE, RIGHT = 4.1, 3.8, 2.9
"""Widths in inches: of the labels, of the axis, and of effects and verdicts."""
LINE = 0.185
"""Height of a line in inches."""

LOOKS: dict[str, dict[str, Any]] = {
    "supported": {"color": "#1b7837", "marker": "o"},
    "contradicted": {"color": "#b2182b", "marker": "X"},
    "equivalent": {"color": "#2b6ca3", "marker": "s"},
    "inconclusive": {"color": "#555555", "marker": "o", "mfc": "white"},
    "one seed": {"color": "#999999", "marker": "o", "mfc": "white"},
}
"""Colours and markers by verdict: each verdict has its own marker too."""


@dataclass(frozen=True)
class Line:
    """A line of the figure: a heading, a remark under it, or a comparison."""

    text: str
    look: str
    """`heading`, `remark`, or the verdict of a comparison."""
    row: Any = None
    """The comparison, a row of the claims' numbers; None for a heading, a remark, and a comparison that is not run."""


def files(numbers: pd.DataFrame, runs: pd.DataFrame, profile: str) -> dict[str, bytes]:
    """The figure as PDF and PNG, by path below a results folder; none without a comparison of accuracy.

    Args:
        numbers: The numbers of the document of the claims.
        runs: One row for each finished run.
        profile: The profile of the results.
    """
    shown = numbers[numbers["family"].isin(("primary", "accuracy"))]
    if shown.empty:
        return {}
    with mpl.rc_context(plots.STYLE):
        figure = draw(shown, runs, profile)
    return {f"figures/{name}": page for name, page in plots.files(NAME, figure).items()}


def draw(numbers: pd.DataFrame, runs: pd.DataFrame, profile: str) -> Figure:
    """One line for each contrast and network: its effect with the 95 % interval, and its verdict.

    Args:
        numbers: The comparisons of accuracy, rows of the document of the claims.
        runs: One row for each finished run.
        profile: The profile of the results.
    """
    lines = list(_lines(numbers, scales(runs), profile))
    width, height = LEFT + MIDDLE + RIGHT, LINE * (len(lines) + 1) + 0.85
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((LEFT / width, 0.5 / height, MIDDLE / width, LINE * (len(lines) + 1) / height))
    axes.set(ylim=(len(lines) + 0.2, -0.8), yticks=[], xlabel="difference of test accuracy, points (95 % interval)")
    axes.spines["left"].set_visible(False)
    margin = catalogue.MARGINS.get(profile, math.nan)
    if not math.isnan(margin):
        axes.axvspan(-margin, margin, color="#e8eef5", lw=0, zorder=0)
    axes.axvline(0, color="#444444", lw=0.8, ls="--", zorder=1)
    for place, line in enumerate(lines):
        _draw_line(axes, place, line)
    _draw_key(axes, margin)
    return figure


def _lines(numbers: pd.DataFrame, sizes: Mapping[str, Scale], profile: str) -> Iterator[Line]:
    """All lines from top to bottom, the primary comparison first."""
    known = {contrast.text: contrast for contrast in ALL}
    groups = {str(text): list(rows.itertuples()) for text, rows in numbers.groupby("claim", sort=False)}
    primary = catalogue.primary(profile)
    if primary and not numbers["primary"].any():
        name = " over ".join(ARMS[arm].legend for arm in primary.arms)
        yield Line(f"★ primary comparison: {name}, {primary.model} on {primary.dataset}", "heading")
        yield Line("not run", "remark")
    for text, rows in sorted(groups.items(), key=lambda pair: not any(row.primary for row in pair[1])):
        contrast = known[text]
        yield Line(contrast_words(contrast), "heading")
        yield Line(f"isolates {contrast.isolates}", "remark")
        for row in sorted(rows, key=lambda row: not row.primary):
            mark = "★ primary: " if row.primary else ""
            about = in_words(str(row.run_ids).split(), sizes)
            label = f"{mark}{row.where}" + (f" ({about})" if about else "")
            yield Line(label, row.verdict, row if row.n else None)


def contrast_words(contrast: Contrast) -> str:
    """The arms of a contrast: `mSAM over SAM`, or `(mSAM - control) - (SAM - plain training)`."""
    names = [ARMS[arm].legend.format(base="plain training") for arm in contrast.arms]
    return " over ".join(names) if len(names) < 4 else f"({names[0]} - {names[1]}) - ({names[2]} - {names[3]})"


def _draw_line(axes: Axes, place: int, line: Line) -> None:
    if line.look in ("heading", "remark"):
        style = {"fontweight": "bold"} if line.look == "heading" else {"fontsize": 7, "color": "#555555"}
        _write(axes, -(LEFT - 0.08) / MIDDLE, place, line.text, **style)
        return
    row, bold = line.row, "bold" if line.text.startswith("★") else "normal"
    _write(axes, -(LEFT - 0.25) / MIDDLE, place, line.text, fontweight=bold)
    if row is None:
        _write(axes, 1.03, place, line.look, color="#555555")
        return
    look = LOOKS[line.look]
    half = 0.0 if math.isnan(row.half_width) else row.half_width
    axes.errorbar(row.difference, place, xerr=half, ms=4.5, lw=1.2, capsize=2, zorder=3, label=line.text, **look)
    _write(axes, 1.03, place, signed(Interval(row.difference, row.half_width, int(row.n))))
    p = f", p {in_digits(row.adjusted_p)}" if in_digits(row.adjusted_p) else ""
    _write(axes, 1.03 + 1.3 / MIDDLE, place, f"{line.look}{p}", color=look["color"], fontweight=bold)


def _write(axes: Axes, x: float, y: float, text: str, **style: Any) -> Text:
    """Write at a place across, as a share of the axis' width, and at a line."""
    return axes.text(x, y, text, transform=axes.get_yaxis_transform(), va="center", clip_on=False, **style)


def _draw_key(axes: Axes, margin: float) -> None:
    """The headings of the columns at the right, and what the band is."""
    _write(axes, 1.03, -0.8, "effect ± 95 % (n)", fontsize=7, color="#555555")
    _write(axes, 1.03 + 1.3 / MIDDLE, -0.8, "verdict, Holm-adjusted p", fontsize=7, color="#555555")
    if not math.isnan(margin):
        words = f"shaded: within the margin of equivalence, ±{margin:g}"
        _write(axes, 0.0, -0.8, words, fontsize=7, color="#555555")


def alternative(numbers: pd.DataFrame) -> str:
    """The figure in words: how many comparisons have each verdict, the primary one first."""
    shown: Sequence[Any] = list(numbers[numbers["family"].isin(("primary", "accuracy"))].itertuples())
    first = [f"primary, {row.where}, {row.what}: {row.verdict}" for row in shown if row.primary]
    counts = {row.verdict: sum(other.verdict == row.verdict for other in shown) for row in shown}
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"Forest plot of {len(shown)} differences of test accuracy ({parts}). {'; '.join(first)}".strip()
