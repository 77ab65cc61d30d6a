"""Table 3: flatness of the trained networks, with three figures."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from analysis.cells import (
    averages,
    cells_in_order,
    interval,
    mean_columns,
    of_blocks,
    references,
    rounded_relative,
    unmatched,
    values,
)
from analysis.contrasts import FLATTER
from analysis.document import SIGNIFICANCE_NOTE, measure, three_digits
from analysis.evidence import claim
from analysis.exhibit import Exhibit, Picture, Target, View
from analysis.flatness import (
    difference_columns,
    eigenvalue_columns,
    eigenvalue_numbers,
    eigenvalue_sentences,
    micro_batch_measures,
    rank_sentences,
    ranks_within_seeds,
    shown_references,
)
from analysis.frames import Results
from analysis.plots import add_common_legend, line_of, panels_of, row_of_panels, six_digits
from analysis.scores import margin_of
from analysis.sentences import measure_sentences, rows_of_cells
from experiments.harness.runs.methods import ARMS
from experiments.harness.runs.spec import Run

NOTES = (
    "Largest Hessian eigenvalue (lambda 1) and trace of the training loss at the final weights, on the first "
    "{examples} training and {examples} test examples, without augmentation; BatchNorm in eval mode, with its running "
    "statistics; float32. Means ± half-width of the 95 % Student t interval (number of seeds). A ratio is the mean "
    "difference of natural logarithms, paired by seed, with the ends of its 95 % t interval; below 1 is flatter. "
    + SIGNIFICANCE_NOTE
    + " Lanczos residuals are at most {residual:.1g} of lambda 1. "
    "The records have the standard error of each trace.",
    "Sharpness, times 1,000: rise of the loss at distance rho={rho} from the weights: the largest reached by ascent (a "
    "lower bound of the maximum), the mean over random directions, and the mean over m micro-batches, each at its own "
    "perturbation. All methods of a data set use the same rho.",
    "Training loss: that of the measured training examples at the final weights; differences are paired by seed. A "
    "network that has not reached its minimum may be flat for that reason alone: where training losses differ, a "
    "difference in flatness is not evidence that a method chooses flatter minima.",
    "The claims are tested by every measure, not by one: lambda 1 on training and on test data, the trace, and the "
    "three kinds of sharpness on training data. Each is compared by the natural log of the ratio if all values at the "
    "common seeds are positive, and by the difference otherwise; the average sharpness, which is near zero with either "
    "sign, always by the difference. The claims say which.",
    "Reparametrisation can change all of these measures without changing the function (Dinh et al. 2017, arXiv "
    "1703.04933). They can be compared between methods on one network and training setup, but not between networks.",
)

NOTE_REESTIMATED = (
    "Re-estimated: test accuracy, in points, after BatchNorm's statistics are averaged over one more epoch of "
    "mini-batches at the final weights. The running statistics of arms with micro-batches come from smaller batches."
)

NOTE_SHARED = "Shared is SAM on the same micro-batches, with one perturbation for all of them."

PUBLISHED = (
    "Published elsewhere, in other settings: Foret et al. 2021, section 4.2 (read in the source): WRN-40-10 without "
    "BatchNorm on CIFAR-10, lambda 1 about 24 with SGD and 1.0 with SAM, lambda 1 / lambda 5 up to 11.4 and 2.6."
)
"""Curvatures from other papers; none is from the mSAM paper."""

FLATNESS = (
    *("train_lambda_1", "test_lambda_1", "train_lambda_ratio", "train_trace", "test_trace", "train_loss"),
    *("train_ascent_sharpness", "test_ascent_sharpness", "train_average_sharpness", "test_average_sharpness"),
)
"""The measures of a curvature run in the table's CSV, apart from the sharpness of micro-batches."""


def numbers(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """Flatness of each cell's networks: the numbers of their curvature runs.

    Args:
        frame: one row for each finished run.
        cells: curvature specs at seed 0, one for each row, in blocks as in Table 1.
        seeds: the seeds 0, ..., seeds - 1 are expected and used.
        varies: the fields that the table's experiments declare to vary.

    Returns:
        One row for each cell. `mean` is the largest Hessian eigenvalue on training data; `log_over_base` and the like
        are the paired differences of its logarithm, and `loss_over_base` and the like those of the training loss. Every
        other measure has its mean under its name and its interval under `<name>_half_width`. `reestimated` is the test
        accuracy with re-estimated BatchNorm statistics, `reestimated_over_base` and the like its differences.
    """
    runs, rows = frame.set_index("run_id"), cells_in_order(cells, varies)
    table = eigenvalue_numbers(frame, cells, seeds, varies)
    others = references(cells, varies)
    loss = difference_columns("loss_", "train_loss", runs, others, seeds)
    reestimated = difference_columns("reestimated_", "test_reestimated_accuracy", runs, others, seeds)
    columns = mean_columns("reestimated", averages(runs, rows, seeds, "test_reestimated_accuracy", 100))
    for name in (*FLATNESS, *micro_batch_measures(list(runs))):
        columns |= mean_columns(name, averages(runs, rows, seeds, name))
    residuals = [values(runs, cell, seeds, "train_residual") for cell in rows]
    columns["residual"] = [by_seed.max() if len(by_seed) else float("nan") for by_seed in residuals]
    return rounded_relative(table.join([loss, reestimated, pd.DataFrame(columns)]))


def text(view: View) -> pd.DataFrame:
    """The largest eigenvalue with its differences, and the other measures."""
    table = view.numbers
    m = max((c.micro_batches for c in view.target.cells), default=1)
    measures = {
        "lambda 1, test": "test_lambda_1",
        "lambda 1 / lambda 5": "train_lambda_ratio",
        "trace": "train_trace",
    }
    rises = {
        "sharpness": "train_ascent_sharpness",
        "average": "train_average_sharpness",
        "m=1": "train_sharpness_m1",
        f"m={m}": f"train_sharpness_m{m}",
    }
    return pd.DataFrame(
        {
            "dataset": table["dataset"],
            "model": table["model"],
            "method": table["label"],
            **eigenvalue_columns(table, view.marks),
            **_loss_columns(view),
            **{title: measure(table, column) for title, column in measures.items()},
            **{title: measure(table, column, 1000) for title, column in rises.items()},
        }
    )


def _loss_columns(view: View) -> dict[str, list[str]]:
    """The training loss and its differences."""
    differences = {
        f"loss over {words}": [three_digits(interval(row, f"loss_over_{name}"), signed=True) for row in view.rows]
        for name, words in shown_references(view.numbers, "loss_").items()
    }
    return {"training loss": measure(view.numbers, "train_loss"), **differences}


def sentences(view: View) -> Iterator[str]:
    """The ratios of each block's eigenvalues, and where the training losses differ as well."""
    yield from eigenvalue_sentences(view)
    places = of_blocks(view.numbers)
    for number, block in view.numbers.groupby("block", sort=True):
        if differing := _differing_losses(view, number):
            where = f"{block['model'].iloc[0]}, {block['dataset'].iloc[0]}{places[number]}"
            yield (
                f"{where}: the training losses differ, so a network may be flatter because it is farther from its "
                f"minimum: {'; '.join(differing)}."
            )
    yield from rank_sentences(view.frame.set_index("run_id"), view.target.cells, view.target.seeds)
    network = view.target.cells[0].network
    margin = margin_of(network) if network else math.nan
    yield from measure_sentences(view, "reestimated", "test accuracy with re-estimated BatchNorm", 1, margin)
    yield from unmatched(view.target.cells, view.target.varies)


def _differing_losses(view: View, number: int) -> list[str]:
    """The significant differences in training loss between the methods of a block that are compared."""
    rows, others = rows_of_cells(view), view.target.references
    return [
        f"{row.label} over {rows[other].label} {three_digits(loss, signed=True)}"
        for cell, row in rows.items()
        if row.block == number
        for name in ARMS[row.method].against
        if (other := others[cell].get(f"over_{name}")) and (loss := interval(row, f"loss_over_{name}")).significant
    ]


def notes(view: View) -> list[str]:
    """Explain how to read the measures."""
    words = {
        "examples": ", ".join(dict.fromkeys(str(c.flat["measured_examples"]) for c in view.target.cells)),
        "rho": ", ".join(dict.fromkeys(f"{c.flat['measured_rho']:g}" for c in view.target.cells)),
        "residual": view.numbers["residual"].max(),
    }
    more = [NOTE_REESTIMATED] if view.numbers["reestimated"].notna().any() else []
    more += [NOTE_SHARED] if "log_over_shared" in view.numbers else []
    return [*(note.format(**words) for note in NOTES), *more, PUBLISHED]


def flatness(results: Results, target: Target) -> Figure:
    """Test accuracy of every network against its largest eigenvalue, one panel for each model.

    The title shows the rank correlation over the methods within a seed, averaged over the seeds.
    """
    frame = results.runs.set_index("run_id")
    panels = panels_of(target.cells)
    figure, row = row_of_panels(len(panels), 3.9, 3.4)
    for axes, (title, rows) in zip(row, panels.items(), strict=True):
        for cell in rows:
            assert cell.network is not None
            eigenvalues = values(frame, cell, target.seeds, "train_lambda_1")
            scores = 100 * values(frame, cell, target.seeds, cell.network.score)
            common = sorted(set(eigenvalues.index) & set(scores.index))
            if common:
                arm = target.arms[cell]
                style: dict[str, Any] = {"ms": 4, "color": arm.colour, "label": arm.called(cell)}
                axes.plot(eigenvalues[common], scores[common], arm.mark, **style)
        ranks = ranks_within_seeds(frame, rows, target.seeds, "train_lambda_1")
        spread = f" ± {ranks.half_width:.2f}" if ranks.n > 1 else ""
        correlation = f"\nrank correlation within a seed {ranks.mean:+.2f}{spread} (n={ranks.n})" if ranks.n else ""
        axes.set(title=f"{title}{correlation}", xlabel="lambda 1, training data (log)", ylabel="test accuracy %")
        if axes.lines:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(LogFormatter())
            axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    add_common_legend(figure, len(panels))
    return figure


def spectra(results: Results, target: Target) -> Figure:
    """Spectral densities at seed 0, one panel for each model; each quadrature node is a narrow bump."""
    panels = panels_of(target.cells)
    figure, row = row_of_panels(len(panels), 3.4, 3.4)
    for axes, (title, rows) in zip(row, panels.items(), strict=True):
        greatest: dict[str, float] = {}
        for cell in rows:
            line = line_of(results.curves, cell, "density")
            if line is None:
                continue
            nodes, weights = (np.array(json.loads(line[f"density_{n}"])) for n in ("nodes", "weights"))
            grid = np.linspace(nodes.min() - 1, nodes.max() + 1, 800)
            width = (nodes.max() - nodes.min()) / 100
            bumps = np.exp(-(((grid[:, None] - nodes) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
            density = six_digits(bumps @ weights)
            arm = target.arms[cell]
            axes.semilogy(grid, density, label=arm.called(cell), color=arm.colour, ls=arm.line, lw=1)
            greatest[arm.called(cell)] = nodes.max()
        axes.set(title=f"{title}{_reach(greatest)}", xlabel="eigenvalue", ylabel="density", ylim=(1e-7, None))
    add_common_legend(figure, len(panels))
    return figure


def slices(results: Results, target: Target) -> Figure:
    """Training loss at seed 0 along a filter-normalised direction (top) and on the plane of two (bottom), by model."""
    panels = panels_of(target.cells)
    figure = Figure(figsize=(3.4 * len(panels), 6), layout="constrained")
    top, bottom = figure.subplots(2, len(panels), squeeze=False)
    for axes, plane, (title, rows) in zip(top, bottom, panels.items(), strict=True):
        levels: Any = []  # from the first surface, so that equal lines are equal losses
        for cell in rows:
            line = line_of(results.curves, cell, "slices")
            if line is None:
                continue
            positions, losses, grid = (
                np.array(json.loads(line[n])) for n in ("slice_positions", "slice_losses", "plane_losses")
            )
            arm = target.arms[cell]
            axes.plot(positions, losses, label=arm.called(cell), color=arm.colour, ls=arm.line, lw=1)
            coarse = positions[::2]
            if arm.name in ("base", "msam"):
                surface = grid.reshape(len(coarse), len(coarse))
                levels = levels if len(levels) else six_digits(np.geomspace(max(grid.min(), 1e-3), grid.max(), 7))
                plane.contour(coarse, coarse, surface.T, levels, colors=arm.colour, linewidths=0.7)
        axes.set(title=f"{title}, seed 0", xlabel="position", ylabel="training loss")
        plane.set(xlabel="first direction", ylabel="second direction", aspect="equal")
    add_common_legend(figure, len(panels))
    return figure


def _reach(greatest: Mapping[str, float]) -> str:
    """For a title: the lowest and the highest largest eigenvalue of the methods."""
    if not greatest:
        return ""
    low, high = (choose(greatest, key=greatest.__getitem__) for choose in (min, max))
    return f", seed 0\nends at {greatest[low]:.0f} ({low})\nto {greatest[high]:.0f} ({high})"


EXHIBIT = Exhibit(
    name="table3",
    title="Table 3: flatness",
    part="{name}: flatness",
    shows=lambda cell: cell.kind == "curvature",
    numbers=numbers,
    text=text,
    sentences=sentences,
    notes=notes,
    claims=tuple(claim(contrast) for contrast in FLATTER),
    figures=(
        Picture(
            "flatness",
            "Test accuracy against the largest Hessian eigenvalue; each point is a network.",
            flatness,
            place=95,
        ),
        Picture("spectra", "Spectral density of the Hessian at seed 0.", spectra, place=95),
        Picture(
            "slices",
            "Slices of the training loss along filter-normalised directions at seed 0.",
            slices,
            place=95,
        ),
    ),
    place=30,
)
