"""The study of m: what mSAM gains over SAM, the control and the shared perturbation, by the number of micro-batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import scores
from analysis.cells import interval
from analysis.cells import scores as scores_of
from analysis.document import signed
from analysis.exhibit import Target, View
from analysis.exhibits.studies import study
from analysis.frames import Results
from analysis.plots import (
    Series,
    add_common_legend,
    draw_points,
    limit_to_most,
    panels_of,
    row_of_panels,
    seeds_of,
    set_ticks,
)
from analysis.statistics import mean_interval
from experiments.harness.runs import catalogue
from experiments.harness.runs.methods import ARMS
from experiments.harness.runs.spec import Run

OVER = {
    "sam": "mSAM over SAM",
    "control": "mSAM over plain gradients on the same micro-batches",
    "shared": "mSAM over SAM on the same micro-batches",
}
"""The arms that mSAM is compared with, and the names of these differences in the legend."""

NOTE = (
    "m is the number of micro-batches of a mini-batch, and B/m that of the examples in each, which some papers call m. "
    "At m = 1 mSAM is SAM, and the control is the base optimizer."
)


@dataclass(frozen=True)
class Compared:
    """The cells of one network: mSAM's at each m, and what each is compared with."""

    msam: Mapping[int, Run]
    """SAM's at m = 1."""
    others: Mapping[str, Mapping[Run, Run]]
    """By the name of an arm, the cell of it that each of mSAM's is compared with."""


def against_m(results: Results, target: Target) -> Figure:
    """Paired differences of mSAM's accuracy to SAM's and, at the same m, to those of the control and of shared SAM.

    One panel for each network. Every cell is at the rho that was chosen for it. The axis has numbers of micro-batches
    below and their sizes above. The band is the margin of equivalence. Points at the same m are drawn side by side.
    """
    panels, frame = panels_of(target.cells), results.runs.set_index("run_id")
    figure, row = row_of_panels(len(panels), 4.8, 3.8)
    for axes, (title, rows) in zip(row, panels.items(), strict=True):
        compared = compared_cells(rows, target)
        axes.axhline(0, lw=1, color="#444444", ls="--", zorder=1)
        if margin := catalogue.MARGINS.get(rows[0].profile):
            axes.axhspan(-margin, margin, color="#e8eef5", lw=0, zorder=0)
        for shift, (name, references) in zip((0.93, 1.0, 1.07), compared.others.items(), strict=True):
            series = Series("micro_batches", OVER[name], shift=shift, over=references)
            arms = dict.fromkeys(references, ARMS[name])  # in the colour of what mSAM is compared with
            draw_points(axes, frame, list(references), target.seeds, series, arms)
        counted = seeds_of(mean_interval(scores_of(cell, frame, target.seeds)) for cell in compared.msam.values())
        axes.set(title=f"{title}{counted}", ylabel="difference of accuracy, points")
        axes.set_xlabel("m, number of micro-batches")
        limit_to_most(axes)
        _draw_both_readings(axes, compared.msam.values())
    add_common_legend(figure, 2 * len(row) - 1)
    return figure


def compared_cells(rows: Sequence[Run], target: Target) -> Compared:
    """The cells of one network that the figure compares.

    At m = 1, and where a network has no control because it has no BatchNorm, the base optimizer is the control.

    Args:
        rows: The training cells of the network.
        target: The cells of the study.
    """
    lines = (cell for cell in rows if target.arms[cell].name in ("sam", "msam"))
    msam = {cell.micro_batches: cell for cell in sorted(lines, key=lambda cell: cell.micro_batches)}
    without = all(target.arms[cell].name != "control" for cell in rows)
    others: dict[str, dict[Run, Run]] = {name: {} for name in OVER}
    for m, cell in msam.items():
        for name in OVER:
            arm = "base" if name == "control" and (without or m == 1) else name
            other = target.references[cell].get(f"over_{arm}")
            if other is not None:
                others[name][cell] = other
    return Compared(msam, others)


def _draw_both_readings(axes: Axes, cells: Iterable[Run]) -> None:
    """Ticks at the numbers of micro-batches below, and above them the examples in each."""
    sizes = {cell.micro_batches: cell.batch_size / cell.micro_batches for cell in cells}
    if not sizes:
        return
    set_ticks(axes, sizes)
    axes.set_xlim(min(sizes) / 1.3, max(sizes) * 1.3)
    above = axes.secondary_xaxis("top", functions=(np.positive, np.positive))  # as by default, but it can be pickled
    above.set_xticks(list(sizes), [f"{size:g}" for size in sizes.values()])
    above.minorticks_off()
    above.set_xlabel("B/m, examples in a micro-batch")


def text(view: View) -> pd.DataFrame:
    """The columns of every table of scores, both readings of m, and the differences to control and shared SAM."""
    shown, numbers = scores.text(view), view.numbers
    place = list(shown).index("method") + 1
    shown.insert(place, "m", [f"{m}" for m in numbers["micro_batches"]])
    shown.insert(
        place + 1, "B/m", [f"{b / m:g}" for b, m in zip(numbers["batch_size"], numbers["micro_batches"], strict=True)]
    )
    place = list(shown).index("over SAM") + 1
    for name in ("control", "shared"):
        if f"over_{name}" in numbers and f"over {name}" not in shown:
            shown.insert(place, f"over {name}", [signed(interval(row, f"over_{name}")) for row in view.rows])
            place += 1
    return shown


EXHIBIT = replace(
    study(
        "micro_batches",
        "Accuracy against m",
        "What mSAM gains over SAM and, at the same m, over plain gradients and over SAM on the same micro-batches, by "
        "the number of micro-batches m (below) and their size B/m (above). Rho is chosen for each. Bars are 95 % "
        "intervals of differences paired by seed; the band is the margin of equivalence. Points at m = 1 are SAM's. "
        "Without BatchNorm, plain training over the mini-batch stands for plain gradients on the same micro-batches.",
        draw=against_m,
        place=60,
    ),
    text=text,
    notes=lambda view: [*scores.notes(view), NOTE],
)
