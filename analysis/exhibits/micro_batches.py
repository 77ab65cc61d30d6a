"""The study of m: accuracy and flatness against the number of micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from analysis.arms import base_name
from analysis.cells import scores
from analysis.exhibit import Target
from analysis.exhibits.studies import study
from analysis.frames import Results
from analysis.plots import Series, draw_points, draw_zero, limit_to_most, over_base, panels_of, seeds_of, set_ticks
from analysis.statistics import mean_interval
from experiments.harness.runs.methods import Arm
from experiments.harness.runs.spec import Run


def against_m(results: Results, target: Target) -> Figure:
    """Accuracy, accuracy with re-estimated BatchNorm, and the largest eigenvalue against m, one row for each network.

    All are differences to the base optimizer, paired by seed. Lines use SAM's rho; open markers are values of m for
    which the grid chose another rho. Points at the same m are drawn next to each other.
    """
    measured = {cell.network: cell for cell in target.cells if cell.network}
    panels, frame = panels_of(cell for cell in target.cells if not cell.network), results.runs.set_index("run_id")
    bases = over_base(target.cells, target.varies)
    figure = Figure(figsize=(10, 3 * len(panels)), layout="constrained")
    for line, (title, rows) in zip(figure.subplots(len(panels), 3, squeeze=False), panels.items(), strict=True):
        score, reestimated, curvature = line
        for axes in line:
            draw_zero(axes, (cell for cell in rows if target.arms[cell].name == "base"), target.arms)
        for group, series in _series(rows, target.arms, bases):
            draw_points(score, frame, group, target.seeds, series, target.arms)
            measurements = [measured[cell] for cell in group if cell in measured]
            for axes, column, factor in (
                (reestimated, "test_reestimated_accuracy", 100),
                (curvature, "train_lambda_1", 1),
            ):
                shown = replace(series, column=column, factor=factor)
                draw_points(axes, frame, measurements, target.seeds, shown, target.arms)
        counted = seeds_of(mean_interval(scores(cell, frame, target.seeds)) for cell in rows)
        base = base_name(rows[0])
        score.set(title=f"{title}{counted}", ylabel=f"accuracy over {base}, points")
        reestimated.set(title="BatchNorm re-estimated", ylabel=f"accuracy over {base}, points")
        curvature.set(title="flatness, training data", ylabel=f"lambda 1 over {base}")
        for axes in line:
            axes.set_xlabel("m, micro-batches of a mini-batch")
            if axes.containers:
                limit_to_most(axes)
                set_ticks(axes, (cell.micro_batches for cell in rows))
            else:
                axes.clear()
                axes.set_axis_off()
    keys = [axes.get_legend_handles_labels() for axes in figure.axes]
    handles = {label: mark for marks, labels in keys for mark, label in zip(marks, labels, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def _series(rows: Sequence[Run], arms: Mapping[Run, Arm], bases: Mapping[Run, Run]) -> list[tuple[list[Run], Series]]:
    """A network's cells without a perturbation, at SAM's rho, and at another rho, each with the style of its points."""
    unperturbed = [cell for cell in rows if not cell.rho]
    rho = next((cell.rho for cell in rows if arms[cell].name == "sam"), 0.0)
    at_sams_rho = [cell for cell in rows if cell.rho and cell.rho == rho]
    at_other_rho = [cell for cell in rows if cell.rho and cell.rho != rho]
    name = base_name(rows[0])
    label = f"{name} over m micro-batches" if len(unperturbed) > 1 else name
    return [
        (unperturbed, Series("micro_batches", label, shift=0.93, over=bases)),
        (at_sams_rho, Series("micro_batches", f"mSAM, rho {rho:g}", over=bases)),
        (at_other_rho, Series("micro_batches", "mSAM, rho chosen for this m", style="", shift=1.07, over=bases)),
    ]


EXHIBIT = study("micro_batches", "Accuracy and flatness against m", draw=against_m, place=60)
