"""The figures, drawn from frames of runs as the tables are: each function returns one page.

The pages are PDF and PNG without dates, so that the same numbers give the same files.
"""

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from analysis import tables
from analysis.collect import Results
from analysis.statistics import Interval, mean_interval
from experiments.harness.runs.spec import METHODS, Spec, score_name

COLOURS = dict(zip(METHODS, ("#262626", "#b3b3ec", "#d98c26", "#1b7837"), strict=True))
"""Of the methods, everywhere: apart for the colour-blind, and from dark to light base, mSAM, SAM, control."""
LINES = dict(zip(METHODS, ("-", ":", "--", "-."), strict=True))
"""Of the methods, where lines have no marks."""
METHOD_WORDS = {"base": "{base}", "control": "{base} over micro-batches", "sam": "SAM", "msam": "mSAM"}
"""Of methods whose m differs from point to point."""
MARKS = dict(zip(METHODS, ("o", "v", "s", "D"), strict=True))

STYLE: dict[Any, Any] = {
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


def pages(results: Results, shown: Mapping[str, tuple[Sequence[Spec], int]]) -> dict[str, bytes]:
    """All figures of some tables, by their path below a results folder.

    Args:
        results: runs and curves.
        shown: the tables by name, each with its cells and its number of seeds.
    """
    found = {}
    (flat, seeds), (stability, problems) = (shown.get(name, ((), 0)) for name in ("table3", "theory"))
    if flat or stability:
        simulated = tables.theory_table(results.runs, stability, problems) if stability else None
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


def curves(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """Training loss above, and below how much it rises under the perturbations, by epoch: a column a model."""
    panels = {title: rows for title, rows in _models(cells).items() if len(rows) > 1 and rows[0].model != "linear"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(panels), 5), layout="constrained")
        losses, rises = figure.subplots(2, len(panels), squeeze=False)
        for top, bottom, (title, rows) in zip(losses, rises, panels.items(), strict=True):
            last = {tables.method_name(c): _band(top, results.curves, c, seeds, "train_loss") for c in rows}
            for cell in rows:
                if cell.rho:
                    _band(bottom, results.curves, cell, seeds, "sharpness")
            top.set(title=f"{title}{_ends(last)}", xlabel="epoch", ylabel="training loss")
            bottom.set(xlabel="epoch", ylabel="rise of the loss under e")
            for axes in (top, bottom):
                _logarithmic(axes)
                _legend(axes)
    return figure


def trajectories(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """The largest Hessian eigenvalue by epoch, a panel a model."""
    panels = _models(cells)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 3.2), layout="constrained")
        for axes, (title, rows) in zip(_row(figure, len(panels)), panels.items(), strict=True):
            last = {tables.method_name(c): _band(axes, results.curves, c, seeds, "lambda_1") for c in rows}
            axes.set(title=f"{title}{_ends(last)}", xlabel="epoch", ylabel="lambda 1")
            _logarithmic(axes)
            _legend(axes)
    return figure


def against(results: Results, cells: Sequence[Spec], seeds: int, *, field: str, words: str) -> Figure:
    """Test accuracy of each method against a field of the spec, a panel a model."""
    panels, frame = _models(cells), results.runs.set_index("run_id")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 3.2), layout="constrained")
        for axes, (title, rows) in zip(_row(figure, len(panels)), panels.items(), strict=True):
            for method in METHODS:
                line = [cell for cell in rows if cell.method == method]
                label = METHOD_WORDS[method].format(base=tables.base_name(line[0])) if line else ""
                _points(axes, frame, line, seeds, field, label=label)
            axes.set(title=f"{title}{_gain(frame, rows, seeds, field)}", xlabel=words, ylabel="test accuracy %")
            if field == "batch_size":
                _ticks(axes, (cell.batch_size for cell in rows))
            _legend(axes)
    return figure


def against_rho(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """Test accuracy of SAM and mSAM against rho; the methods without one as lines with their intervals."""
    panels, frame = _models(cells), results.runs.set_index("run_id")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(panels), 3.2), layout="constrained")
        for axes, (title, rows) in zip(_row(figure, len(panels)), panels.items(), strict=True):
            for cell in rows:
                if not cell.rho:
                    _level(axes, frame, cell, seeds)
            for method in ("sam", "msam"):
                line = [cell for cell in rows if cell.method == method]
                _points(axes, frame, line, seeds, "rho", label=tables.method_name(line[0]) if line else "")
            seen = _seen(frame, [cell for cell in rows if cell.rho], seeds)
            axes.set(title=f"{title}{seen}", xlabel="rho", ylabel="test accuracy %")
            _ticks(axes, (cell.rho for cell in rows if cell.rho))
            _legend(axes)
    return figure


def against_m(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """Accuracy, accuracy with BatchNorm estimated anew, and the largest eigenvalue, against m: a row a network.

    Lines have one rho, that of SAM; open marks are where the grid chose another one for an m. What has the same m is
    drawn side by side.
    """
    measured = {cell.trained: cell for cell in cells if cell.trained}
    panels, frame = _models(cell for cell in cells if not cell.trained), results.runs.set_index("run_id")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3 * len(panels)), layout="constrained")
        for line, (title, rows) in zip(figure.subplots(len(panels), 3, squeeze=False), panels.items(), strict=True):
            plain = [cell for cell in rows if not cell.rho]
            rho = next((cell.rho for cell in rows if cell.method == "sam"), 0.0)
            fixed = [cell for cell in rows if cell.rho and cell.rho == rho]
            own = [cell for cell in rows if cell.rho and cell.rho != rho]
            name = tables.base_name(rows[0])
            series = [(plain, "-", f"{name} over m micro-batches" if len(plain) > 1 else name, 0.93)]
            series += [(fixed, "-", f"mSAM, rho {rho:g}", 1.0)]
            series += [(own, "", "mSAM, where an m has a rho of its own", 1.07)]
            score, anew, curvature = line
            for found, style, label, shift in series:
                _points(score, frame, found, seeds, "micro_batches", label=label, style=style, shift=shift)
                known = [measured[cell] for cell in found if cell in measured]
                for axes, column, factor in (
                    (anew, "test_reestimated_accuracy", 100),
                    (curvature, "train_lambda_1", 1),
                ):
                    _points(
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
            seen = _seen(frame, rows, seeds)
            score.set(title=f"{title}{seen}", ylabel="test accuracy %")
            anew.set(title="BatchNorm's statistics estimated anew", ylabel="test accuracy %")
            curvature.set(title="flatness, training data", ylabel="lambda 1")
            for axes in line:
                axes.set_xlabel("m, micro-batches of a mini-batch")
                if axes.has_data():
                    _ticks(axes, (cell.micro_batches for cell in rows))
                else:
                    axes.set_title("")
                    axes.set_axis_off()
        keys = [axes.get_legend_handles_labels() for axes in figure.axes]
        named = {label: mark for marks, labels in keys for mark, label in zip(marks, labels, strict=True)}
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named))
    return figure


def cost(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """Time of a step over the base optimizer's, and memory, against m: a column a network; dashed: several workers."""
    numbers = tables.table_4(results.runs, cells, seeds)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(cells), 5), layout="constrained")
        grid = figure.subplots(2, len(cells), squeeze=False)
        for (time, memory), (block, rows) in zip(grid.T, numbers.groupby("block", sort=True), strict=True):
            for workers, style in zip(rows["workers"].unique(), ("-", "--"), strict=False):
                for method, others in (("control", ("base", "control")), ("msam", ("sam", "msam"))):
                    line = rows[rows["method"].isin(others) & (rows["workers"] == workers) & (rows["n"] > 0)]
                    if line.empty:
                        continue
                    look = {
                        "color": COLOURS[method],
                        "ms": 4,
                        "lw": 1,
                        "mfc": COLOURS[method] if workers == 1 else "none",
                    }
                    words = METHOD_WORDS[method].format(base=tables.base_name(cells[block]))
                    label = words + (f", {workers} workers" if workers > 1 else "")
                    half = line["half_width"].fillna(0)
                    form = f"{MARKS[method]}{style}"
                    time.errorbar(line["micro_batches"], line["mean"], half, fmt=form, capsize=2, label=label, **look)
                    spread = line["memory_bytes_half_width"].fillna(0) / 1e6
                    size = line["memory_bytes"] / 1e6
                    memory.errorbar(line["micro_batches"], size, spread, fmt=form, capsize=2, label=label, **look)
                    first = line.iloc[0]
                    for axes, y in ((time, first["mean"]), (memory, first["memory_bytes"] / 1e6)):
                        mark = {"ms": 5, "color": COLOURS[first["method"]]}
                        axes.plot([first["micro_batches"]], [y], MARKS[first["method"]], **mark)
            found = rows[(rows["method"] == "msam") & (rows["workers"] == 1) & (rows["n"] > 0)]
            seen = (
                ""
                if found.empty
                else f"\nmSAM, m={found['micro_batches'].iloc[-1]}: {found['mean'].iloc[-1]:.1f} times base"
            )
            time.set(title=f"{cells[block].model}, batch {cells[block].batch_size}{seen}", ylim=(0, None))
            memory.set(ylim=(0, None))
            for axes, words in ((time, "time over the base's step"), (memory, "memory of a step, MB")):
                axes.set(xlabel="m", ylabel=words)
                _ticks(axes, rows["micro_batches"])
        _legend(grid[0][0], fontsize=6)
    return figure


def flatness(results: Results, cells: Sequence[Spec], seeds: int) -> Figure:
    """Test accuracy of every network against its largest eigenvalue: a panel a model.

    The title has the rank correlation over the methods within a seed, as its mean over the seeds.
    """
    frame = results.runs.set_index("run_id")
    with mpl.rc_context(STYLE):
        panels = _models(cells)
        figure = Figure(figsize=(3.9 * len(panels), 3), layout="constrained")
        for axes, (title, rows) in zip(_row(figure, len(panels)), panels.items(), strict=True):
            points: dict[int, list[tuple[float, float]]] = {seed: [] for seed in range(seeds)}
            for cell in rows:
                assert cell.trained is not None
                eigenvalues = tables.values(frame, cell, seeds, "train_lambda_1")
                scores = 100 * tables.values(frame, cell, seeds, score_name(cell.trained))
                both = sorted(set(eigenvalues.index) & set(scores.index))
                for seed in both:
                    points[seed].append((eigenvalues[seed], scores[seed]))
                if both:
                    label = tables.method_name(cell)
                    look: dict[str, Any] = {"ms": 4, "color": COLOURS[cell.method], "label": label}
                    axes.plot(eigenvalues[both], scores[both], MARKS[cell.method], **look)
            ranks = mean_interval(stats.spearmanr(found).statistic for found in points.values() if len(found) > 2)
            seen = f"\nrank correlation within a seed {ranks.mean:+.2f} (mean of {ranks.n})" if ranks.n else ""
            axes.set(title=f"{title}{seen}", xlabel="lambda 1, training data", ylabel="test accuracy %")
            _legend(axes)
    return figure


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
            greatest: dict[str, float] = {}
            for cell in rows:
                line = _line(curves, cell, "density")
                if line is None:
                    continue
                nodes, weights = (np.array(json.loads(line[f"density_{n}"])) for n in ("nodes", "weights"))
                grid = np.linspace(nodes.min() - 1, nodes.max() + 1, 800)
                width = (nodes.max() - nodes.min()) / 100
                bumps = np.exp(-(((grid[:, None] - nodes) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
                density = _rounded(bumps @ weights)
                look = {"color": COLOURS[cell.method], "ls": LINES[cell.method], "lw": 1}
                axes.semilogy(grid, density, label=tables.method_name(cell), **look)
                greatest[tables.method_name(cell)] = nodes.max()
            axes.set(title=f"{title}{_reach(greatest)}", xlabel="eigenvalue", ylabel="density", ylim=(1e-7, None))
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
                look: dict[str, Any] = {"color": COLOURS[cell.method], "ls": LINES[cell.method], "lw": 1}
                axes.plot(positions, losses, label=tables.method_name(cell), **look)
                coarse = positions[::2]
                if cell.method in ("base", "msam"):
                    surface = grid.reshape(len(coarse), len(coarse))
                    levels = levels if len(levels) else _rounded(np.geomspace(max(grid.min(), 1e-3), grid.max(), 7))
                    plane.contour(coarse, coarse, surface.T, levels, colors=COLOURS[cell.method], linewidths=0.7)
            axes.set(title=f"{title}, seed 0", xlabel="position", ylabel="training loss")
            plane.set(xlabel="first direction", ylabel="second direction", aspect="equal")
            _legend(axes)
    return figure


def _reach(greatest: Mapping[str, float]) -> str:
    """For a title: between what eigenvalues the methods' densities end."""
    if not greatest:
        return ""
    low, high = (choose(greatest, key=greatest.__getitem__) for choose in (min, max))
    return f", seed 0\nends at {greatest[low]:.0f} ({low})\nto {greatest[high]:.0f} ({high})"


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
        axes.errorbar(
            counts,
            [f.mean for f in found],
            [f.half_width if f.n > 1 else 0 for f in found],
            fmt=MARKS[cell.method] + "-",
            ms=3,
            lw=1,
            capsize=2,
            color=COLOURS[cell.method],
            label=tables.method_name(cell),
        )
        one, each = (
            mean_interval(tables.values(frame, cell, seeds, f"train_squared_m{m}")).mean for m in (1, counts[-1])
        )
        expected = [(one + (each - one) * (m - 1) / (counts[-1] - 1)) ** 0.5 for m in counts]
        axes.loglog(counts, expected, "--", lw=0.7, color=COLOURS[cell.method])
    axes.set(xscale="log", yscale="log")
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
    names = [tables.method_name(cell).replace(", m=", "\nm=").replace(" micro-batches", "") for cell in cells]
    axes.set_xticks(range(len(cells)), names)
    note = ""
    if base is not None and msam is not None and len(base) and len(msam):
        note = f"\nmSAM - base: {tables.verdict(tables.paired_difference(msam, base)).split(':')[0]}"
    axes.set(ylabel="lambda 1, training data", title=f"{cells[0].model}{note}")


def _ends(last: Mapping[str, Interval]) -> str:
    """For a title: between what means the lines end, and how many seeds are behind them."""
    known = {name: interval for name, interval in last.items() if interval.n}
    if not known:
        return ""
    low, high = (choose(known, key=lambda name: known[name].mean) for choose in (min, max))
    counts = "-".join(map(str, sorted({interval.n for interval in known.values()})))
    return f"\nends at {known[low].mean:.3g} ({low})\nto {known[high].mean:.3g} ({high}), n = {counts}"


def _band(axes: Axes, curves: pd.DataFrame, cell: Spec, seeds: int, column: str) -> Interval:
    """The mean over seeds by epoch as a line in its 95 % band, of which nothing below a tenth of the mean is drawn.

    Returns:
        The last one.
    """
    nothing = mean_interval([])
    if column not in curves:
        return nothing
    rows = curves[curves["run_id"].isin(tables.ids(cell, seeds)) & curves[column].notna()]
    found = {int(epoch): mean_interval(group[column]) for epoch, group in rows.groupby("epoch", sort=True)}
    if not found:
        return nothing
    colour = COLOURS[cell.method]
    means, halves = (np.array([getattr(f, name) for f in found.values()]) for name in ("mean", "half_width"))
    mark = MARKS[cell.method] if len(found) < 20 else ""
    axes.plot(
        list(found), means, f"{mark}{LINES[cell.method]}", ms=3, lw=1, color=colour, label=tables.method_name(cell)
    )
    low, high = means - np.nan_to_num(halves), means + np.nan_to_num(halves)
    axes.fill_between(list(found), np.maximum(low, means / 10), high, color=colour, alpha=0.2, lw=0)
    return found[max(found)]


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis down to half of the least mean: bands that reach below 0 would fill it else."""
    means = [y for line in axes.lines for y in np.asarray(line.get_ydata(), dtype=float)]
    if means:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(means) / 2)


def _ticks(axes: Axes, tried: Iterable[float]) -> None:
    """A logarithmic axis across that names the values that were tried, and no others."""
    values = sorted(set(tried))
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def _points(
    axes: Axes,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    field: str,
    *,
    label: str,
    style: str = "-",
    column: str | None = None,
    factor: float = 100,
    shift: float = 1,
) -> None:
    """Means with their intervals against a field of the spec times the shift, in the last cell's method's colour.

    They are joined by a line of the style; without one they are open marks.
    """
    found = [
        (getattr(cell, field), mean_interval(factor * tables.values(frame, cell, seeds, column or score_name(cell))))
        for cell in sorted(cells, key=lambda cell: getattr(cell, field))
    ]
    found = [(x, interval) for x, interval in found if interval.n]
    if not found:
        return
    method = cells[-1].method
    axes.errorbar(
        [shift * x for x, _ in found],
        [interval.mean for _, interval in found],
        [interval.half_width if interval.n > 1 else 0 for _, interval in found],
        fmt=f"{MARKS[method]}{style}",
        ms=4,
        lw=1,
        capsize=2,
        color=COLOURS[method],
        mfc=COLOURS[method] if style else "none",
        label=label,
    )
    # m = 1 of a line is the base optimizer or SAM, which keeps its colour and mark
    others = {getattr(cell, field): cell for cell in cells if cell.method != method}
    for x, interval in found:
        if x in others:
            other, name = others[x].method, tables.method_name(others[x])
            axes.plot([shift * x], [interval.mean], MARKS[other], ms=5, color=COLOURS[other], label=name, zorder=3)


def _level(axes: Axes, frame: pd.DataFrame, cell: Spec, seeds: int) -> None:
    """A cell's mean as a line across, with its interval as a band."""
    found = mean_interval(100 * tables.values(frame, cell, seeds, score_name(cell)))
    if found.n:
        style = {"base": "-", "control": ":"}[cell.method]
        axes.axhline(found.mean, ls=style, lw=1, color=COLOURS[cell.method], label=tables.method_name(cell))
        if found.n > 1:
            low, high = found.mean - found.half_width, found.mean + found.half_width
            axes.axhspan(low, high, color=COLOURS[cell.method], alpha=0.15, lw=0)


def _gain(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int, field: str) -> str:
    """For a title: mSAM over SAM at both ends of the axis."""
    told = []
    for end in (min, max):
        at = end((getattr(cell, field) for cell in cells), default=0)
        pair = [c for method in ("msam", "sam") for c in cells if (c.method, getattr(c, field)) == (method, at)]
        scores = [tables.scores(cell, frame, seeds) for cell in pair]
        found = tables.paired_difference(*scores) if len(scores) == 2 else mean_interval([])
        if found.n:
            half = f" ± {found.half_width:.1f}" if found.n > 1 else ""
            told.append(f"{found.mean:+.1f}{half} (n = {found.n}) at {at:g}")
    return f"\nmSAM over SAM:\n{', '.join(dict.fromkeys(told))}" if told else ""


def _seen(frame: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> str:
    """For a title: where the highest mean is."""
    found = {cell: mean_interval(100 * tables.values(frame, cell, seeds, score_name(cell))) for cell in cells}
    found = {cell: interval for cell, interval in found.items() if interval.n}
    if not found:
        return ""
    best = max(found, key=lambda cell: found[cell].mean)
    rho = f", rho {best.rho:g}" if best.rho else ""
    half = f" ± {found[best].half_width:.1f}" if found[best].n > 1 else ""
    name = tables.method_name(best)
    return f"\nhighest mean {found[best].mean:.1f}{half} %:\n{name}{rho} (n = {found[best].n})"


def _legend(axes: Axes, **options: Any) -> None:
    if axes.has_data():
        axes.legend(**options)


def _rounded(values: np.ndarray) -> np.ndarray:
    """To six significant digits: the last bits of exponentials differ from processor to processor."""
    return np.array([float(f"{value:.6g}") for value in values])


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
