"""The study of rho: accuracy of SAM and mSAM against rho."""

from matplotlib.figure import Figure

from analysis.exhibit import Target
from analysis.exhibits.studies import study
from analysis.frames import Results
from analysis.plots import (
    Series,
    add_legend,
    draw_level,
    draw_points,
    highest_mean,
    panels_of,
    row_of_panels,
    set_ticks,
)


def against_rho(results: Results, target: Target) -> Figure:
    """Test accuracy of SAM and mSAM against rho; methods without a rho are horizontal lines with their intervals."""
    seeds, panels, frame = target.seeds, panels_of(target.cells), results.runs.set_index("run_id")
    figure, row = row_of_panels(len(panels))
    for axes, (title, rows) in zip(row, panels.items(), strict=True):
        for cell in rows:
            if not cell.rho:
                draw_level(axes, frame, cell, seeds, target.arms[cell])
        for method in ("sam", "msam"):
            line = [cell for cell in rows if target.arms[cell].name == method]
            label = target.arms[line[0]].called(line[0]) if line else ""
            draw_points(axes, frame, line, seeds, Series("rho", label), target.arms)
        seen = highest_mean(frame, [cell for cell in rows if cell.rho], seeds, target.arms)
        axes.set(title=f"{title}{seen}", xlabel="rho", ylabel="test accuracy %")
        set_ticks(axes, (cell.rho for cell in rows if cell.rho))
        add_legend(axes)
    return figure


EXHIBIT = study("rho", "Accuracy against rho", draw=against_rho, place=70)
