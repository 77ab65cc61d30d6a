"""Table 3: flatness of the trained networks, and its three figures."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from analysis import published
from analysis.arms import COLOURS, LINES, MARKS, method_name
from analysis.cells import cells_in_order, claims, compared, to_significant, trained_anew, values
from analysis.document import Document, eigenvalue_columns, make_document, measure, row_notes
from analysis.frames import Results
from analysis.plots import STYLE, add_legend, line_of, panels_of, rounded, row_of_axes
from analysis.statistics import mean_interval
from experiments.harness.spec import Spec, score_name

NOTES_3 = (
    "Largest Hessian eigenvalue (lambda 1) and trace of the training loss at the final weights, on the first "
    "{examples} training and {examples} test examples, without augmentation; BatchNorm in eval mode, with its running "
    "statistics; float32. Means ± half-width of the 95 % Student t interval (number of seeds); differences are paired "
    "by seed, and negative is flatter. Lanczos residuals are at most {residual:.1g} of lambda 1; each trace has its "
    "own standard error in the records.",
    "Sharpness, times 1,000: rise of the loss at distance rho={rho} from the weights: the greatest found by ascent (a "
    "lower bound of the maximum), the mean over random directions, and the mean over m micro-batches of each one's "
    "rise at its own perturbation. One rho for all methods of a data set.",
    "Reparametrisation can change all of these without changing the function (Dinh et al. 2017, arXiv 1703.04933): "
    "between methods of one network and training they compare, between networks they do not.",
)

FLATNESS = (
    *("train_lambda_1", "test_lambda_1", "train_lambda_ratio", "train_trace", "test_trace", "train_loss"),
    *("train_ascent_sharpness", "test_ascent_sharpness", "train_average_sharpness", "test_average_sharpness"),
)
"""What a curvature run's table shows beside the sharpness of micro-batches."""


def table_3(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> pd.DataFrame:
    """Flatness of the networks of each cell: the numbers of their curvature runs.

    Args:
        frame: one row a finished run.
        cells: curvature specs at seed 0; a row each, in blocks as those of `table_1`.
        seeds: the seeds 0, ..., seeds - 1 are expected and looked at.

    Returns:
        One row a cell. `mean` is the largest Hessian eigenvalue on training data; its paired differences are as in
        `table_1`. Every other measure has its mean under its own name and its interval under `<name>_half_width`.
    """
    numbers, runs = compared(frame, cells, seeds), frame.set_index("run_id")
    known = [name for name in runs if re.fullmatch(r"(train|test)_(sharpness|penalty|squared)_m\d+", str(name))]
    columns: dict[str, list[float]] = {}
    for name in (*FLATNESS, *sorted(known, key=lambda n: (n.rsplit("m", 1)[0], int(n.rsplit("m", 1)[1])))):
        found = [mean_interval(values(runs, cell, seeds, name)) for cell in cells_in_order(cells)]
        columns[name] = [f.mean for f in found]
        columns[f"{name}_half_width"] = [f.half_width for f in found]
    residuals = [values(runs, cell, seeds, "train_residual") for cell in cells_in_order(cells)]
    columns["residual"] = [found.max() if len(found) else float("nan") for found in residuals]
    numbers = numbers.join(pd.DataFrame(columns))
    return to_significant(numbers)


def document_3(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
) -> Document:
    """Table 3, or the part of it that one experiment fills, ready to be written."""
    numbers = table_3(frame, cells, seeds)
    marks, notes = row_notes(numbers, failures or {})
    split = f"m{max((c.micro_batches for c in cells), default=1)}"
    measures = {
        "lambda 1, test": "test_lambda_1",
        "lambda 1 / lambda 5": "train_lambda_ratio",
        "trace": "train_trace",
    }
    rises = {
        "sharpness": "train_ascent_sharpness",
        "average": "train_average_sharpness",
        "m=1": "train_sharpness_m1",
        f"m={split[1:]}": f"train_sharpness_{split}",
    }
    text = pd.DataFrame(
        {
            "dataset": numbers["dataset"],
            "model": numbers["model"],
            "method": numbers["label"],
            **eigenvalue_columns(numbers, marks),
            **{title: measure(numbers, column) for title, column in measures.items()},
            **{title: measure(numbers, column, 1000) for title, column in rises.items()},
        }
    )
    told = {
        "examples": ", ".join(dict.fromkeys(str(c.measured_examples) for c in cells)),
        "rho": ", ".join(dict.fromkeys(f"{c.measured_rho:g}" for c in cells)),
        "residual": numbers["residual"].max(),
    }
    return make_document(
        (name, frame, cells, seeds),
        numbers,
        text,
        title=f"{name}: flatness",
        claims=claims(numbers, expected=-1),
        notes=(
            *notes,
            *trained_anew(frame, cells, seeds),
            *(note.format(**told) for note in NOTES_3),
            *published.FLATNESS,
        ),
    )


def flatness(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """Test accuracy of every network against its largest eigenvalue: a panel a model.

    The title has the rank correlation over the methods within a seed, as its mean over the seeds.
    """
    frame = results.runs.set_index("run_id")
    with mpl.rc_context(STYLE):
        panels = panels_of(cells)
        figure = Figure(figsize=(3.9 * len(panels), 3), layout="constrained")
        for axes, (title, rows) in zip(row_of_axes(figure, len(panels)), panels.items(), strict=True):
            points: dict[int, list[tuple[float, float]]] = {seed: [] for seed in range(seeds)}
            for cell in rows:
                assert cell.trained is not None
                eigenvalues = values(frame, cell, seeds, "train_lambda_1")
                scores = 100 * values(frame, cell, seeds, score_name(cell.trained))
                both = sorted(set(eigenvalues.index) & set(scores.index))
                for seed in both:
                    points[seed].append((eigenvalues[seed], scores[seed]))
                if both:
                    label = method_name(cell)
                    look: dict[str, Any] = {"ms": 4, "color": COLOURS[cell.method], "label": label}
                    axes.plot(eigenvalues[both], scores[both], MARKS[cell.method], **look)
            ranks = mean_interval(stats.spearmanr(found).statistic for found in points.values() if len(found) > 2)
            seen = f"\nrank correlation within a seed {ranks.mean:+.2f} (mean of {ranks.n})" if ranks.n else ""
            axes.set(title=f"{title}{seen}", xlabel="lambda 1, training data", ylabel="test accuracy %")
            add_legend(axes)
    return figure


def spectra(curves: pd.DataFrame, cells: Sequence[Spec]) -> Figure:
    """Spectral densities at seed 0, a panel a model: each quadrature node as a narrow bump."""
    with mpl.rc_context(STYLE):
        panels = panels_of(cells)
        figure = Figure(figsize=(3.4 * len(panels), 2.8), layout="constrained")
        for axes, (title, rows) in zip(row_of_axes(figure, len(panels)), panels.items(), strict=True):
            greatest: dict[str, float] = {}
            for cell in rows:
                line = line_of(curves, cell, "density")
                if line is None:
                    continue
                nodes, weights = (np.array(json.loads(line[f"density_{n}"])) for n in ("nodes", "weights"))
                grid = np.linspace(nodes.min() - 1, nodes.max() + 1, 800)
                width = (nodes.max() - nodes.min()) / 100
                bumps = np.exp(-(((grid[:, None] - nodes) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
                density = rounded(bumps @ weights)
                look = {"color": COLOURS[cell.method], "ls": LINES[cell.method], "lw": 1}
                axes.semilogy(grid, density, label=method_name(cell), **look)
                greatest[method_name(cell)] = nodes.max()
            axes.set(title=f"{title}{_reach(greatest)}", xlabel="eigenvalue", ylabel="density", ylim=(1e-7, None))
            add_legend(axes)
    return figure


def slices(curves: pd.DataFrame, cells: Sequence[Spec]) -> Figure:
    """Training loss at seed 0 along a filter-normalised direction, and below on the plane of two, a column a model."""
    with mpl.rc_context(STYLE):
        panels = panels_of(cells)
        figure = Figure(figsize=(3.4 * len(panels), 5.4), layout="constrained")
        top, bottom = figure.subplots(2, len(panels), squeeze=False)
        for axes, plane, (title, rows) in zip(top, bottom, panels.items(), strict=True):
            levels: Any = []  # of the first, so that equal lines are equal losses
            for cell in rows:
                line = line_of(curves, cell, "slices")
                if line is None:
                    continue
                positions, losses, grid = (
                    np.array(json.loads(line[n])) for n in ("slice_positions", "slice_losses", "plane_losses")
                )
                look: dict[str, Any] = {"color": COLOURS[cell.method], "ls": LINES[cell.method], "lw": 1}
                axes.plot(positions, losses, label=method_name(cell), **look)
                coarse = positions[::2]
                if cell.method in ("base", "msam"):
                    surface = grid.reshape(len(coarse), len(coarse))
                    levels = levels if len(levels) else rounded(np.geomspace(max(grid.min(), 1e-3), grid.max(), 7))
                    plane.contour(coarse, coarse, surface.T, levels, colors=COLOURS[cell.method], linewidths=0.7)
            axes.set(title=f"{title}, seed 0", xlabel="position", ylabel="training loss")
            plane.set(xlabel="first direction", ylabel="second direction", aspect="equal")
            add_legend(axes)
    return figure


def _reach(greatest: Mapping[str, float]) -> str:
    """For a title: between what eigenvalues the methods' densities end."""
    if not greatest:
        return ""
    low, high = (choose(greatest, key=greatest.__getitem__) for choose in (min, max))
    return f", seed 0\nends at {greatest[low]:.0f} ({low})\nto {greatest[high]:.0f} ({high})"
