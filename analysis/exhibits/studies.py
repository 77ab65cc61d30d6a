"""Studies: accuracy against what one of them varies."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import matplotlib as mpl
from matplotlib.figure import Figure

from analysis.arms import base_name, method_name
from analysis.exhibits.table1 import curves
from analysis.exhibits.table3 import flatness, slices, spectra
from analysis.exhibits.table4 import cost
from analysis.exhibits.theory import theory, theory_table
from analysis.exhibits.trajectories import trajectories
from analysis.frames import Results
from analysis.plots import (
    STYLE,
    add_legend,
    against,
    draw_level,
    draw_points,
    files,
    highest_mean,
    panels_of,
    row_of_axes,
    set_ticks,
)
from experiments.harness.spec import Spec


def pages(results: Results, shown: Mapping[str, tuple[Sequence[Spec], int]]) -> dict[str, bytes]:
    """All figures of some tables, by their path below a results folder.

    Args:
        results: runs and curves.
        shown: the tables by name, each with its cells and its number of seeds.
    """
    found = {}
    (flat, seeds), (stability, problems) = (shown.get(name, ((), 0)) for name in ("table3", "theory"))
    if flat or stability:
        simulated = theory_table(results.runs, stability, problems) if stability else None
        found["theory"] = theory(simulated, results.runs, flat, seeds, problems)
    drawn: dict[str, tuple[str, Callable[..., Figure]]] = {
        "table1": ("curves", curves),
        "table4": ("cost", cost),
        "trajectories": ("trajectories", trajectories),
        "micro_batches": ("micro_batches", against_m),
        "rho": ("rho", against_rho),
        "batch_size": (
            "batch_size",
            partial(against, field="batch_size", words="batch size (learning rate in proportion)"),
        ),
        "label_noise": (
            "label_noise",
            partial(
                against,
                field="label_noise",
                words="share of wrong training labels (learning rate and rho chosen for each)",
            ),
        ),
    }
    for name, (title, figure) in drawn.items():
        if name in shown:
            found[title] = figure(results, *shown[name])
    if flat:
        found["flatness"] = flatness(results, flat, seeds)
        found["spectra"] = spectra(results.curves, flat)
        found["slices"] = slices(results.curves, flat)
    return {f"figures/{name}": page for title, figure in found.items() for name, page in files(title, figure).items()}


def against_rho(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """Test accuracy of SAM and mSAM against rho; the methods without one as lines with their intervals."""
    panels, frame = panels_of(cells), results.runs.set_index("run_id")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 3.2), layout="constrained")
        for axes, (title, rows) in zip(row_of_axes(figure, len(panels)), panels.items(), strict=True):
            for cell in rows:
                if not cell.rho:
                    draw_level(axes, frame, cell, seeds)
            for method in ("sam", "msam"):
                line = [cell for cell in rows if cell.method == method]
                draw_points(axes, frame, line, seeds, "rho", label=method_name(line[0]) if line else "")
            seen = highest_mean(frame, [cell for cell in rows if cell.rho], seeds)
            axes.set(title=f"{title}{seen}", xlabel="rho", ylabel="test accuracy %")
            set_ticks(axes, (cell.rho for cell in rows if cell.rho))
            add_legend(axes)
    return figure


def against_m(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """Accuracy, accuracy with BatchNorm estimated anew, and the largest eigenvalue, against m: a row a network.

    Lines have one rho, that of SAM; open marks are where the grid chose another one for an m. What has the same m is
    drawn side by side.
    """
    measured = {cell.trained: cell for cell in cells if cell.trained}
    panels, frame = panels_of(cell for cell in cells if not cell.trained), results.runs.set_index("run_id")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3 * len(panels)), layout="constrained")
        for line, (title, rows) in zip(figure.subplots(len(panels), 3, squeeze=False), panels.items(), strict=True):
            plain = [cell for cell in rows if not cell.rho]
            rho = next((cell.rho for cell in rows if cell.method == "sam"), 0.0)
            fixed = [cell for cell in rows if cell.rho and cell.rho == rho]
            own = [cell for cell in rows if cell.rho and cell.rho != rho]
            name = base_name(rows[0])
            series = [(plain, "-", f"{name} over m micro-batches" if len(plain) > 1 else name, 0.93)]
            series += [(fixed, "-", f"mSAM, rho {rho:g}", 1.0)]
            series += [(own, "", "mSAM, where an m has a rho of its own", 1.07)]
            score, anew, curvature = line
            for found, style, label, shift in series:
                draw_points(score, frame, found, seeds, "micro_batches", label=label, style=style, shift=shift)
                known = [measured[cell] for cell in found if cell in measured]
                for axes, column, factor in (
                    (anew, "test_reestimated_accuracy", 100),
                    (curvature, "train_lambda_1", 1),
                ):
                    draw_points(
                        axes,
                        frame,
                        known,
                        seeds,
                        "micro_batches",
                        label=label,
                        style=style,
                        column=column,
                        factor=factor,
                        shift=shift,
                    )
            seen = highest_mean(frame, rows, seeds)
            score.set(title=f"{title}{seen}", ylabel="test accuracy %")
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
