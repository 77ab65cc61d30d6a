"""The study of m: accuracy and flatness against the number of micro-batches."""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from analysis.arms import base_name
from analysis.exhibit import Target
from analysis.exhibits.studies import study
from analysis.frames import Results
from analysis.plots import Series, draw_points, highest_mean, panels_of, set_ticks
from experiments.harness.runs.spec import Run


def against_m(results: Results, target: Target) -> Figure:
    """Accuracy, accuracy with BatchNorm estimated anew, and the largest eigenvalue, against m: a row a network.

    Lines have one rho, that of SAM; open marks are where the grid chose another one for an m. What has the same m is
    drawn side by side.
    """
    measured = {cell.network: cell for cell in target.cells if cell.network}
    panels, frame = panels_of(cell for cell in target.cells if not cell.network), results.runs.set_index("run_id")
    figure = Figure(figsize=(10, 3 * len(panels)), layout="constrained")
    for line, (title, rows) in zip(figure.subplots(len(panels), 3, squeeze=False), panels.items(), strict=True):
        score, anew, curvature = line
        for found, series in _series(rows):
            draw_points(score, frame, found, target.seeds, series)
            known = [measured[cell] for cell in found if cell in measured]
            for axes, column, factor in ((anew, "test_reestimated_accuracy", 100), (curvature, "train_lambda_1", 1)):
                draw_points(axes, frame, known, target.seeds, replace(series, column=column, factor=factor))
        score.set(title=f"{title}{highest_mean(frame, rows, target.seeds)}", ylabel="test accuracy %")
        anew.set(title="BatchNorm's statistics estimated anew", ylabel="test accuracy %")
        curvature.set(title="flatness, training data", ylabel="lambda 1")
        for axes in line:
            axes.set_xlabel("m, micro-batches of a mini-batch")
            if axes.has_data():
                set_ticks(axes, (cell.micro_batches for cell in rows))
            else:
                axes.set_title("")
                axes.set_axis_off()
    keys = [axes.get_legend_handles_labels() for axes in figure.axes]
    named = {label: mark for marks, labels in keys for mark, label in zip(marks, labels, strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named))
    return figure


def _series(rows: Sequence[Run]) -> list[tuple[list[Run], Series]]:
    """A network's cells without a rho, those of SAM's rho, and those of another one, with how each are drawn."""
    plain = [cell for cell in rows if not cell.rho]
    rho = next((cell.rho for cell in rows if cell.method == "sam"), 0.0)
    fixed = [cell for cell in rows if cell.rho and cell.rho == rho]
    own = [cell for cell in rows if cell.rho and cell.rho != rho]
    name = base_name(rows[0])
    label = f"{name} over m micro-batches" if len(plain) > 1 else name
    return [
        (plain, Series("micro_batches", label, shift=0.93)),
        (fixed, Series("micro_batches", f"mSAM, rho {rho:g}")),
        (own, Series("micro_batches", "mSAM, where an m has a rho of its own", style="", shift=1.07)),
    ]


EXHIBIT = study("micro_batches", "Accuracy and flatness against m", draw=against_m, place=60)
