"""The figures, drawn from frames of runs as the tables are: each function returns one page.

The pages are PDF and PNG without dates, so that the same numbers give the same files.
"""

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import tables
from analysis.collect import Results
from analysis.statistics import mean_interval
from experiments.harness.spec import METHODS, Spec

COLOURS = dict(zip(METHODS, ("#4d4d4d", "#8c8cd9", "#d98c26", "#1b7837"), strict=True))
"""Of the methods, everywhere."""
MARKS = dict(zip(METHODS, ("o", "v", "s", "D"), strict=True))

STYLE = {
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


def pages(
    results: Results, flat: Sequence[Spec], seeds: int, stability: Sequence[Spec], problems: int
) -> dict[str, bytes]:
    """All figures of Table 3 and of the theory, by their path below a results folder.

    Args:
        results: runs and curves.
        flat: the cells of Table 3; none leaves its figures out.
        seeds: theirs.
        stability: the cells of the theory's table; none leaves its panels empty.
        problems: seeds of theirs.
    """
    simulated = tables.theory_table(results.runs, stability, problems) if stability else None
    found = {"theory": theory(simulated, results.runs, flat, seeds, problems)}
    if flat:
        found["spectra"] = spectra(results.curves, flat)
        found["slices"] = slices(results.curves, flat)
    return {f"figures/{name}": page for title, figure in found.items() for name, page in files(title, figure).items()}


def theory(
    simulated: pd.DataFrame | None, runs: pd.DataFrame, cells: Sequence[Spec], seeds: int, seeds_theory: int
) -> Figure:
    """One page: stability boundaries, the penalty P(m) of trained networks, and their largest eigenvalues.

    Args:
        simulated: what `tables.theory_table` returned, or None if nothing was simulated.
        runs: one row a finished run.
        cells: the curvature specs of Table 3; may be empty.
        seeds: theirs.
        seeds_theory: random problems behind each simulated point.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        (rho, eta, penalty), (left, middle, right) = figure.subplots(2, 3)
        if simulated is not None:
            _boundaries(rho, simulated, "rho", f"(a) eta = 0.1, n = {seeds_theory}")
            _boundaries(eta, simulated, "learning_rate", f"(b) rho = 0.1, n = {seeds_theory}")
        models = list(dict.fromkeys(c.model for c in cells))
        if models:
            _penalty(penalty, runs, [c for c in cells if c.model == models[0]], seeds)
        for axes, model in zip((left, middle, right), models, strict=False):
            _eigenvalues(axes, runs, [c for c in cells if c.model == model], seeds)
        for axes in figure.axes:
            if not axes.has_data():
                axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes)
                axes.set_axis_off()
    return figure


def spectra(curves: pd.DataFrame, cells: Sequence[Spec]) -> Figure:
    """Spectral densities at seed 0, a panel a model: each quadrature node as a narrow bump."""
    with mpl.rc_context(STYLE):
        panels = _models(cells)
        figure = Figure(figsize=(3.4 * len(panels), 2.8), layout="constrained")
        for axes, (title, rows) in zip(_row(figure, len(panels)), panels.items(), strict=True):
            for cell in rows:
                line = _line(curves, cell, "density")
                if line is None:
                    continue
                nodes, weights = (np.array(json.loads(line[f"density_{n}"])) for n in ("nodes", "weights"))
                grid = np.linspace(nodes.min() - 1, nodes.max() + 1, 800)
                width = (nodes.max() - nodes.min()) / 100
                bumps = np.exp(-(((grid[:, None] - nodes) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
                axes.semilogy(grid, bumps @ weights, color=COLOURS[cell.method], label=tables.method_name(cell), lw=1)
            axes.set(title=title, xlabel="eigenvalue", ylabel="density", ylim=(1e-7, None))
            _legend(axes)
    return figure


def slices(curves: pd.DataFrame, cells: Sequence[Spec]) -> Figure:
    """Training loss at seed 0 along a filter-normalised direction, and below on the plane of two, a column a model."""
    with mpl.rc_context(STYLE):
        panels = _models(cells)
        figure = Figure(figsize=(3.4 * len(panels), 5.4), layout="constrained")
        top, bottom = figure.subplots(2, len(panels), squeeze=False)
        for axes, plane, (title, rows) in zip(top, bottom, panels.items(), strict=True):
            levels: Any = []  # of the first, so that equal lines are equal losses
            for cell in rows:
                line = _line(curves, cell, "slices")
                if line is None:
                    continue
                positions, losses, grid = (
                    np.array(json.loads(line[n])) for n in ("slice_positions", "slice_losses", "plane_losses")
                )
                axes.plot(positions, losses, color=COLOURS[cell.method], label=tables.method_name(cell), lw=1)
                coarse = positions[::2]
                if cell.method in ("base", "msam"):
                    surface = grid.reshape(len(coarse), len(coarse))
                    levels = levels if len(levels) else np.geomspace(max(grid.min(), 1e-3), grid.max(), 7)
                    plane.contour(coarse, coarse, surface.T, levels, colors=COLOURS[cell.method], linewidths=0.7)
            axes.set(title=title, xlabel="position", ylabel="training loss")
            plane.set(xlabel="first direction", ylabel="second direction", aspect="equal")
            _legend(axes)
    return figure


def _boundaries(axes: Axes, numbers: pd.DataFrame, along: str, title: str) -> None:
    """Simulated boundaries as points, filled for the regression, on the predicted lines."""
    other, value = ("learning_rate", 0.1) if along == "rho" else ("rho", 0.1)
    exact = numbers[(numbers["part"] == "exact") & (numbers["n"] > 0)]
    for method in ("base", "sam", "msam"):
        for model, face in (("regression", COLOURS[method]), ("two-layer", "none")):
            rows = exact[(exact["method"] == method) & (exact["model"] == model)]
            if method != "base" or along == "rho":
                rows = rows[rows[other] == value]
            rows = rows.sort_values(along)
            if rows.empty:
                continue
            if method == "base" and along == "rho":
                label = "gradient descent: 2 / eta" if model == "regression" else None
                axes.axhline(rows["predicted"].iloc[0], color=COLOURS[method], lw=1, label=label)
                continue
            style = "-" if model == "regression" else "--"
            axes.plot(rows[along], rows["predicted"], style, color=COLOURS[method], lw=1)
            label = "gradient descent" if method == "base" else rows["label"].iloc[0]
            axes.errorbar(
                rows[along],
                rows["mean"],
                rows["half_width"].fillna(0),
                fmt=MARKS[method],
                ms=4,
                color=COLOURS[method],
                mfc=face,
                label=f"{label}, {model}",
            )
    words = {"rho": "rho (unnormalised)", "learning_rate": "learning rate eta"}[along]
    axes.set(xscale="log", yscale="log", xlabel=words, ylabel="largest stable lambda max(H)", title=title)
    _legend(axes, fontsize=6)


def _penalty(axes: Axes, runs: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> None:
    """P(m), measured at the final weights; dashed what the examples' gradients alone let expect of random splits."""
    frame = runs.set_index("run_id")
    for cell in cells:
        counts = [2**k for k in range(20) if 2**k <= cell.measured_examples]
        found = [mean_interval(tables.values(frame, cell, seeds, f"train_penalty_m{m}")) for m in counts]
        if not found[0].n:
            continue
        axes.loglog(
            counts,
            [f.mean for f in found],
            MARKS[cell.method] + "-",
            ms=3,
            lw=1,
            color=COLOURS[cell.method],
            label=tables.method_name(cell),
        )
        one, each = (
            mean_interval(tables.values(frame, cell, seeds, f"train_squared_m{m}")).mean for m in (1, counts[-1])
        )
        expected = [(one + (each - one) * (m - 1) / (counts[-1] - 1)) ** 0.5 for m in counts]
        axes.loglog(counts, expected, "--", lw=0.7, color=COLOURS[cell.method])
    axes.set(xlabel="m", ylabel="P(m), mean of ||grad L_i||", title=f"(c) {cells[0].model}, training data")
    _legend(axes, fontsize=6)


def _eigenvalues(axes: Axes, runs: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> None:
    """Bars of lambda 1 with their intervals, every seed as a point joined across the methods: what is paired."""
    frame = runs.set_index("run_id")
    found = [tables.values(frame, cell, seeds, "train_lambda_1") for cell in cells]
    for place, (cell, values) in enumerate(zip(cells, found, strict=True)):
        if len(values):
            interval = mean_interval(values)
            half = interval.half_width if interval.n > 1 else 0
            axes.bar(place, interval.mean, yerr=half, width=0.6, color=COLOURS[cell.method], alpha=0.6, capsize=3)
    for seed in range(seeds):
        points = [(i, v[seed]) for i, v in enumerate(found) if seed in v.index]
        if points:
            axes.plot(*zip(*points, strict=True), "-k", marker=".", lw=0.5, ms=4)
    base, msam = (next((v for c, v in zip(cells, found, strict=True) if c.method == m), None) for m in ("base", "msam"))
    axes.set_xticks(range(len(cells)), [tables.method_name(cell) for cell in cells], rotation=15)
    note = ""
    if base is not None and msam is not None and len(base) and len(msam):
        note = f"\nmSAM - base: {tables.verdict(tables.paired_difference(msam, base)).split(':')[0]}"
    axes.set(ylabel="lambda 1, training data", title=f"{cells[0].model}{note}")


def _legend(axes: Axes, **options: Any) -> None:
    if axes.has_data():
        axes.legend(**options)


def _models(cells: Iterable[Spec]) -> dict[str, list[Spec]]:
    """The cells by model and data set."""
    found: dict[str, list[Spec]] = {}
    for cell in cells:
        found.setdefault(f"{cell.model}, {cell.dataset}", []).append(cell)
    return found


def _row(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _line(curves: pd.DataFrame, cell: Spec, measure: str) -> Any:
    """The measurement's line of a cell's run at seed 0 on training data, if it is there."""
    if "measure" not in curves:
        return None
    found = curves[(curves["run_id"] == cell.run_id) & (curves["measure"] == measure) & (curves["part"] == "train")]
    return None if found.empty else found.iloc[0]
