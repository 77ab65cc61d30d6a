"""The study of rho: accuracy of SAM and mSAM against rho."""

from matplotlib.figure import Figure

from analysis.arms import base_name
from analysis.cells import scores
from analysis.exhibit import Target
from analysis.exhibits.studies import study
from analysis.frames import Results
from analysis.plots import (
    Series,
    add_legend,
    draw_points,
    draw_zero,
    limit_to_most,
    over_base,
    panels_of,
    row_of_panels,
    seeds_of,
    set_ticks,
)
from analysis.statistics import mean_interval


def against_rho(results: Results, target: Target) -> Figure:
    """Accuracy of SAM and mSAM over the base optimizer's, paired by seed, against rho."""
    seeds, panels, frame = target.seeds, panels_of(target.cells), results.runs.set_index("run_id")
    bases = over_base(target.cells, target.varies)
    figure, row = row_of_panels(len(panels))
    for axes, (title, rows) in zip(row, panels.items(), strict=True):
        draw_zero(axes, (cell for cell in rows if target.arms[cell].name == "base"), target.arms)
        for method in ("sam", "msam"):
            line = [cell for cell in rows if target.arms[cell].name == method]
            label = target.arms[line[0]].called(line[0]) if line else ""
            draw_points(axes, frame, line, seeds, Series("rho", label, over=bases), target.arms)
        counted = seeds_of(mean_interval(scores(cell, frame, seeds)) for cell in rows)
        axes.set(title=f"{title}{counted}", xlabel="rho", ylabel=f"accuracy over {base_name(rows[0])}, points")
        limit_to_most(axes)
        set_ticks(axes, (cell.rho for cell in rows if cell.rho))
        add_legend(axes)
    return figure


EXHIBIT = study("rho", "Accuracy against rho", draw=against_rho, place=70)
